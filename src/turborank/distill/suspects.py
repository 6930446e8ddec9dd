"""Suspected false negatives: documents nobody labelled that a teacher puts above one that somebody did."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from turborank.distill.folder import UNKNOWN, TrainingFolder
from turborank.evaluate.files import replacing
from turborank.types import Float32

SHOWN = 300  # characters of a text in the report
COLUMNS = (
    "query_id", "labelled_id", "suspect_id", "labelled_score", "suspect_score", "difference",
    "query", "labelled_text", "suspect_text",
)  # fmt: skip


class Summary(NamedTuple):
    """Of the queries of one source that have a labelled document in their pool."""

    source: str
    queries: int
    with_suspects: int
    suspects: int
    unlabelled: int  # pool places among which they are


def find(folder: TrainingFolder, scores: Float32, margin: float = 0.0) -> npt.NDArray[np.bool_]:
    """(N,) whether a pool place is a suspect: unlabelled, and more than ``margin`` above a relevant document.

    Of several relevant documents the one that the teacher likes least counts: whatever is above it may be relevant.
    """
    lowest = np.full(len(folder), np.inf, dtype=np.float32)
    relevant = folder.labels > 0
    np.minimum.at(lowest, folder.query_of[relevant], scores[relevant])
    found: npt.NDArray[np.bool_] = (folder.labels == UNKNOWN) & (scores > lowest[folder.query_of] + np.float32(margin))
    return found


def summaries(folder: TrainingFolder, suspects: npt.NDArray[np.bool_]) -> list[Summary]:
    """A summary for each source, in their order."""
    asked = np.zeros(len(folder), dtype=np.bool_)
    asked[folder.query_of[folder.labels > 0]] = True
    counts = np.bincount(folder.query_of[suspects], minlength=len(folder))
    unlabelled = np.bincount(folder.query_of[folder.labels == UNKNOWN], minlength=len(folder))
    sources = np.array(folder.sources)
    rows = []
    for source in dict.fromkeys(folder.sources):
        mine = asked & (sources == source)
        if mine.any():
            queries, suspected = int(mine.sum()), counts[mine]
            rows.append(
                Summary(source, queries, int((suspected > 0).sum()), int(suspected.sum()), int(unlabelled[mine].sum()))
            )
    return rows


def write(folder: TrainingFolder, scores: Float32, suspects: npt.NDArray[np.bool_], path: Path) -> None:
    """A table (TSV) of all suspects beside the labelled document they pass, the largest difference first."""
    rows = sorted(_rows(folder, scores, suspects), key=lambda row: (-float(row[5]), row[0], row[2]))
    with replacing(path) as file:
        for row in [COLUMNS, *rows]:
            file.write(("\t".join(row) + "\n").encode("utf-8", "replace"))


def _rows(folder: TrainingFolder, scores: Float32, suspects: npt.NDArray[np.bool_]) -> Iterator[tuple[str, ...]]:
    for query in np.unique(folder.query_of[suspects]).tolist():
        pool = np.arange(folder.bounds[query], folder.bounds[query + 1])
        relevant = pool[folder.labels[pool] > 0]
        passed = relevant[np.argmin(scores[relevant])]
        for at in pool[suspects[pool]]:
            labelled, suspect = folder.places[passed], folder.places[at]
            yield (
                folder.query_ids[query], folder.doc_ids[labelled], folder.doc_ids[suspect],
                f"{scores[passed]:.6g}", f"{scores[at]:.6g}", f"{scores[at] - scores[passed]:.6g}",
                *(" ".join(text.split())[:SHOWN] for text in (
                    folder.queries[query], folder.texts[labelled], folder.texts[suspect]
                )),
            )  # fmt: skip
