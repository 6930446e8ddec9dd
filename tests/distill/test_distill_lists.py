"""From files to a training folder: merging, sampling, held-out queries, reproducible bytes."""

import json
from pathlib import Path

import numpy as np
import pytest
from little import ANIMALS, pairs, passages, read_lines, shuffled, tree, write_lines

from turborank import evaluate
from turborank.cli import main
from turborank.data.trec import read_run
from turborank.distill import sources
from turborank.distill.batches import build_folder
from turborank.distill.folder import TrainingFolder
from turborank.distill.sources import ListOptions, TrainingSource, collect
from turborank.errors import InputError

PLAN = sources.PoolPlan(bm25=4, bm25_depth=8, dense=0, dense_depth=0, random=3)


def recipe(*sources: TrainingSource, **changes: object) -> ListOptions:
    return ListOptions(sources, **changes)  # type: ignore[arg-type]


@pytest.fixture
def source(tmp_path: Path) -> TrainingSource:
    return TrainingSource("animals", write_lines(tmp_path / "animals.jsonl.gz", pairs()))


def test_equal_texts_are_one_and_keep_all_labels(tmp_path):
    rows = [
        {"query": "who sleeps?", "passage": "Bees do."},
        {"query": "who  sleeps?", "passage": "Cats do."},
        {"query": "who flies?", "passage": " Bees\ndo."},
        {"query": "Who sleeps?", "passage": "Bees do.", "label": 3},
        {"query": "who sleeps?", "passage": "Cats do.", "label": 0},
    ]
    build_folder(recipe(TrainingSource("a", write_lines(tmp_path / "a.jsonl", rows))), tmp_path / "out", PLAN)
    assert [row["text"] for row in read_lines(tmp_path / "out" / "corpus.jsonl")] == ["Bees do.", "Cats do."]
    assert [row["text"] for row in read_lines(tmp_path / "out" / "queries.jsonl")] == ["who sleeps?", "who flies?"]
    labels = (tmp_path / "out" / "qrels" / "train.tsv").read_text().splitlines()[1:]
    assert labels == ["q0\td0\t3", "q0\td1\t1", "q1\td0\t1"]  # the higher of two grades


def test_pools_hold_labelled_bm25_and_random_documents(tmp_path, source):
    build_folder(recipe(source), tmp_path / "out", PLAN)
    folder = TrainingFolder.load(tmp_path / "out")
    assert len(folder) == len(pairs())
    index = sources.index(folder.texts)
    strangers = 0
    for at, row in enumerate(pairs()):
        pool = folder.doc_index[folder.pool(at)]
        assert folder.queries[at] == row["query"]
        assert len(set(pool)) == len(pool)
        [labelled] = np.flatnonzero(folder.labels[folder.pool(at)] == 1)
        assert folder.texts[pool[labelled]] == row["passage"]
        best = {int(found.doc_id) for found in index.search(row["query"], PLAN.bm25_depth)}
        others = set(pool.tolist()) - {int(pool[labelled])}
        assert len(others & best) >= PLAN.bm25
        assert len(others) == PLAN.bm25 + PLAN.random
        strangers += len(others - best)
        scores = index.scores(row["query"])[pool]
        assert folder.first_stage[folder.pool(at)].tolist() == scores.tolist()
        assert (np.diff(scores) <= 0).all()  # best first, as runs are
    assert strangers > 0


def test_the_same_command_makes_the_same_bytes_and_another_seed_others(tmp_path, source):
    made = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        build_folder(recipe(source, seed=seed, pseudo={"sentence": 5, "keywords": 5}), tmp_path / name, PLAN)
        made[name] = tree(tmp_path / name)
    assert made["a"] == made["b"]
    assert made["a"]["candidates.trec"] != made["c"]["candidates.trec"]


def test_a_complete_folder_is_not_made_again_and_another_is_not_overwritten(tmp_path, source):
    build_folder(recipe(source), tmp_path / "out", PLAN)
    (tmp_path / "out" / "corpus.jsonl").unlink()  # would come back if it were made again
    build_folder(recipe(source), tmp_path / "out", PLAN)
    assert not (tmp_path / "out" / "corpus.jsonl").exists()
    with pytest.raises(InputError, match=r"got another seed, held_out at .*manifest.json"):
        build_folder(recipe(source, seed=1, held_out=0.1), tmp_path / "out", PLAN)
    write_lines(source.path, pairs()[:-1])
    with pytest.raises(InputError, match="got another sources"):
        build_folder(recipe(source), tmp_path / "out", PLAN)


def test_what_is_held_out_and_kept_under_a_cap_does_not_depend_on_the_order(tmp_path, source):
    again = TrainingSource("animals", write_lines(tmp_path / "again.jsonl", shuffled(pairs(), 1)))
    kept = [collect(recipe(one, caps={"animals": 20}, held_out=0.3)) for one in (source, again)]
    held = [{q for q, out in zip(one.queries, one.held_out, strict=True) if out} for one in kept]
    assert set(kept[0].queries) == set(kept[1].queries)
    assert len(kept[0].queries) == 20
    assert held[0] == held[1] != set()
    everything = collect(recipe(source, held_out=0.3))
    assert held[0] == {q for q, out in zip(everything.queries, everything.held_out, strict=True) if out} & set(
        kept[0].queries
    )


def test_held_out_queries_are_measured_over_a_first_stage_and_never_trained_on(tmp_path, source):
    manifest = build_folder(recipe(source, held_out=0.25, pseudo={"sentence": 20}), tmp_path / "out", PLAN)
    dev = evaluate.load(str(tmp_path / "out"), split="dev")
    train = evaluate.load(str(tmp_path / "out"), split="train")
    assert not set(dev.queries) & set(train.queries)
    assert len(dev.queries) + len(train.queries) == len(pairs())
    assert manifest["counts"]["held_out_queries"] == len(dev.queries)
    assert 0.1 < len(dev.queries) / len(pairs()) < 0.4
    folder = TrainingFolder.load(tmp_path / "out")
    run = read_run(tmp_path / "out" / "candidates.trec")
    index = sources.index(folder.texts)
    for query_id, text in dev.queries.items():
        best = index.search(text, PLAN.bm25_depth)
        assert {one.doc_id for one in run[query_id]} == {f"d{one.doc_id}" for one in best}
    assert {folder.query_ids[at] for at in np.flatnonzero(folder.held_out)} == set(dev.queries)
    assert all(folder.sources[at] == "animals" for at in np.flatnonzero(folder.held_out))


def test_long_documents_become_passages_and_queries(tmp_path):
    story = " ".join(f"The {animal} number {n} went to the river and drank." for n in range(40) for animal in ANIMALS)
    rows = [{"query": "what is the plot?", "passage": story}] * 3
    long = TrainingSource("stories", write_lines(tmp_path / "stories.jsonl", rows), long=True)
    made = {"sentence": 6, "span": 4, "keywords": 3}
    build_folder(recipe(long, caps={"stories": 12}, pseudo=made, words=100), tmp_path / "out", PLAN)
    corpus = {row["_id"]: row["text"] for row in read_lines(tmp_path / "out" / "corpus.jsonl")}
    assert len(corpus) == 12
    assert all(text in story and 40 <= len(text.split()) <= 100 for text in corpus.values())
    queries = read_lines(tmp_path / "out" / "queries.jsonl")
    assert {kind: sum(row["source"] == kind for row in queries) for kind in made} == made
    for row in queries:
        origin = corpus[row["made_from"]].lower()
        assert row["text"].lower() in origin or set(row["text"].split()) <= set(origin.replace(".", "").split())
    assert not (tmp_path / "out" / "qrels").exists()
    assert (TrainingFolder.load(tmp_path / "out").labels == -1).all()


def test_dense_candidates_are_the_nearest(tmp_path):
    """Unit vectors on a circle: the nearest of query k's angle are documents k, k±1, k±2."""
    angles = np.arange(36) * np.pi / 18
    circle = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    plan = sources.PoolPlan(bm25=0, bm25_depth=0, dense=5, dense_depth=5, random=0)
    texts = [f"document {n}" for n in range(36)]
    mined = sources.mine(
        [f"query {n}" for n in range(36)],
        [[]] * 36,
        [False] * 36,
        sources.index(texts),
        plan,
        vectors=(circle, circle),
    )
    for query in range(36):
        pool = mined.doc_index[mined.bounds[query] : mined.bounds[query + 1]]
        assert set(pool.tolist()) == {(query + step) % 36 for step in (-2, -1, 0, 1, 2)}


def test_large_collections_are_searched_in_parts(monkeypatch):
    rng = np.random.default_rng(0)
    queries, documents = (rng.normal(size=(n, 8)).astype(np.float32) for n in (25, 60))
    expected = np.argsort(-(queries @ documents.T), axis=1)[:, :4]
    monkeypatch.setattr(sources, "MAX_SCORES", 7 * 60)
    assert np.array_equal(np.array(list(sources.nearest(queries, documents, 4))), expected)


def test_scores_that_came_along_become_a_teacher(tmp_path):
    rows = [
        {
            "query": "who sleeps?",
            "pos": ["bees"],
            "neg": ["cats", "dogs"],
            "pos_scores": [5.5],
            "neg_scores": [0.5, -3],
        },
        {"query": "who flies?", "pos": ["bees"], "neg": ["dogs"], "pos_scores": [7], "neg_scores": [-8.25]},
    ]
    source = TrainingSource("mine", write_lines(tmp_path / "a.jsonl", rows))
    only_given = sources.PoolPlan(bm25=0, bm25_depth=0, dense=0, dense_depth=0, random=0)
    build_folder(recipe(source), tmp_path / "out", only_given)
    folder = TrainingFolder.load(tmp_path / "out")
    assert folder.teachers() == ["given"]
    values = folder.scores("given")
    found = {
        (folder.queries[q], folder.texts[d]): s
        for q, d, s in zip(folder.query_index, folder.doc_index, values.tolist(), strict=True)
    }
    assert found == {
        ("who sleeps?", "bees"): 5.5, ("who sleeps?", "cats"): 0.5, ("who sleeps?", "dogs"): -3.0,
        ("who flies?", "bees"): 7.0, ("who flies?", "dogs"): -8.25,
    }  # fmt: skip
    assert folder.labels.tolist() == [1 if folder.texts[place] == "bees" else 0 for place in folder.doc_index]
    manifest = build_folder(
        recipe(source), tmp_path / "mined", sources.PoolPlan(bm25=0, bm25_depth=0, dense=0, random=2)
    )
    assert TrainingFolder.load(tmp_path / "mined").teachers() == []  # a stranger among them has no score
    assert any("came with the data" in why for why in manifest["left_out"])


@pytest.fixture
def collection(tmp_path):
    folder = tmp_path / "beir"
    texts = passages()
    write_lines(folder / "corpus.jsonl", [{"_id": f"doc-{n}", "text": text} for n, text in enumerate(texts)])
    write_lines(folder / "queries.jsonl", [{"_id": f"ask-{n}", "text": row["query"]} for n, row in enumerate(pairs())])
    write_lines(folder / "qrels" / "train.tsv", [f"ask-{n}\tdoc-{n}\t1" for n in range(10)])
    return folder


def test_a_collection_with_its_own_candidates_keeps_its_ids(tmp_path, collection):
    lines = [f"ask-{n} Q0 doc-{(n + k) % 72} {k} {9.5 - k} mine" for n in range(72) for k in range(6)]
    run = write_lines(tmp_path / "first.trec", lines)
    source = TrainingSource("mine", collection, run=run)
    only_given = sources.PoolPlan(bm25=0, bm25_depth=0, dense=0, dense_depth=0, random=0)
    build_folder(recipe(source, depth=4), tmp_path / "out", only_given)
    folder = TrainingFolder.load(tmp_path / "out")
    for at, query in enumerate(folder.query_ids):
        number = int(query.removeprefix("ask-"))
        expected = {f"doc-{(number + k) % 72}" for k in range(4)}
        assert {folder.doc_ids[place] for place in folder.doc_index[folder.pool(at)]} == expected
    assert int((folder.labels == 1).sum()) == folder.labelled == 10


def test_a_collection_is_mined_whole(tmp_path, collection):
    build_folder(recipe(TrainingSource("mine", collection)), tmp_path / "out", PLAN)
    folder = TrainingFolder.load(tmp_path / "out")
    assert folder.doc_ids == [f"doc-{n}" for n in range(72)]
    assert min(np.diff(folder.bounds)) >= PLAN.bm25


def test_ids_of_several_sources_cannot_clash(tmp_path, collection, source):
    only_given = sources.PoolPlan(bm25=0, bm25_depth=0, dense=0, dense_depth=0, random=0)
    build_folder(recipe(TrainingSource("one", collection), source), tmp_path / "out", only_given)
    folder = TrainingFolder.load(tmp_path / "out")
    assert {"one:doc-0", "one:ask-0"} <= {*folder.doc_ids, *folder.query_ids}
    assert len(folder.texts) == len(passages())  # the pairs' passages are the collection's


def test_the_command(tmp_path, source, capsys):
    arguments = [
        "distill", "lists", f"animals={source.path}", "--out", str(tmp_path / "out"), "--held-out", "0.1",
        "--cap", "animals=30", "--sentences", "5", "--clean", "animals=treebank,spaces", "--bm25", "5", "--random", "2",
    ]  # fmt: skip
    assert main.run(arguments) == 0
    out = capsys.readouterr().out
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["counts"]["queries_of_source"] == {"animals": 30, "sentence": 5}
    assert "35 queries" in out
    assert "30 queries of animals" in out
    assert "5 queries of sentence" in out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["{source}"], "expected NAME=VALUE, got"),
        ([], "expected sources with a name each, got none"),
        (["a={source}", "a={source}"], "expected sources with a name each, got a"),
        (["a={source}", "--cap", "b=3"], "expected the name of a source (a), got 'b'"),
        (["a={source}", "--cap", "a=many"], "expected a number, got 'many'"),
        (["a={source}", "--clean", "a=soap"], "expected a cleaning rule to be one of"),
        (["a={source}", "--held-out", "1"], "expected a share of 0 to 1"),
        (["a={source}", "--candidates", "b=run.trec"], "expected the name of a source, got b"),
        (["a={source}", "--candidates", "a=run.trec"], "expected a BEIR folder for the candidates"),
        (["a={source}", "--bm25", "9", "--bm25-depth", "8"], "expected bm25 depth to be at least 9, got 8"),
        (["a=nowhere.jsonl"], "got nothing at nowhere.jsonl"),
        (["my data={source}"], "expected a source's name without white space, got 'my data'"),
        (["a={source}", "--dense-model", "nosuch"], "expected the folder of a bi-encoder, got none at nosuch"),
        (["a={source}", "--seed", "-1"], "expected seed to be 0 or more, got -1"),
        (["a={source}", "--words", "0"], "expected words to be 1 or more, got 0"),
        (["a={source}", "--words", "-3"], "expected words to be 1 or more, got -3"),
        (["a={source}", "--depth", "0"], "expected depth to be 1 or more, got 0"),
        (["a={source}", "--sentences", "-1"], "expected sentence queries to be 0 or more, got -1"),
    ],
)
def test_a_bad_command_is_answered_in_one_line(tmp_path, source, capsys, arguments, expected):
    given = [one.format(source=source.path) for one in arguments]
    assert main.run(["distill", "lists", *given, "--out", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert expected in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_run_that_did_not_finish_leaves_nothing_to_the_next(tmp_path):
    rows = [{**row, "score": 1.0, "label": 1} for row in pairs()]
    source = TrainingSource("animals", write_lines(tmp_path / "animals.jsonl", rows))
    only_given = sources.PoolPlan(bm25=0, bm25_depth=0, dense=0, dense_depth=0, random=0)
    build_folder(recipe(source, held_out=0.3), tmp_path / "out", only_given)
    (tmp_path / "out" / "manifest.json").unlink()
    build_folder(recipe(source, held_out=0.0), tmp_path / "out", PLAN)
    build_folder(recipe(source, held_out=0.0), tmp_path / "fresh", PLAN)
    assert tree(tmp_path / "out") == tree(tmp_path / "fresh")


def test_a_folder_is_made_where_one_can_be(tmp_path, source, collection):
    for out in (source.path, source.path / "below"):
        with pytest.raises(InputError, match=r"expected a folder to write to, got a file at .*animals.jsonl.gz"):
            build_folder(recipe(source), out, PLAN)
    before = tree(collection)
    with pytest.raises(InputError, match="expected another folder than a source to write to"):
        build_folder(recipe(TrainingSource("mine", collection)), collection, PLAN)
    assert tree(collection) == before
