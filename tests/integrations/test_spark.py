"""Rerankers in a local Spark: the library's bits, one model per process, no pair lost when a worker is killed."""

import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parent))
pytest.importorskip("pyspark", reason="pyspark is not installed in this environment")
if shutil.which("java") is None:
    pytest.skip("java is not installed in this environment", allow_module_level=True)

import pages
from cluster import PAIRS, PYTHONPATH, bits, expected_bits, make_model, make_pairs
from pyspark.sql import SparkSession
from pyspark.sql import functions as f

from turborank import InputError, Reranker
from turborank.integrations.spark import score, score_udf

pytestmark = pytest.mark.filterwarnings("ignore")  # of Spark's own code


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("spark"))


@pytest.fixture(scope="module")
def spark() -> Iterator[Any]:
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    session = (
        SparkSession.builder.master("local[2,4]")  # each task may fail three times
        .config("spark.ui.enabled", "false")
        .config("spark.driver.host", "127.0.0.1")
        .config("spark.driver.bindAddress", "127.0.0.1")
        .config("spark.executorEnv.PYTHONPATH", PYTHONPATH)
        .config("spark.sql.execution.arrow.maxRecordsPerBatch", "2000")
        .config("spark.sql.shuffle.partitions", "4")
        .getOrCreate()
    )
    session.sparkContext.setLogLevel("OFF")
    yield session
    session.stop()


def frame(spark: Any, pairs: list[dict[str, Any]], partitions: int = 8) -> Any:
    return spark.createDataFrame(pairs, "id long, query string, document string").repartition(partitions)


def test_map_in_pandas(spark: Any, folder: Path) -> None:
    pairs = make_pairs()
    scored = score(frame(spark, pairs), Reranker(folder))
    assert scored.columns == ["id", "query", "document", "logit", "score", "tokens", "truncated"]
    rows = [row.asDict() for row in scored.select("id", "logit", "tokens").collect()]
    assert len(rows) == PAIRS
    assert bits(rows) == expected_bits(folder, pairs)
    assert min(row["tokens"] for row in rows) > 4


def test_a_function_of_columns(spark: Any, folder: Path) -> None:
    pairs = make_pairs(5000)
    rerank = score_udf(folder, options={"max_length": 64})
    scored = frame(spark, pairs).select("id", rerank("query", "document").alias("rerank"))
    rows = [row.asDict() for row in scored.select("id", f.col("rerank.logit").alias("logit")).collect()]
    assert bits(rows) == expected_bits(folder, pairs)


def test_one_model_a_process_with_the_threads_of_its_task(spark: Any, folder: Path) -> None:
    def look(batches: Iterator[Any]) -> Iterator[Any]:
        import pandas

        from turborank import reranker
        from turborank.integrations import open_in_process, recipe_of
        from turborank.integrations.spark import task_cpus

        for _batch in batches:
            engine = open_in_process(recipe_of(path, None), task_cpus()).engine
            yield pandas.DataFrame(
                {"process": [os.getpid()], "models": [len(reranker._arrived)], "threads": [engine.threads]}
            )

    path = str(folder)
    looked = frame(spark, make_pairs(400), 16).mapInPandas(look, "process long, models long, threads long")
    rows = [row.asDict() for row in looked.collect()]
    assert len(rows) == 16
    assert {row["threads"] for row in rows} == {1}
    assert len({row["process"] for row in rows}) <= 2 + 1
    assert max(row["models"] for row in rows) <= 3  # this one, and those of the tests above, once each


def test_a_killed_worker_costs_no_pair(spark: Any, folder: Path, tmp_path: Path) -> None:
    killed = str(tmp_path / "killed")

    def kill(batches: Iterator[Any]) -> Iterator[Any]:
        for batch in batches:
            if 1500 in set(batch["id"]):
                try:
                    os.close(os.open(killed, os.O_CREAT | os.O_EXCL))
                except FileExistsError:
                    pass
                else:
                    os.kill(os.getpid(), signal.SIGKILL)
            yield batch

    pairs = make_pairs(min(PAIRS, 20_000))
    before = frame(spark, pairs)
    scored = score(before.mapInPandas(kill, before.schema), folder)
    rows = [row.asDict() for row in scored.select("id", "logit").collect()]
    assert os.path.exists(killed)
    assert bits(rows) == expected_bits(folder, pairs)


def test_columns_are_checked_before_anything_runs(spark: Any, folder: Path) -> None:
    pairs = frame(spark, make_pairs(10))
    with pytest.raises(InputError, match="expected the columns q and document, got id, query, document"):
        score(pairs, folder, query="q")
    with pytest.raises(InputError, match="expected no column that is added, got score"):
        score(pairs.withColumn("score", f.lit(1.0)), folder)
    with pytest.raises(Exception, match=r"expected a string, got \w+ at row 0 of the queries"):
        score(pairs.withColumn("query", f.lit(None).cast("string")), folder).collect()


def test_the_page_runs(spark: Any) -> None:
    pages.run("spark.md")
