"""Memory of a process that loads a catalog model and ranks with it: random fp16 weights of the model's shape.

    python bench/memory.py bge-reranker-v2-m3 --engine native

Prints the size of the weights file and of its word embeddings; the process's anonymous memory (copies) and resident
file pages (which the system may drop at any time), after loading and after a pair of 512 tokens; and the peak of both
together. Linux only.
"""

from __future__ import annotations

import argparse
import json
import math
import struct
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from turborank import catalog
from turborank.architectures import ARCHITECTURES, WORD_TABLES, recognise

# Keys of each family's config.json besides the sizes in the catalog.
STATED: dict[str, dict[str, Any]] = {
    "bert": {"model_type": "bert", "vocab_size": 30522, "type_vocab_size": 2, "layer_norm_eps": 1e-12},
    "xlm_roberta": {"model_type": "xlm-roberta", "vocab_size": 250002, "type_vocab_size": 1, "layer_norm_eps": 1e-5},
    "modernbert": {"model_type": "modernbert", "vocab_size": 50368},
}
PROGRAM = """
import json, sys
import numpy as np
from turborank import checkpoint, engines
from turborank.types import PackedBatch

def memory():
    rows = dict(line.split(":") for line in open("/proc/self/status") if line.startswith(("Rss", "VmHWM")))
    return {name: int(rows[name].split()[0]) / 1024 for name in ("RssAnon", "RssFile", "VmHWM")}

folder, name, precision = sys.argv[1:]
said = {"import": memory()}
model = checkpoint.load(folder)
said["checked"] = memory()
name, precision = engines.choose(name, precision, model.config)
engine = engines.prepare(model.weights, model.config, name=name, precision=precision, threads=1)
said["ready"] = memory()
ids = (np.arange(512, dtype=np.int32) * 7919) % model.config.vocab_size
batch = PackedBatch(ids, ids * 0, np.asarray([0, 512], np.int32), 512)
assert np.isfinite(engine.logits(batch)).all()
said["ranked"] = memory()
print(json.dumps([name, precision, said]))
"""


def write_model(folder: Path, row: catalog.Model, head_size: int) -> dict[str, tuple[int, ...]]:
    """Write a model folder of the row's shape with random fp16 weights. Returns the shapes of its tensors."""
    offset = 2 if row.architecture == "xlm_roberta" else 0
    raw = STATED[row.architecture] | {
        "hidden_size": row.hidden_size,
        "num_hidden_layers": row.layers,
        "num_attention_heads": row.hidden_size // head_size,
        "intermediate_size": row.intermediate_size,
        "max_position_embeddings": row.max_length + offset,
    }
    shapes = ARCHITECTURES[row.architecture].parameters(recognise(raw, {}))
    (folder / "config.json").write_text(json.dumps(raw))
    header, at = {}, 0
    for name, shape in shapes.items():
        size = 2 * math.prod(shape)
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    drawn = np.random.default_rng(0).normal(0, 0.02, 1 << 20).astype(np.float16)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape in shapes.items():
            file.write(np.resize(drawn if len(shape) == 2 else drawn + np.float16("norm" in name.lower()), shape).data)
    words = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "<unk>": 2, "a": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    words.save(str(folder / "tokenizer.json"))
    return shapes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=[n for n, row in catalog.MODELS.items() if row.architecture in STATED])
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--head-size", type=int, default=64)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        shapes = write_model(Path(place), catalog.MODELS[given.model], given.head_size)
        size = (Path(place) / "model.safetensors").stat().st_size / 2**20
        run = subprocess.run(
            [sys.executable, "-c", PROGRAM, place, given.engine, given.precision],
            check=True, capture_output=True, text=True,
        )  # fmt: skip
    engine, precision, said = json.loads(run.stdout)
    words = sum(math.prod(shape) for name, shape in shapes.items() if name in WORD_TABLES)
    print(f"{given.model}, {engine} {precision}: file {size:,.0f} MiB in fp16, table of words {words * 4 / 2**20:,.0f}")
    print("MiB in float32. MiB of the process (anonymous, pages of files, peak of both so far):")
    for stage, now in said.items():
        print(f"  {stage:8} {now['RssAnon']:8,.0f} {now['RssFile']:8,.0f} {now['VmHWM']:8,.0f}")


if __name__ == "__main__":
    main()
