"""Evaluation: rerank the candidates of a first stage with models, measure, compare and report.

>>> from turborank.evaluate import evaluate
>>> evaluate(["scifact"], out="results")  # doctest: +SKIP
"""

from turborank.data.corpus import Dataset
from turborank.data.dataset_table import DATASETS, GROUPS
from turborank.data.datasets import load
from turborank.evaluate.measures import MEASURES, Comparison, paired_bootstrap
from turborank.evaluate.pipeline import EvaluateOptions, evaluate
from turborank.evaluate.record import Evaluation, Result, System

__all__ = [
    "DATASETS",
    "GROUPS",
    "MEASURES",
    "Comparison",
    "Dataset",
    "EvaluateOptions",
    "Evaluation",
    "Result",
    "System",
    "evaluate",
    "load",
    "paired_bootstrap",
]
