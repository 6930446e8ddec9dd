"""The evaluation pipeline, from datasets and models to runs, measures and reports.

dataset -> first-stage run -> rerank its first ``depth`` documents, query by query, appending the scores to a file ->
run file, per-query CSV, manifest -> comparison -> Markdown and HTML.
"""

from __future__ import annotations

import csv
import hashlib
import io
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from turborank import checkpoint as checkpoints
from turborank import scheduler
from turborank.data.bm25 import bm25_run, parameters
from turborank.data.corpus import Dataset
from turborank.data.datasets import called, default_data_dir, expand, load
from turborank.data.files import check_folder, file_hash, read_lines, write_json, write_text
from turborank.data.trec import Qrels, Run, Scored, read_run, write_run
from turborank.errors import InputError
from turborank.evaluate import record, report
from turborank.evaluate.measures import MEASURES, SEED, means, paired_bootstrap, parse, per_query
from turborank.evaluate.record import (
    Evaluation,
    Result,
    System,
    about_dataset,
    about_scores,
    about_system,
)
from turborank.fusion import K, reciprocal_rank_fusion
from turborank.reranker import Reranker, order
from turborank.types import Pair, StartProgress, no_progress

DEPTHS = (2, 3, 5, 10, 20, 30, 50, 100, 200, 500, 1000)  # points of the curve of measure against depth
LIST, SHOWN = 100, 10  # adaptive depth: length of the candidate list, and top_n
FIRST_STAGE = "bm25"  # given as a model: evaluate the first stage only
FIRST_FOLDER = "first-stage"  # folder of the first stage's results, beside those of the models


@dataclass(frozen=True)
class EvaluateOptions:
    """How :func:`evaluate` reranks and measures.

    Args:
        depth: number of candidates of each query that are reranked; "auto": early stopping in a list of 100
            (docs/depth.md).
        run: a TREC run to rerank instead of BM25, or several, which are fused; with one dataset only.
        shard: (k, n): evaluate the k-th of n consecutive parts of the queries, k from 1. The parts' run files
            concatenate to the whole run; another evaluation without ``shard`` joins them and reports.
        measures: names in the notation of ir-measures; the first is compared. By default MEASURES; the compared one is
            then the measure in the dataset's row.
        split: split of the judgements; by default the dataset's own, or "test".
        data_dir: folder of the datasets and of downloads.
        offline: download nothing.
        sample: evaluate a random sample of this many queries; the report states it.
        seed: random seed of the sample.
        skip_constant: skip queries whose candidates all have the same judgement, or none; reranking cannot change their
            measures. They count in the means.
        keep_unknown: keep judgements of documents that are not in the corpus; they count as not retrieved.

    """

    depth: int | str = 100
    run: str | Path | Sequence[str | Path] | None = None
    shard: tuple[int, int] | None = None
    measures: Sequence[str] = ()
    split: str | None = None
    data_dir: str | Path | None = None
    offline: bool = False
    sample: int | None = None
    seed: int = SEED
    skip_constant: bool = False
    keep_unknown: bool = False

    @property
    def adaptive(self) -> bool:
        """Whether the depth is chosen per query by early stopping (docs/depth.md)."""
        return self.depth == scheduler.AUTO_DEPTH

    @property
    def candidates(self) -> int:
        """Maximum number of candidates of a query."""
        return LIST if self.adaptive else int(self.depth)

    @property
    def runs(self) -> tuple[Path, ...]:
        """The run files; empty for BM25."""
        return tuple(map(Path, (self.run,) if isinstance(self.run, str | Path) else self.run or ()))

    def measured(self, dataset: Dataset) -> tuple[str, ...]:
        """The measures to compute; the first is compared."""
        if self.measures:
            return tuple(dict.fromkeys(self.measures))
        compared = dataset.row.measure if dataset.row else MEASURES[0]
        return tuple(dict.fromkeys((compared, *MEASURES)))


def evaluate(
    datasets: Sequence[str],
    models: Sequence[str | Reranker] = (),
    options: EvaluateOptions | None = None,
    *,
    out: str | Path,
    progress: StartProgress = no_progress,
) -> Evaluation:
    """Rerank the candidates of a first stage with every model, measure, and write a report.

    Args:
        datasets: names of DATASETS or GROUPS, folders in BEIR layout, or LlamaIndex JSON files.
        models: names or rerankers; by default the embedded model. ``"bm25"`` evaluates the first stage alone.
        options: candidates, measures, sampling and sharding.
        out: folder of all results. An interrupted evaluation continues from its files.
        progress: called at the start of each task; returns the task's progress callback.

    Raises:
        InputError: malformed input, with file and line, or an option out of range.
        UnknownKeyError: an unknown dataset, model or measure.

    """
    options, folder = options or EvaluateOptions(), Path(out)
    names = expand(datasets)
    _check(options, folder, names, models)
    rerankers = _load_models(models, options.offline)
    data_dir = Path(options.data_dir) if options.data_dir else default_data_dir()
    results = []
    for name in names:
        dataset = load(
            name, data_dir=data_dir, split=options.split, offline=options.offline, keep_unknown=options.keep_unknown,
            progress=progress,
        )  # fmt: skip
        results.append(_evaluate_dataset(dataset, rerankers, options, folder / slug(dataset.name), progress))
        evaluation = Evaluation(tuple(results), about_system())
        if options.shard is None:
            report.write(evaluation, folder, finished=len(results) == len(names))
    return evaluation


def _check(plan: EvaluateOptions, out: Path, names: Sequence[str], models: Sequence[str | Reranker]) -> None:
    if not names:
        raise InputError("expected at least one dataset, got none")
    if isinstance(plan.depth, str) and not plan.adaptive:
        raise InputError(f"expected depth to be a positive integer or {scheduler.AUTO_DEPTH!r}, got {plan.depth!r}")
    if plan.candidates < 1:
        raise InputError(f"expected depth to be a positive integer, got {plan.candidates}")
    if plan.sample is not None and plan.sample < 1:
        raise InputError(f"expected sample to be a positive number of queries, got {plan.sample}")
    if plan.runs and len(names) != 1:
        raise InputError(f"expected one dataset with a run file, got {len(names)}")
    if plan.shard is not None and not 1 <= plan.shard[0] <= plan.shard[1]:
        raise InputError(f"expected shard k/n with 1 ≤ k ≤ n, got {plan.shard[0]}/{plan.shard[1]}")
    if plan.shard is not None and models and all(model == FIRST_STAGE for model in models):
        raise InputError(
            "expected at least one model with shard, got only the first stage", hint="evaluate it without --shard"
        )
    for name in plan.measures:
        parse(name)
    check_folder(out)
    _refuse_shared_folders(names)


def _refuse_shared_folders(names: Sequence[str]) -> None:
    known: dict[str, str] = {}
    for name in names:
        folder = slug(called(name))
        if (other := known.setdefault(folder, name)) != name:
            raise InputError(f"expected datasets of different names, got {other!r} and {name!r}, both {folder!r}")


def _load_models(models: Sequence[str | Reranker], offline: bool) -> list[Reranker]:
    wanted: list[str | Reranker | None] = [model for model in models if model != FIRST_STAGE]
    if not models:
        wanted = [None]
    loaded = [model if isinstance(model, Reranker) else Reranker(model, offline=offline or None) for model in wanted]
    names = [slug(model.name) for model in loaded]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise InputError(f"expected models of different names, got {', '.join(repeated)} more than once")
    if FIRST_FOLDER in names:
        raise InputError(
            f"expected a model of another name, got {FIRST_FOLDER!r}, the folder of the first stage's results",
            hint="rename the model's folder",
        )
    return loaded


def slug(name: str) -> str:
    """A name as the name of a folder: characters other than letters, digits, ``.``, ``_`` and ``-`` become ``-``."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "model"


def _evaluate_dataset(
    dataset: Dataset, rerankers: Sequence[Reranker], plan: EvaluateOptions, folder: Path, progress: StartProgress
) -> Result:
    chosen = _chosen(dataset, plan)
    qrels = {query_id: dataset.qrels[query_id] for query_id in chosen}
    first_run, digest, described, notes = _first_stage(dataset, plan, folder, progress)
    candidates = {query_id: first_run.get(query_id, [])[: plan.candidates] for query_id in chosen}
    facts = {**about_system(), "dataset": about_dataset(dataset), "first_stage": {**described, "sha256": digest}}
    facts |= {
        "depth": plan.candidates,
        "adaptive_depth": plan.adaptive,
        "queries_evaluated": len(chosen),
        "sample_seed": plan.seed if plan.sample else None,
    }
    name = " + ".join(path.name for path in plan.runs) or "BM25"
    values = per_query(candidates, qrels, plan.measured(dataset), dataset.relevant_from)
    first = System(name, None, candidates, values, means(values), {**facts, "measures": means(values)}, {}, {}, {})
    if plan.shard is None:
        _write_system(first, folder / FIRST_FOLDER, dataset, first)
    systems = [first]
    skipped = sum(map(bool, candidates.values())) - len(_to_score(candidates, qrels, plan))
    if skipped and rerankers:
        notes += (
            f"not scored: {skipped} queries whose candidates all have the same judgement; their measures cannot change",
        )
    for model in rerankers:
        systems.append(_rerank(model, dataset, candidates, systems, plan, folder / slug(model.name), facts, progress))
    measure = plan.measured(dataset)[0]
    return Result(
        dataset,
        tuple(systems),
        qrels,
        measure,
        plan.candidates,
        len(chosen) < len(dataset.queries) and plan.shard is None,
        notes,
    )


def _chosen(dataset: Dataset, plan: EvaluateOptions) -> list[str]:
    """The queries to evaluate, in the order of the judgements."""
    queries = list(dataset.queries)
    if plan.sample is not None and plan.sample < len(queries):
        drawn = set(Random(plan.seed).sample(queries, plan.sample))
        queries = [query_id for query_id in queries if query_id in drawn]
    if plan.shard is not None:
        part, parts = plan.shard
        queries = queries[len(queries) * (part - 1) // parts : len(queries) * part // parts]
    return queries


def _first_stage(
    dataset: Dataset, plan: EvaluateOptions, folder: Path, progress: StartProgress
) -> tuple[Run, str, dict[str, Any], tuple[str, ...]]:
    """The first-stage run: (run, SHA-256 of its file, description for the manifest, notes for the report)."""
    if not plan.runs:
        cache = folder / f"bm25-{plan.candidates}"
        run, digest = bm25_run(dataset, plan.candidates, cache, progress=progress(f"{dataset.name}: BM25 index"))
        return run, digest, parameters(), ()
    return _given_run(plan.runs, dataset, plan.candidates)


def _given_run(paths: Sequence[Path], dataset: Dataset, depth: int) -> tuple[Run, str, dict[str, Any], tuple[str, ...]]:
    """A run file, or several fused by reciprocal rank; returns the same as :func:`_first_stage`.

    Raises InputError for a run of another collection.
    """
    runs = [_read_run(path, dataset) for path in paths]
    cuts = [_cut(run, dataset, depth) for run in runs]
    for path, cut in zip(paths, cuts, strict=True):
        _refuse_unknown(cut, dataset, path)
    if len(runs) == 1:
        path = paths[0]
        return cuts[0], file_hash(path), {"method": "run file", "file": path.name}, _differences(runs[0], dataset)
    fused = {
        query_id: [
            Scored(*one) for one in reciprocal_rank_fusion([[one.doc_id for one in cut[query_id]] for cut in cuts])
        ]
        for query_id in dataset.queries
    }
    digest = hashlib.sha256(" ".join(map(file_hash, paths)).encode()).hexdigest()
    names = " + ".join(path.name for path in paths)
    described = {"method": "reciprocal rank fusion", "k": K, "file": f"{names} (reciprocal rank fusion, k {K})"}
    notes = (
        f"{path.name}: {note}" for path, run in zip(paths, runs, strict=True) for note in _differences(run, dataset)
    )
    return _cut(fused, dataset, depth), digest, described, tuple(notes)


def _read_run(path: Path, dataset: Dataset) -> Run:
    run = read_run(path)
    if not any(query_id in dataset.queries for query_id in run):
        example = next(iter(run), None)
        raise InputError(
            f"expected a run for the queries of {dataset.name}, got none of them"
            f"{f' (the first is {example!r})' if example else ''} in {path}",
            hint="it may be a run of another collection or split",
        )
    return run


def _cut(run: Run, dataset: Dataset, depth: int) -> Run:
    """The first ``depth`` documents of each query of the dataset, without the query's own document."""
    cut: Run = {}
    for query_id, query in dataset.queries.items():
        without = query_id if dataset.queries_are_documents else None
        listed = [scored for scored in run.get(query_id, []) if scored.doc_id != without] if query.strip() else []
        cut[query_id] = listed[:depth]
    return cut


def _differences(run: Run, dataset: Dataset) -> tuple[str, ...]:
    """Notes for the report if the run and the dataset have different queries."""
    unlisted = sum(query_id not in run for query_id in dataset.queries)
    unjudged = sum(query_id not in dataset.queries for query_id in run)
    notes = [f"{unlisted} queries are not in the run; they count as zero"] if unlisted else []
    notes += [f"{unjudged} queries of the run are not judged in the dataset; they are left out"] if unjudged else []
    return tuple(notes)


def _refuse_unknown(run: Run, dataset: Dataset, path: Path) -> None:
    """Raise InputError, with the line, for a run with documents that are not in the corpus."""
    listed = dict.fromkeys(scored.doc_id for documents in run.values() for scored in documents)
    unknown = [doc_id for doc_id in listed if doc_id not in dataset.corpus]
    if not unknown:
        return
    line_number = next((number for number, line in read_lines(path) if unknown[0] in line.split()), 0)
    raise InputError(
        f"expected documents of {dataset.name}, got {unknown[0]!r} at {path}:{line_number}"
        f" (and {len(unknown) - 1} more of {len(listed)})",
        hint="it may be a run of another collection",
    )


def _rerank(
    model: Reranker,
    dataset: Dataset,
    candidates: Run,
    earlier: Sequence[System],
    plan: EvaluateOptions,
    folder: Path,
    facts: Mapping[str, Any],
    progress: StartProgress,
) -> System:
    """Rerank one dataset's candidates with one model, compare it with the earlier systems and write to ``folder``."""
    header = score_header(model, dataset, facts["first_stage"]["sha256"], plan.candidates)
    header |= {"adaptive_depth": scheduler.STOP_SHARE if plan.adaptive else None}
    known = record.read_all(folder, header)
    part = "" if plan.shard is None else f".{plan.shard[0]:0{len(str(plan.shard[1]))}d}-of-{plan.shard[1]}"
    qrels = {query_id: dataset.qrels[query_id] for query_id in candidates}
    wanted = _to_score(candidates, qrels, plan)
    todo = [query_id for query_id in wanted if query_id not in known]
    step = progress(f"{dataset.name}: {model.name}")
    with record.appending(folder / f"scores{part}.jsonl", header) as add:
        for done, scored in enumerate(_score(model, dataset, candidates, todo, plan.adaptive), 1):
            add(scored)
            known[scored.query_id] = scored
            step(len(wanted) - len(todo) + done, len(wanted))
    step(len(wanted), len(wanted))
    known = {query_id: known[query_id] for query_id in wanted}
    run = _reordered(candidates, known)
    measured = plan.measured(dataset)
    values = per_query(run, qrels, measured, dataset.relevant_from)
    manifest = {**facts, **_about_model(model, header), **about_scores(list(known.values())), "measures": means(values)}
    measure, whole = measured[0], not part and bool(qrels)
    system = System(
        model.name, model, run, values, means(values), manifest, {q: one.seconds for q, one in known.items()},
        _curve(candidates, run, qrels, measure, dataset.relevant_from, earlier[0], plan.candidates) if whole else {},
        {other.name: paired_bootstrap(values[measure], other.values[measure], measure) for other in earlier if whole},
    )  # fmt: skip
    if part:
        write_run(folder / f"run{part}.trec", run, _tag(model, plan.candidates))
    else:
        _write_system(system, folder, dataset, earlier[0])
    return system


def score_header(model: Reranker, dataset: Dataset, first_stage: str, depth: int) -> dict[str, Any]:
    """Everything a score depends on. Threads and batches are not included: they do not change a score."""
    return {
        "format": 1,
        "dataset": dataset.fingerprint,
        "first_stage": first_stage,
        "depth": depth,
        "model": model.name,
        "weights": model.weights_hash,
        "engine": model.engine.name,
        "precision": model.engine.precision,
        "isa": model.engine.isa,
        "max_length": model.max_length,
        "length": model.encoder.policy,
    }


def _about_model(model: Reranker, header: record.Header) -> dict[str, Any]:
    checkpoint = model.checkpoint
    about = {
        "name": model.name, "origin": checkpoint.origin, "revision": checkpoint.revision,
        "sha256": checkpoints.hashes(checkpoint), "architecture": checkpoint.config.architecture,
    }  # fmt: skip
    same = {key: header[key] for key in ("engine", "precision", "isa", "max_length", "length")}
    return {"model": about, **same, "threads": model.engine.threads}


def _to_score(candidates: Run, qrels: Qrels, plan: EvaluateOptions) -> list[str]:
    """Queries to score: those with candidates; under skip_constant, only those whose order can change a measure."""
    grades = {q: {qrels[q].get(scored.doc_id) for scored in documents} for q, documents in candidates.items()}
    minimum = 2 if plan.skip_constant else 1  # distinct judgements of the candidates; "not judged" counts as one
    return [query_id for query_id, found in grades.items() if len(found) >= minimum]


def _score(
    model: Reranker, dataset: Dataset, candidates: Run, todo: Sequence[str], adaptive: bool
) -> Iterator[record.QueryScores]:
    """Scores of each query's candidates, with early stopping if ``adaptive``; reads one query's texts at a time."""
    for query_id in todo:
        query = dataset.queries[query_id]
        pairs = [Pair(query, dataset.corpus.text(scored.doc_id)) for scored in candidates[query_id]]
        start = time.perf_counter()
        result = model.score_adaptively(pairs, SHOWN) if adaptive else model.score_detailed(pairs)
        seconds = time.perf_counter() - start
        yield record.QueryScores(
            query_id, result.logits.tolist(), result.tokens.tolist(), result.truncated.tolist(), round(seconds, 6)
        )


def _reordered(candidates: Run, known: Mapping[str, record.QueryScores]) -> Run:
    """Candidates by descending logit; ties, and queries that were not scored, keep the order of the first stage.

    Documents that early stopping left unscored follow the others, in the order of the first stage.
    """
    run: Run = {query_id: list(documents) for query_id, documents in candidates.items()}
    for query_id, scored in known.items():
        documents, logits = candidates[query_id], np.asarray(scored.logits, dtype=np.float32)
        run[query_id] = [Scored(documents[index].doc_id, float(logits[index])) for index in order(logits)]
        bottom = float(np.floor(logits.min(initial=0.0)))
        run[query_id] += [Scored(one.doc_id, bottom - n) for n, one in enumerate(documents[len(logits) :], 1)]
    return run


def _curve(
    candidates: Run, run: Run, qrels: Qrels, measure: str, relevant_from: int, first: System, depth: int
) -> dict[int, float]:
    """Depth d -> the measure if only the first d candidates are reranked and the rest follow; d = 0: no reranking."""
    longest = min(depth, max((len(documents) for documents in candidates.values()), default=0))
    curve = {0: first.means[measure]}
    for cut in (*(d for d in DEPTHS if d < longest), longest):
        partial: Run = {}
        for query_id, documents in candidates.items():
            head = {scored.doc_id for scored in documents[:cut]}
            ids = [scored.doc_id for scored in run[query_id] if scored.doc_id in head]
            ids += [scored.doc_id for scored in documents[cut:]]
            partial[query_id] = [Scored(doc_id, float(-rank)) for rank, doc_id in enumerate(ids)]
        curve[cut] = means(per_query(partial, qrels, (measure,), relevant_from))[measure]
    return curve


def _tag(model: Reranker, depth: int) -> str:
    revision = f"@{model.checkpoint.revision[:12]}" if model.checkpoint.revision else ""
    return f"turborank-{model.name}{revision}-top{depth}"


def _write_system(system: System, folder: Path, dataset: Dataset, first: System) -> None:
    tag = _tag(system.model, system.manifest["depth"]) if system.model else system.name
    write_run(folder / "run.trec", system.run, tag)
    write_json(folder / "manifest.json", system.manifest)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    measure = next(iter(system.values))
    writer.writerow(["query_id", "query", "candidates", *system.values, f"{measure} gain over {first.name}"])
    for query_id, documents in system.run.items():
        mine = [system.values[name][query_id] for name in system.values]
        gain = system.values[measure][query_id] - first.values[measure][query_id]
        writer.writerow(
            [query_id, dataset.queries[query_id], len(documents), *(f"{value:.6g}" for value in (*mine, gain))]
        )
    write_text(folder / "per_query.csv", text.getvalue())
