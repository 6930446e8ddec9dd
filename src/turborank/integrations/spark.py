"""Spark: score the pairs of a DataFrame, or two columns with a pandas UDF; see docs/scale.md.

>>> score(spark.read.parquet("pairs/")).write.parquet("scored/")  # doctest: +SKIP
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pandas
from pyspark import TaskContext
from pyspark.sql import DataFrame
from pyspark.sql.functions import pandas_udf
from pyspark.sql.types import DoubleType, FloatType, IntegerType, StructType

from turborank.errors import InputError
from turborank.integrations import open_in_process, recipe_of, score_columns
from turborank.reranker import Reranker
from turborank.types import RerankerRecipe

Model = str | os.PathLike[str] | Reranker | None
COLUMNS = (
    StructType().add("logit", FloatType()).add("score", DoubleType())
    .add("tokens", IntegerType()).add("truncated", IntegerType())
)  # fmt: skip


def score(
    frame: DataFrame,
    model: Model = None,
    *,
    query: str = "query",
    document: str = "document",
    options: Mapping[str, Any] | None = None,
) -> DataFrame:
    """The DataFrame with the columns logit, score, tokens and truncated added (``mapInPandas``).

    Args:
        frame: one pair per row.
        model: a Reranker, or the first argument of :class:`~turborank.Reranker`; each Python worker process of an
            executor opens the model once.
        query: column of the queries.
        document: column of the documents.
        options: other arguments of Reranker. ``threads`` is by default the task's CPUs (``spark.task.cpus``).

    Raises InputError for a missing column, and for a column that would be added but exists. A row without texts fails
    its task.
    """
    missing = [name for name in (query, document) if name not in frame.columns]
    if missing:
        raise InputError(f"expected the columns {query} and {document}, got {', '.join(frame.columns)}")
    if taken := [name for name in COLUMNS.names if name in frame.columns]:
        raise InputError(f"expected no column that is added, got {', '.join(taken)}", hint="rename or drop it")
    schema = StructType([*frame.schema.fields, *COLUMNS.fields])
    return frame.mapInPandas(_partition(recipe_of(model, options), query, document), schema)


def _partition(
    recipe: RerankerRecipe, query: str, document: str
) -> Callable[[Iterator[pandas.DataFrame]], Iterator[pandas.DataFrame]]:
    def scored(batches: Iterator[pandas.DataFrame]) -> Iterator[pandas.DataFrame]:
        reranker = open_in_process(recipe, task_cpus())
        for batch in batches:
            yield batch.assign(**score_columns(reranker, batch[query], batch[document]))

    return scored


def score_udf(model: Model = None, *, options: Mapping[str, Any] | None = None) -> Any:
    """A pandas UDF of (query, document) columns that returns a struct of logit, score, tokens and truncated.

    Arguments as in :func:`score`.

    >>> frame.select("id", score_udf()("query", "document").alias("rerank"))  # doctest: +SKIP
    """
    recipe = recipe_of(model, options)

    def scored(queries: pandas.Series, documents: pandas.Series) -> pandas.DataFrame:
        return pandas.DataFrame(score_columns(open_in_process(recipe, task_cpus()), queries, documents))

    scored.__annotations__ = {"queries": pandas.Series, "documents": pandas.Series, "return": pandas.DataFrame}
    return pandas_udf(scored, COLUMNS)


def task_cpus() -> int:
    """Number of CPUs of the current Spark task (``spark.task.cpus``); 1 outside of a task."""
    context = TaskContext.get()
    return 1 if context is None else max(1, context.cpus())
