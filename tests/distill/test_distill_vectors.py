"""The bi-encoder as teacher, against transformers; and its cached vectors."""

import json
from pathlib import Path

import numpy as np
import pytest
from little import pairs, write_lines

from turborank.distill import biencoder, sources, teachers
from turborank.distill.batches import build_folder
from turborank.distill.folder import TrainingFolder
from turborank.distill.sources import ListOptions, TrainingSource

families = pytest.importorskip("families", reason="needs torch and transformers")
torch, transformers = families.torch, families.transformers


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A small random BERT in sentence-transformers' layout."""
    folder = tmp_path_factory.mktemp("vectors") / "little-bi-encoder"
    torch.manual_seed(0)
    config = transformers.BertConfig(**{**families.SMALL, **families.STATED["bert"], "initializer_range": 0.2})
    transformers.BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    families.wordpiece().save(str(folder / "tokenizer.json"))
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 32}')
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    return folder


def their_vectors(folder: Path, texts: list[str]) -> np.ndarray:
    """Mean of the last layer over the tokens of each text, to length 1."""
    bert = transformers.BertModel.from_pretrained(folder, add_pooling_layer=False).eval()
    tokenizer = families.wordpiece()
    tokenizer.enable_truncation(32)
    rows = []
    for text in texts:
        with torch.no_grad():
            rows.append(bert(torch.tensor([tokenizer.encode(text).ids])).last_hidden_state[0].mean(0))
    return torch.nn.functional.normalize(torch.stack(rows)).numpy()


def made(tmp_path: Path, model: Path | None) -> TrainingFolder:
    source = TrainingSource("animals", write_lines(tmp_path / "animals.jsonl", pairs()[:30]))
    plan = sources.PoolPlan(bm25=2, bm25_depth=8, dense=3, dense_depth=3, random=1)
    build_folder(ListOptions((source,)), tmp_path / "lists", plan, dense=model)
    return TrainingFolder.load(tmp_path / "lists")


def test_a_bi_encoder_s_scores_are_cosines(tmp_path, model):
    """Computed in bfloat16; a cosine of unit vectors is off by about one rounding (2^-9)."""
    folder = made(tmp_path, model)
    teachers.score(folder, teachers.parse(f"mini=biencoder:{model}"))
    queries, documents = their_vectors(model, folder.queries), their_vectors(model, folder.texts)
    expected = (queries[folder.query_index] * documents[folder.doc_index]).sum(axis=1)
    np.testing.assert_allclose(folder.scores("mini"), expected, atol=2**-8)
    assert expected.std() > 5 * 2**-8  # there is something to get wrong
    about = json.loads((folder.path / "scores" / "mini.json").read_text())
    assert (about["kind"], about["max_tokens"]) == ("biencoder", 32)


def test_pools_hold_the_bi_encoder_s_best(tmp_path, model):
    """For queries whose best cosine exceeds the fourth by more than bfloat16's error."""
    folder = made(tmp_path, model)
    queries, documents = their_vectors(model, folder.queries), their_vectors(model, folder.texts)
    clear = 0
    for at in range(len(folder)):
        cosines = np.sort(queries[at] @ documents.T)
        if cosines[-1] - cosines[-4] > 2**-7:
            clear += 1
            assert np.argmax(queries[at] @ documents.T) in folder.doc_index[folder.pool(at)]
    assert clear > 3


class Counting:
    """A bi-encoder stand-in: vectors by text lengths, counts the embedded texts, can be made to fail."""

    revision, max_tokens = "r", 8

    def __init__(self, blocks: int | None = None) -> None:
        self.blocks, self.embedded = blocks, []

    def embed(self, texts):
        if self.blocks is not None and not self.blocks:
            raise KeyboardInterrupt
        self.blocks = None if self.blocks is None else self.blocks - 1
        self.embedded += texts
        return np.array([[len(text), 1] for text in texts], dtype=np.float32)


def test_no_block_is_embedded_twice(tmp_path, monkeypatch):
    monkeypatch.setattr(biencoder, "BLOCK", 10)
    texts = ["x" * n for n in range(47)]
    first = Counting(blocks=2)
    with pytest.raises(KeyboardInterrupt):
        biencoder.embed(first, texts, tmp_path)
    second = Counting()
    found = biencoder.embed(second, texts, tmp_path)
    assert first.embedded + second.embedded == texts
    assert found[:, 0].tolist() == [*range(47)]
    third = Counting()
    assert biencoder.embed(third, texts, tmp_path).tobytes() == found.tobytes()
    assert third.embedded == []
    third.revision = "another"
    biencoder.embed(third, texts, tmp_path)
    assert third.embedded == texts
