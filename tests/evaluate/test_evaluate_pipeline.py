"""The whole pipeline: rerank, measure, report; interrupted and resumed, in parts and joined."""

import csv
import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from helpers import native_config, small_config, write_checkpoint
from mini import QUERIES, append, write_mini

from turborank import InputError, Reranker
from turborank.data.dataset_table import DATASETS
from turborank.data.trec import read_run
from turborank.evaluate import EvaluateOptions, Evaluation, evaluate, report

pytest.importorskip("bm25s")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def model(folder: Path) -> Reranker:
    return Reranker(folder, engine="reference")


def run_file(path: Path, rows: list[tuple[str, str, float]]) -> Path:
    lines = [f"{query} Q0 {doc} {rank} {score} first\n" for rank, (query, doc, score) in enumerate(rows, 1)]
    path.write_text("".join(lines))
    return path


def test_candidates_are_ordered_by_logit(mini: Path, model: Reranker, tmp_path: Path) -> None:
    found = evaluate([str(mini)], [model], out=tmp_path / "out")
    first, reranked = found.results[0].systems
    texts = {name: found.results[0].dataset.corpus.text(name) for name in (f"d{n}" for n in range(1, 7))}
    for query_id in ("q1", "q2", "q3"):
        candidates = [scored.doc_id for scored in first.run[query_id]]
        logits = model.score([(QUERIES[query_id], texts[name]) for name in candidates])
        expected = [candidates[i] for i in np.argsort(-logits, kind="stable")]
        assert [scored.doc_id for scored in reranked.run[query_id]] == expected
        assert [np.float32(scored.score) for scored in reranked.run[query_id]] == sorted(logits, reverse=True)
    written = read_run(tmp_path / "out" / "mini" / "tiny" / "run.trec")
    for query_id, documents in reranked.run.items():  # nine digits are enough for a float32
        assert {(s.doc_id, np.float32(s.score)) for s in written[query_id]} == {
            (s.doc_id, np.float32(s.score)) for s in documents
        }


def test_what_is_written(mini: Path, model: Reranker, tmp_path: Path) -> None:
    found = evaluate([str(mini)], [model], EvaluateOptions(measures=["nDCG@10", "Success@1"], depth=2), out=tmp_path)
    manifest = json.loads((tmp_path / "mini" / "tiny" / "manifest.json").read_text())
    pairs = sum(len(documents) for documents in found.results[0].systems[0].run.values())
    assert (manifest["pairs"], manifest["depth"], manifest["queries_evaluated"]) == (pairs, 2, 3)
    assert manifest["measures"].keys() == {"nDCG@10", "Success@1"}
    assert (manifest["engine"], manifest["precision"], manifest["isa"], manifest["length"]) == (
        "reference", "fp32", "numpy", "truncate",
    )  # fmt: skip
    assert len(manifest["model"]["sha256"]["model.safetensors"]) == len(manifest["first_stage"]["sha256"]) == 64
    assert manifest["tokens"] > manifest["pairs"]
    with (tmp_path / "mini" / "tiny" / "per_query.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["query"] for row in rows] == [QUERIES[row["query_id"]] for row in rows]
    values = found.results[0].systems[1].values["nDCG@10"]
    base = found.results[0].systems[0].values["nDCG@10"]
    for row in rows:
        assert float(row["nDCG@10"]) == pytest.approx(values[row["query_id"]], abs=1e-5)
        gain = values[row["query_id"]] - base[row["query_id"]]
        assert float(row["nDCG@10 gain over BM25"]) == pytest.approx(gain, abs=1e-5)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["datasets"][0]["systems"][1]["measures"]["nDCG@10"] == found.results[0].systems[1].means["nDCG@10"]


def test_reports_are_self_contained_and_complete(mini: Path, model: Reranker, tmp_path: Path) -> None:
    append(mini / "queries.jsonl", '{"_id": "odd", "text": "<script>alert(1)</script> sea"}')
    append(mini / "qrels" / "test.tsv", "odd\td5\t1")
    found = evaluate([str(mini)], [model], out=tmp_path)
    page, text = (tmp_path / "report.html").read_text(), (tmp_path / "report.md").read_text()
    value = f"{found.results[0].systems[1].means['nDCG@10']:.4f}"
    assert value in page
    assert f"| tiny | {value} |" in text
    assert page.count("<svg") >= 4
    assert "<script" not in page
    assert "src=" not in page
    assert "http" not in page.replace("http://www.w3.org/", "")
    ids = [part.split('"')[0] for part in page.split(' id="')[1:]]
    assert len(ids) == len(set(ids))
    assert "prefers-color-scheme: dark" in page


HOSTILE = """<script>{{6*7}}$\\a$"&amp;'"""


def test_every_name_is_escaped(mini: Path, model: Reranker, tmp_path: Path) -> None:
    """Names of datasets, systems, sources and manifests are shown as text, not as HTML, template or TeX."""
    found = evaluate([str(mini)], [model], out=tmp_path)
    result = found.results[0]
    queries = dict.fromkeys(result.dataset.queries, f"query {HOSTILE}")
    dataset = dataclasses.replace(result.dataset, name=f"set {HOSTILE}", notes=(f"note {HOSTILE}",), queries=queries)
    first, second = result.systems
    lower = {query_id: value - 0.5 for query_id, value in first.values[result.measure].items()}
    systems = (
        dataclasses.replace(first, name=f"first {HOSTILE}"),
        dataclasses.replace(
            second, name=f"second {HOSTILE}", values={result.measure: lower}, manifest={**second.manifest, "": HOSTILE},
            comparisons={f"other {HOSTILE}": comparison for comparison in second.comparisons.values()},
        ),
    )  # fmt: skip
    hostile = dataclasses.replace(result, dataset=dataset, systems=systems)
    report.write(Evaluation((hostile,), found.system), tmp_path)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page
    texts = "".join(Texts(page).texts)
    for kind in ("set", "note", "query", "first", "second", "other"):
        assert f"{kind} {HOSTILE}" in texts, kind


class Texts(HTMLParser):
    """The texts of a page, as a browser shows them."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.texts: list[str] = []
        self.feed(page)

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_published_figures_stand_beside_ours_and_forums_count_once(mini: Path, model: Reranker, tmp_path: Path) -> None:
    found = evaluate([str(mini)], [model], out=tmp_path)
    names = ("scifact", "nq", "cqadupstack-android", "cqadupstack-english")
    results = [
        dataclasses.replace(
            found.results[0], dataset=dataclasses.replace(found.results[0].dataset, name=name, row=DATASETS[name])
        )
        for name in names
    ]
    evaluation = Evaluation(tuple(results), found.system)
    report.write(evaluation, tmp_path)
    rows = {line.system: line for line in report.summary(evaluation)}
    bm25 = (0.6789, 0.3055, 0.3801, 0.3453)  # as Pyserini's regressions print them
    mean = (0.6789 + 0.3055 + (0.3801 + 0.3453) / 2) / 3
    assert rows["BM25 (Anserini, flat)"].values == pytest.approx((*bm25, mean))
    turbo = rows["jina-reranker-v1-turbo-en over BM25 top-100"]
    assert turbo.values == (0.739, 0.533, None, None, None)  # no figure for the forums, so no mean
    assert rows["tiny"].source == ""
    assert rows["tiny"].values[-1] == pytest.approx(found.results[0].systems[1].means["nDCG@10"])
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "| BM25 (Anserini, flat) (published) | 0.6789 | 0.3055 | 0.3801 | 0.3453 | 0.4490 |" in text
    assert "| jina-reranker-v1-turbo-en over BM25 top-100 (published) | 0.7390 | 0.5330 | – | – | – |" in text
    assert "| jina-reranker-v1-base-en | beir nDCG@10 | 0.5245 |" in text  # the group's average
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    own = re.findall(
        r'<tr class="published"><td>BM25 \(Anserini, flat\)<span[^>]*>published</span></td>(.*)</tr>', page
    )
    cells = [re.findall("<td[^>]*>(.*?)</td>", row) for row in own]
    assert cells[0] == ["0.6789", "0.3055", "0.3801", "0.3453", "0.4490"]
    assert cells[1][0] == "0.6789"
    assert cells[1][-1] == "–"  # nobody printed its tokens a second
    assert '<td>jina-reranker-v1-base-en</td><td class="left">beir nDCG@10</td><td>0.5245</td>' in page


def test_scores_files_that_are_something_else_are_refused(mini: Path, model: Reranker, tmp_path: Path) -> None:
    evaluate([str(mini)], [model], out=tmp_path)
    [path] = tmp_path.rglob("scores*.jsonl")
    header, row, *rest = path.read_text().splitlines()
    path.write_text("\n".join([header, row, '{"query": "q1"}', *rest]) + "\n")
    with pytest.raises(InputError, match=rf"expected the scores of a query, got query at .*{path.name}:3"):
        evaluate([str(mini)], [model], out=tmp_path)


def test_several_datasets_share_one_plot(mini: Path, model: Reranker, tmp_path: Path) -> None:
    other = write_mini(tmp_path / "other")
    found = evaluate([str(mini), str(other)], [model], out=tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("Difference from the first stage</h3>") == 1
    assert page.count("<figure") == 1 + 2 * 4
    ids = [part.split('"')[0] for part in page.split(' id="')[1:]]
    assert len(ids) == len(set(ids))
    mean = np.mean([result.systems[1].means["nDCG@10"] for result in found.results])
    assert f"{mean:.4f}" in page


@pytest.mark.parametrize("threads", [1, 2])
def test_the_curve_ends_at_the_result_and_begins_at_the_first_stage(
    mini: Path, folder: Path, tmp_path: Path, threads: int
) -> None:
    found = evaluate([str(mini)], [Reranker(folder, engine="reference", threads=threads)], out=tmp_path)
    first, reranked = found.results[0].systems
    curve = reranked.curve
    assert curve[0] == first.means["nDCG@10"]
    assert curve[max(curve)] == pytest.approx(reranked.means["nDCG@10"])


def test_a_query_without_results_counts_as_zero(mini: Path, model: Reranker, tmp_path: Path) -> None:
    run = run_file(tmp_path / "first.trec", [("q2", "d2", 3.0), ("q2", "d5", 2.0), ("unjudged", "d1", 1.0)])
    found = evaluate([str(mini)], [model], EvaluateOptions(run=run), out=tmp_path / "out")
    first, reranked = found.results[0].systems
    assert first.values["nDCG@10"] == {"q1": 0.0, "q2": 1.0, "q3": 0.0}
    assert first.means["nDCG@10"] == pytest.approx(1 / 3)
    assert (reranked.values["nDCG@10"]["q1"], reranked.values["nDCG@10"]["q3"]) == (0, 0)
    assert found.results[0].remarks == (
        "2 queries are not in the run; they count as zero",
        "1 queries of the run are not judged in the dataset; they are left out",
    )
    assert reranked.manifest["first_stage"]["method"] == "run file"


def test_empty_queries_retrieve_nothing(mini: Path, model: Reranker, tmp_path: Path) -> None:
    append(mini / "queries.jsonl", '{"_id": "blank", "text": " "}')
    append(mini / "qrels" / "test.tsv", "blank\td1\t1")
    run = run_file(tmp_path / "first.trec", [("blank", "d1", 3.0), ("q2", "d2", 2.0)])
    for given in (None, run):
        found = evaluate([str(mini)], [model], EvaluateOptions(run=given), out=tmp_path / str(given is None))
        assert found.results[0].systems[1].values["nDCG@10"]["blank"] == 0
    assert "2 queries are not in the run" in found.results[0].remarks[1]  # q1 and q3: the blank one is in it


WRONG_RUNS = [
    ([("other", "d1", 1.0)], r"expected a run for the queries of mini, got none of them \(the first is 'other'\)"),
    ([("q1", "d1", 1.0), ("q1", "D7", 1.0)], r"expected documents of mini, got 'D7' at .*first\.trec:2"),
    ([], "got none of them"),
]


@pytest.mark.parametrize(("rows", "message"), WRONG_RUNS)
def test_a_run_of_another_collection(
    mini: Path, model: Reranker, tmp_path: Path, rows: list[tuple[str, str, float]], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        evaluate(
            [str(mini)], [model], EvaluateOptions(run=run_file(tmp_path / "first.trec", rows)), out=tmp_path / "out"
        )


def test_arguments_are_checked_before_anything_is_read(mini: Path, model: Reranker, tmp_path: Path) -> None:
    calls: list[tuple[Callable[[], Evaluation], str]] = [
        (lambda: evaluate([], out=tmp_path), "at least one dataset"),
        (lambda: evaluate([str(mini)], [model], EvaluateOptions(depth=0), out=tmp_path), "depth"),
        (lambda: evaluate([str(mini)], [model], EvaluateOptions(shard=(3, 2)), out=tmp_path), "1 ≤ k ≤ n"),
        (lambda: evaluate([str(mini)], [model], EvaluateOptions(sample=0), out=tmp_path), "sample"),
        (
            lambda: evaluate([str(mini)], [model], EvaluateOptions(measures=["ndgc"]), out=tmp_path),
            "expected a measure",
        ),
        (lambda: evaluate(["a", "b"], [model], EvaluateOptions(run="x"), out=tmp_path), "one dataset with a run file"),
        (lambda: evaluate([str(mini)], [model, model], out=tmp_path), "tiny more than once"),
    ]
    for call, message in calls:
        with pytest.raises(InputError, match=message):
            call()
    assert not list(tmp_path.glob("*.json"))


def test_two_models_are_compared(mini: Path, model: Reranker, tmp_path: Path) -> None:
    other = write_checkpoint(tmp_path / "other", small_config(num_hidden_layers=1))
    found = evaluate([str(mini)], [model, Reranker(other, engine="reference")], out=tmp_path / "out")
    comparisons = found.results[0].systems[2].comparisons
    assert list(comparisons) == ["BM25", "tiny"]
    means = [system.means["nDCG@10"] for system in found.results[0].systems]
    assert comparisons["tiny"].difference == pytest.approx(means[2] - means[1])


def test_queries_with_equal_judgements_are_skipped_on_request(
    mini: Path, model: Reranker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    append(mini / "queries.jsonl", '{"_id": "lost", "text": "sea"}')  # BM25 finds d1 and d4, neither of them judged
    append(mini / "qrels" / "test.tsv", "lost\td2\t1")
    measures = ["nDCG@10", "MRR@10", "MAP", "Success@1", "Judged@1", "R@100"]
    whole = (
        evaluate([str(mini)], [model], EvaluateOptions(measures=measures), out=tmp_path / "whole").results[0].systems[1]
    )
    asked: list[str] = []
    score = model.score_detailed
    monkeypatch.setattr(model, "score_detailed", lambda pairs: asked.append(pairs[0].query) or score(pairs))
    found = evaluate(
        [str(mini)], [model], EvaluateOptions(measures=measures, skip_constant=True), out=tmp_path / "part"
    ).results[0]
    part = found.systems[1]
    assert asked == [QUERIES["q1"]]  # q2 has one candidate, q3's two are both relevant
    assert part.values == whole.values
    assert part.curve == whole.curve
    assert part.run["lost"] == found.systems[0].run["lost"]
    assert part.run["q1"] == whole.run["q1"]
    assert (part.manifest["queries_scored"], whole.manifest["queries_scored"]) == (1, 4)
    assert "not scored: 3 queries" in found.remarks[-1]


def test_a_sample_depends_on_its_seed_and_is_reported(mini: Path, model: Reranker, tmp_path: Path) -> None:
    found = [
        evaluate([str(mini)], [model], EvaluateOptions(sample=2, seed=5), out=tmp_path / str(n)).results[0]
        for n in range(2)
    ]
    assert len(found[0].qrels) == 2
    assert found[0].qrels == found[1].qrels
    assert found[0].remarks[0] == "a sample of 2 of 3 queries"
    assert "a sample of 2 of 3 queries" in (tmp_path / "0" / "report.md").read_text()


def files(out: Path) -> dict[str, bytes]:
    return {name: (out / "mini" / "tiny" / name).read_bytes() for name in ("run.trec", "per_query.csv")}


KILLED = """
import os, signal, sys
from turborank import Reranker
from turborank.evaluate import EvaluateOptions, evaluate

def progress(what):
    def step(done, total):
        if what.endswith("tiny") and done == 2:
            os.kill(os.getpid(), signal.SIGKILL)
    return step

evaluate([sys.argv[1]], [Reranker(sys.argv[2], engine="native")], out=sys.argv[3], progress=progress)
"""


def test_a_killed_evaluation_resumes_to_the_same_bytes(
    mini: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the native engine, because numpy's last bits may differ between processes."""
    folder = write_checkpoint(tmp_path / "native" / "tiny", native_config())
    model = Reranker(folder, engine="native")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    evaluate([str(mini)], [model], out=whole)
    ended = subprocess.run([sys.executable, "-c", KILLED, str(mini), str(folder), str(killed)], capture_output=True)
    assert ended.returncode == -9, ended.stderr.decode()
    scores = killed / "mini" / "tiny" / "scores.jsonl"
    assert len(scores.read_text().splitlines()) == 3  # the header and two queries
    assert not (killed / "mini" / "tiny" / "run.trec").exists()
    with scores.open("a") as file:
        file.write('{"query_id": "q3", "logits": [0.')  # killed while it wrote

    asked: list[str] = []
    score = model.score_detailed
    monkeypatch.setattr(model, "score_detailed", lambda pairs: asked.append(pairs[0].query) or score(pairs))
    evaluate([str(mini)], [model], out=killed)
    assert asked == [QUERIES["q3"]]
    assert files(killed) == files(whole)
    evaluate([str(mini)], [model], out=killed)
    assert asked == [QUERIES["q3"]]


def test_parts_concatenate_to_the_run_and_join(mini: Path, model: Reranker, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    evaluate([str(mini)], [model], out=whole)
    for part in (3, 1, 2, 4):  # more parts than queries: one is empty
        evaluate([str(mini)], [model], EvaluateOptions(shard=(part, 4)), out=parts)
    assert not (parts / "report.md").exists()
    runs = sorted((parts / "mini" / "tiny").glob("run.*-of-4.trec"))
    assert b"".join(path.read_bytes() for path in runs) == files(whole)["run.trec"]
    evaluate([str(mini)], [model], out=parts)
    assert files(parts) == files(whole)
    lines = (parts / "mini" / "tiny" / "scores.jsonl").read_text().splitlines()
    assert len(lines) == 1  # a header: everything came from the parts


def test_scores_with_another_header_are_refused(mini: Path, model: Reranker, folder: Path, tmp_path: Path) -> None:
    evaluate([str(mini)], [model], EvaluateOptions(depth=2), out=tmp_path / "out")
    with pytest.raises(
        InputError, match=r"got another .*(first_stage|depth).* at .*scores\.jsonl:1; choose another --out"
    ):
        evaluate([str(mini)], [model], EvaluateOptions(depth=3), out=tmp_path / "out")
    with pytest.raises(InputError, match=r"got another max_length \(512, not 64\) at"):
        evaluate(
            [str(mini)],
            [Reranker(folder, engine="reference", max_length=64)],
            EvaluateOptions(depth=2),
            out=tmp_path / "out",
        )


def test_only_the_first_stage(mini: Path, tmp_path: Path) -> None:
    found = evaluate([str(mini)], ["bm25"], out=tmp_path)
    assert [system.name for system in found.results[0].systems] == ["BM25"]
    assert (tmp_path / "report.html").exists()
    assert (tmp_path / "mini" / "first-stage" / "run.trec").exists()


def test_long_documents_are_read_whole_in_windows(mini: Path, folder: Path, tmp_path: Path) -> None:
    long = " ".join(["sea"] * 400)
    corpus = mini / "corpus.jsonl"
    corpus.write_text(corpus.read_text().replace("The sea is salt", long))
    cut, windows = (
        evaluate(
            [str(mini)], [Reranker(folder, engine="reference", max_length=64, length=policy)], out=tmp_path / policy
        ).results[0].systems[1].manifest
        for policy in ("truncate", "windows")
    )  # fmt: skip
    assert cut["pairs_truncated"] > 0
    assert windows["pairs_truncated"] == 0
    assert windows["tokens"] == cut["tokens"] + cut["tokens_truncated"]


def test_lone_surrogates_in_texts_are_written_as_replacement_characters(
    mini: Path, model: Reranker, tmp_path: Path
) -> None:
    append(mini / "queries.jsonl", r'{"_id": "half", "text": "salt \ud83d sea"}')
    append(mini / "corpus.jsonl", r'{"_id": "d7", "text": "salt \udc00"}')
    append(mini / "qrels" / "test.tsv", "half\td7\t1")
    evaluate([str(mini)], [model], out=tmp_path / "out")
    assert "half,salt \ufffd sea," in (tmp_path / "out" / "mini" / "tiny" / "per_query.csv").read_text()


def test_two_datasets_do_not_share_a_folder(mini: Path, tmp_path: Path) -> None:
    other = write_mini(tmp_path / "elsewhere" / "mini")
    for second in (str(other), f"{mini}/"):
        with pytest.raises(InputError, match=f"different names, got '{mini}' and '{second}', both 'mini'"):
            evaluate([str(mini), second], ["bm25"], out=tmp_path / "out")


def test_a_model_does_not_overwrite_the_first_stage(mini: Path, tmp_path: Path) -> None:
    model = Reranker(write_checkpoint(tmp_path / "first-stage"), engine="reference")
    with pytest.raises(InputError, match="a model of another name, got 'first-stage'"):
        evaluate([str(mini)], [model], out=tmp_path / "out")


@pytest.mark.parametrize("below", ["", "results"])
def test_results_need_a_folder(mini: Path, tmp_path: Path, below: str) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(InputError, match=r"expected a folder to write to, got a file at .*taken"):
        evaluate([str(mini)], ["bm25"], out=tmp_path / "taken" / below)


def test_the_first_stage_alone_cannot_be_sharded(mini: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="at least one model with shard"):
        evaluate([str(mini)], ["bm25"], EvaluateOptions(shard=(1, 2)), out=tmp_path)
