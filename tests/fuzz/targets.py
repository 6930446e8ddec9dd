"""TARGETS: the fuzzed formats, one row for each. Each reads bytes with the package's reader, in its own folder.

An input is either read or refused with an error of turborank.errors' hierarchy (an HTTP body: with a Problem below
500); any other exception is a fault, and so is an input that takes longer than BOUND seconds.
"""

import contextlib
import io
import json
import os
import struct
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import random_models
from helpers import raw_config, small_config, write_checkpoint, write_safetensors
from sample_tokenizers import wordpiece_tokenizer

from turborank import calibration, checkpoint
from turborank.cli import documents as named_files
from turborank.data import corpus, files, trec
from turborank.distill import formats
from turborank.errors import TurborankError
from turborank.tokens import PairEncoder
from turborank.types import Pair

ONE = ("F32", np.zeros(1, np.float32))
BOUND = 10.0  # seconds for one input: a hundred times what the slowest seed takes


class Target(NamedTuple):
    """One format: how to read it, and well-formed inputs to begin with."""

    read: Callable[[bytes], Any]
    seeds: tuple[bytes, ...]


class _Folder:
    """A scratch folder that is made on first use and again in a forked process; files are replaced at each input."""

    def __init__(self) -> None:
        self._made: dict[int, tempfile.TemporaryDirectory[str]] = {}

    def path(self) -> Path:
        if os.getpid() not in self._made:
            self._made[os.getpid()] = tempfile.TemporaryDirectory(prefix="turborank-fuzz-")
            write_checkpoint(self.path() / "model")
            for name in ("2_Dense", "3_LayerNorm", "4_Dense"):  # of sentence-transformers' chain
                self.write(f"model/{name}/config.json", b"{}")
                write_safetensors(self.path() / "model" / name / "model.safetensors", {"x": ONE})
        return Path(self._made[os.getpid()].name)

    def write(self, name: str, data: bytes) -> Path:
        path = self.path() / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)  # never in place: the old file may be mapped
        path.write_bytes(data)
        return path


SCRATCH = _Folder()


def _model(name: str, data: bytes) -> checkpoint.Checkpoint:
    """The model folder with one file replaced, which is restored afterwards."""
    folder = SCRATCH.path() / "model"
    kept = (folder / name).read_bytes()
    SCRATCH.write(f"model/{name}", data)
    try:
        return checkpoint.read(folder)
    finally:
        SCRATCH.write(f"model/{name}", kept)


def config(data: bytes) -> None:
    """config.json of a model folder."""
    _model("config.json", data)


def settings(data: bytes) -> None:
    """The files beside config.json: modules.json and the settings of sentence-transformers; the index of shards."""
    names = ("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json", "1_Pooling/config.json")
    parts = data.split(b"\n---\n")
    for name, part in zip(names, parts, strict=False):
        SCRATCH.write(f"model/{name}", part)
    try:
        checkpoint.read(SCRATCH.path() / "model")
    finally:
        for name in names:
            (SCRATCH.path() / "model" / name).unlink(missing_ok=True)


def safetensors(data: bytes) -> None:
    """The header of a safetensors file, before the data of a real one; and, from "RAW" on, a whole file."""
    whole = (SCRATCH.path() / "model" / "model.safetensors").read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    header = data[:-1] if data.endswith(b"\n") else data
    raw = header[3:] if header.startswith(b"RAW") else struct.pack("<Q", len(header)) + header + whole[start:]
    model = _model("model.safetensors", raw)
    for name in model.weights:
        _ = model.weights[name].sum()


def tokenizer(data: bytes) -> None:
    """tokenizer.json: loaded, then a pair encoded under every length policy."""
    loaded = _model("tokenizer.json", data)
    for policy in ("truncate", "windows", "error"):
        encoder = PairEncoder(loaded.tokenizer, max_length=64, policy=policy)
        encoder.encode([Pair("red Bee", "a tree, é\u0301 🐝 in the blue " * 20), Pair("", ""), Pair("?", "<s>")])


def run(data: bytes) -> None:
    """A TREC run."""
    trec.read_run(SCRATCH.write("run.trec", data))


def qrels(data: bytes) -> None:
    """Judgements, BEIR's or TREC's."""
    trec.read_qrels(SCRATCH.write("qrels.tsv", data))


def beir(data: bytes) -> None:
    """corpus.jsonl, queries.jsonl and qrels of a BEIR folder, separated by a line of ---."""
    parts = [*data.split(b"\n---\n"), b"", b""]
    for name, part in zip(("corpus.jsonl", "queries.jsonl", "qrels/test.tsv"), parts, strict=False):
        SCRATCH.write(f"beir/{name}", part)
    found = corpus.LAYOUTS["beir"](SCRATCH.path() / "beir", "test", None)
    assert len(list(found.corpus.texts())) == len(found.corpus)


def llamaindex(data: bytes) -> None:
    """LlamaIndex's JSON."""
    corpus.LAYOUTS["llamaindex"](SCRATCH.write("llama.json", data), "", None)


def chunks(data: bytes) -> None:
    """questions_df.csv beside a text."""
    SCRATCH.write("chunks/corpora/bees.md", b"bees choose a home " * 50)
    SCRATCH.write("chunks/questions_df.csv", data)
    corpus.LAYOUTS["chunks"](SCRATCH.path() / "chunks", "", None)


def _table(name: str) -> Callable[[bytes], None]:
    def read(data: bytes) -> None:
        path = SCRATCH.write(name, data)
        with contextlib.suppress(TurborankError):
            named_files.read([str(path)], io.BytesIO())
        for _ in files.RowReader(path):
            pass

    return read


def training(data: bytes) -> None:
    """Training data in any of the formats of JSON lines."""
    for _ in formats.examples(SCRATCH.write("train.jsonl", data)):
        pass


def calibrations(data: bytes) -> None:
    """calibration.json."""
    read = calibration.read(SCRATCH.write("calibration.json", data), "0" * 64)
    for target in ("precision=0.5", "recall=0.5", "probability=0.5"):
        read.threshold(target)
    assert 0 <= read.probability(0.25) <= 1


def body(data: bytes) -> None:
    """The body of an HTTP request: the first byte chooses the path."""
    from turborank.serve import dialects, http, wire

    paths = dialects.by_path()
    path = sorted(paths)[(data[0] if data else 0) % len(paths)]
    found: wire.Problem | None = None
    try:
        text, present = http.decode_fields(data[1:])
        row = dialects.DIALECTS[dialects.recognise(paths[path], present)]
        ask = row.decode(http.decode_as(text, row.request))
        dialects.unknown_fields(row, present)
        for pair in ask.pairs:
            assert isinstance(pair.query, str)
            assert isinstance(pair.document, str)
    except wire.Problem as problem:
        found = problem
    if found is not None:
        assert 400 <= found.status < 500
        for row in dialects.DIALECTS.values():
            status, answer = row.error(found, "id")
            assert 400 <= status < 500
            assert answer is None or json.dumps(answer, default=str)


def _json(value: object) -> bytes:
    return json.dumps(value).encode()


def _header() -> bytes:
    table, at = {}, 0
    for name, tensor in random_models.random_weights(small_config()).items():
        table[f"bert.{name}" if not name.startswith("classifier.") else name] = {
            "dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [at, at + 2 * tensor.size],
        }  # fmt: skip
        at += 2 * tensor.size
    return _json({"__metadata__": {"format": "pt"}, **table})


def _tokenizer_seeds() -> tuple[bytes, ...]:
    from sample_tokenizers import bpe_tokenizer

    return (bpe_tokenizer().to_str().encode(), wordpiece_tokenizer().to_str().encode())


CONFIG = raw_config(small_config())
MODERN = {
    "model_type": "modernbert", "hidden_act": "gelu", "hidden_activation": "gelu", "hidden_size": 48, "vocab_size": 40,
    "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "max_position_embeddings": 512,
    "norm_eps": 1e-5, "local_attention": 128, "global_attn_every_n_layers": 3, "global_rope_theta": 160000.0,
    "local_rope_theta": 10000.0, "classifier_pooling": "cls", "layer_types": ["full_attention", "sliding_attention"],
    "architectures": ["ModernBertForSequenceClassification"],
}  # fmt: skip
DEBERTA = {
    **CONFIG, "model_type": "deberta-v2", "relative_attention": True, "position_buckets": 256,
    "max_relative_positions": -1, "pos_att_type": ["p2c", "c2p"],
    "norm_rel_ebd": "layer_norm", "share_att_key": True, "pooler_hidden_act": "gelu",
    "position_biased_input": False, "pooler_hidden_size": 48, "architectures": ["DebertaV2ForSequenceClassification"],
    "id2label": {"0": "LABEL_0"},
}  # fmt: skip
RERANK = {"query": "why", "documents": ["a", {"text": "b", "title": "c"}], "top_n": 1, "return_documents": True}
BEIR = (
    _json({"_id": "d1", "title": "Bees", "text": "choose a home"}) + b"\n" + _json({"_id": "d2", "text": "x"}),
    _json({"_id": "q1", "text": "which bee?"}),
    b"query-id\tcorpus-id\tscore\nq1\td1\t1\nq1\td2\t0",
)
LLAMA = {"queries": {"q": "why"}, "corpus": {"d": "because"}, "relevant_docs": {"q": ["d"]}, "mode": "text"}
REFERENCES = json.dumps([{"start_index": 0, "end_index": 18, "content": "bees choose a home"}]).replace('"', '""')
CALIBRATION = {
    "format": 1, "slope": 1.0, "intercept": 0.0, "weights": "0" * 64, "pairs": 4, "relevant": 2,
    "curve": [[0.5, 2, 1], [-0.5, 4, 2]], "about": {"engine": "native"},
}  # fmt: skip

TARGETS: dict[str, Target] = {
    "config": Target(
        config,
        (
            _json(CONFIG),
            _json(MODERN),
            _json(DEBERTA),
            _json({**CONFIG, "model_type": "xlm-roberta", "position_embedding_type": "absolute"}),
            _json({**CONFIG, "model_type": "electra", "embedding_size": 48, "position_embedding_type": "absolute"}),
        ),
    ),
    "settings": Target(
        settings,
        (
            b"\n---\n".join(
                (
                    _json(
                        [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}]
                        + [
                            {"path": f"{n}_{kind}", "type": f"sentence_transformers.models.{kind}"}
                            for n, kind in enumerate(("Pooling", "Dense", "LayerNorm", "Dense"), 1)
                        ]
                    ),
                    _json({"prompts": {"query": ""}, "default_prompt_name": "query"}),
                    _json({"max_seq_length": 128, "do_lower_case": False}),
                    _json({"pooling_mode_cls_token": True, "pooling_mode": "cls"}),
                )
            ),
            b'[{"path": "", "type": "x.Transformer"}]\n---\n{"prompts": {"q": "x"}, "default_prompt_name": "q"}',
        ),
    ),
    "safetensors": Target(safetensors, (_header(), b"RAW" + b"\x10" + b"\0" * 7 + b'{"a":{}}        ')),
    "tokenizer": Target(tokenizer, _tokenizer_seeds()),
    "run": Target(run, (b"q1 Q0 d1 1 0.5 tag\nq1 Q0 d2 2 -1e3 tag\n", b"\xef\xbb\xbfq\tQ0\td\t1\tnan\tx\r\n")),
    "qrels": Target(qrels, (b"query-id\tcorpus-id\tscore\nq1\td1\t1\n", b"q1 0 d1 2\nq1 0 d2 -1\n")),
    "beir": Target(beir, (b"\n---\n".join(BEIR),)),
    "llamaindex": Target(llamaindex, (_json(LLAMA),)),
    "chunks": Target(chunks, (f'question,references,corpus_id\n"why?","{REFERENCES}",bees\n'.encode(),)),
    "csv": Target(_table("rows.csv"), (b'id,text\n1,"a, ""b""\n"\n2,c\n',)),
    "tsv": Target(_table("rows.tsv"), (b"id\ttext\n1\ta\n",)),
    "jsonl": Target(_table("rows.jsonl"), (b'{"id": 1, "text": "a"}\n"plain"\n{"title": null, "text": "b"}\n',)),
    "training": Target(
        training,
        (
            b'{"query": "q", "pos": ["a"], "neg": ["b"], "pos_scores": [1.5]}\n',
            b'{"query": "q", "documents": ["a", "b"], "labels": [1, 0], "scores": [0.5, -1]}\n',
            b'{"anchor": "q", "positive": "a", "negative_1": "b"}\n',
            b'{"query": "q", "passage": "a", "label": 1, "score": 0.5}\n',
        ),
    ),
    "calibration": Target(calibrations, (_json(CALIBRATION),)),
    "body": Target(
        body,
        tuple(bytes([n]) + _json(RERANK) for n in range(0, 40, 3))
        + tuple(bytes([n]) + _json({"query": "q", "texts": ["a", "b"], "raw_scores": "true"}) for n in range(0, 40, 3))
        + (b"\x01" + _json({"text_1": "q", "text_2": ["a", "b"], "model": "m"}),),
    ),
}


def attempt(name: str, data: bytes) -> float:
    """Read ``data`` as the target ``name``; the seconds it took. Raises exceptions that count as faults."""
    SCRATCH.path()
    started = time.monotonic()
    with contextlib.suppress(TurborankError):
        TARGETS[name].read(data)
    seconds = time.monotonic() - started
    assert seconds < BOUND, f"{name}: {seconds:.1f} s"
    return seconds
