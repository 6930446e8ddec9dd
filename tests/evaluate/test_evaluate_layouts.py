"""Each layout of collections, on small files; and on the real collections where they are available."""

import io
import json
import tarfile
from pathlib import Path

import pytest

from turborank import InputError
from turborank.data.corpus import LAYOUTS
from turborank.data.datasets import load
from turborank.evaluate import DATASETS
from turborank.evaluate.record import QueryScores, appending, read


def test_scrolls_rows_are_a_summary_and_its_input(tmp_path: Path) -> None:
    rows = [{"id": "a", "input": "long talk", "output": "short"}, {"id": "b", "input": "other", "output": "brief"}]
    (tmp_path / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    parts = LAYOUTS["scrolls"](tmp_path, "validation", None)
    assert parts.queries == {"Query_0": "short", "Query_1": "brief"}
    assert parts.corpus.text("Passage_1") == "other"
    assert parts.qrels == {"Query_0": {"Passage_0": 1}, "Query_1": {"Passage_1": 1}}


def test_qasper_titles_and_abstracts_against_sections(tmp_path: Path) -> None:
    sections = [
        {"section_name": "Method", "paragraphs": ["We knead.", "We wait."]},
        {"section_name": None, "paragraphs": ["End."]},
    ]
    papers = {"p1": {"title": "On bread", "abstract": "It rises.", "full_text": sections}}
    data = json.dumps(papers).encode()
    with tarfile.open(tmp_path / "qasper-test.tgz", "w:gz") as tar:
        member = tarfile.TarInfo("qasper-test-v0.3.json")
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))
    title, abstract = (LAYOUTS[f"qasper-{field}"](tmp_path, "test", None) for field in ("title", "abstract"))
    assert title.queries == {"qp1": "On bread"}
    assert abstract.queries == {"qp1": "It rises."}
    assert title.corpus.text("p1") == "Method\nWe knead.\nWe wait.\nEnd."
    assert title.qrels == {"qp1": {"p1": 1}}


def test_anthropic_docs(tmp_path: Path) -> None:
    chunks = [{"chunk_link": "x#1", "chunk_heading": "Start", "text": "Begin here."}]
    questions = [{"id": "q", "question": "Where?", "correct_chunks": ["x#1"], "correct_answer": "Here."}]
    (tmp_path / "anthropic_docs.json").write_text(json.dumps(chunks))
    (tmp_path / "docs_evaluation_dataset.json").write_text(json.dumps(questions))
    parts = LAYOUTS["anthropic-docs"](tmp_path, "test", None)
    assert (parts.queries, parts.qrels) == ({"q": "Where?"}, {"q": {"x#1": 1}})
    assert parts.corpus.text("x#1") == "Start Begin here."


def write_chunks(folder: Path, start: int, content: str) -> Path:
    (folder / "corpora").mkdir(parents=True)
    (folder / "corpora" / "sea.md").write_text(" ".join(f"w{n}" for n in range(450)))
    reference = json.dumps([{"content": content, "start_index": start, "end_index": start + len(content)}])
    quoted = reference.replace('"', '""')
    (folder / "questions_df.csv").write_text(f'question,references,corpus_id\nwhich?,"{quoted}",sea\n')
    return folder


def test_chunks_of_two_hundred_words(tmp_path: Path) -> None:
    text = " ".join(f"w{n}" for n in range(450))
    start = text.index("w201")
    dataset = load(str(write_chunks(tmp_path / "talks", start, "w201 w202")))
    (relevant,) = dataset.qrels["q1"]
    assert dataset.corpus.text(relevant).split() == [f"w{n}" for n in range(200, 400)]
    assert [len(chunk.split()) for chunk in dataset.corpus.texts()] == [200, 200, 50]


def test_a_reference_that_is_not_at_its_offsets(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="every reference at its offsets"):
        load(str(write_chunks(tmp_path / "talks", 3, "w201 w202")))


def test_a_quote_without_its_end(tmp_path: Path) -> None:
    folder = write_chunks(tmp_path / "talks", 0, "w0 w1")
    with (folder / "questions_df.csv").open("a") as file:
        file.write('who?,"[{,sea\n')
    with pytest.raises(
        InputError, match=r"comma-separated values, got unexpected end of data at .*questions_df\.csv:3"
    ):
        load(str(folder))


@pytest.mark.parametrize("name", [name for name, row in DATASETS.items() if row.group in ("rag", "collections")])
def test_available_collections_match_the_table(shared: Path, name: str) -> None:
    if not (shared / name).is_dir():
        pytest.skip(f"needs the published collection {name}, which is not at {shared}")
    dataset = load(name, data_dir=shared)  # the counts of the row are asserted
    assert len(dataset.queries) == DATASETS[name].queries
    if name == "chunking_evaluation":
        assert sum(map(len, dataset.qrels.values())) <= 790  # references; two may lie in one chunk


def test_two_writers_are_refused(tmp_path: Path) -> None:
    path, header = tmp_path / "scores.jsonl", {"format": 1}
    with appending(path, header) as add:
        add(QueryScores("q", [1.0], [5], [0], 0.1))
        with pytest.raises(InputError, match="no other process"), appending(path, header):
            pass
    assert read(path, header) == {"q": QueryScores("q", [1.0], [5], [0], 0.1)}
