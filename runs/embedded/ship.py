"""Stage 3: average checkpoints, fit the head's scale and bias, quantise to int8, write the model folder.

Averaging: the plain mean of the float32 weights of the given folders. Head: Platt scaling (logistic regression of
"is the labelled passage" on the cosine, both classes weighted alike) over the held-out labelled lists, so that
sigmoid(logit) = ½ where a relevant passage and a hard negative are equally likely. Ranking does not depend on it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import data
import loop
import numpy as np
import student
import torch
import train
from safetensors.numpy import save_file
from torch import Tensor

from turborank.architectures import jinabert
from turborank.quantised import SCALE, quantise


def average(folders: list[Path]) -> dict[str, Tensor]:
    models = [student.load(folder) for folder in folders]
    return {name: torch.stack([model[name] for model in models]).mean(0) for name in models[0]}


@torch.no_grad()
def held_out_cosines(weights: dict[str, Tensor], lists: train.Lists, count: int) -> tuple[Tensor, Tensor]:
    """(cosines, labels) of the held-out lists' pairs, doubtful negatives left out."""
    plain = {name: w.bfloat16() for name, w in weights.items()}
    plain |= {"head.scale": torch.ones(1), "head.bias": torch.zeros(1)}
    cosines, labels = [], []
    for at in lists.held_out[:count]:
        *_, doubtful = lists.targets([at])
        cosine = jinabert.forward(plain, train.CONFIG, data.pack(lists.pairs(at, 256)), student.fast_ops).float()
        cosines.append(cosine[~doubtful[0]])
        labels.append((torch.arange(len(cosine)) == 0).float()[~doubtful[0]])
    return torch.cat(cosines), torch.cat(labels)


def platt(cosines: Tensor, labels: Tensor) -> tuple[float, float]:
    """(scale, bias) of the class-balanced logistic regression, by Newton's method."""
    x = torch.stack([cosines, torch.ones_like(cosines)], 1).double()
    y = labels.double()
    weight = torch.where(labels > 0, 0.5 / labels.sum(), 0.5 / (1 - labels).sum()).double()
    w = torch.zeros(2, dtype=torch.float64)
    for _ in range(50):
        p = torch.sigmoid(x @ w)
        hessian = (x.T * (weight * p * (1 - p))) @ x + 1e-9 * torch.eye(2)
        w = w - torch.linalg.solve(hessian, x.T @ (weight * (p - y)))
    return float(w[0]), float(w[1])


def tokenizer_json() -> str:
    """MiniLM's WordPiece without truncation or padding; its pair template already is ours."""
    tokenizer = json.loads((student.minilm_folder() / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer["truncation"] = tokenizer["padding"] = None
    return json.dumps(tokenizer, ensure_ascii=False, separators=(",", ":"))


def write_int8(folder: Path, weights: dict[str, Tensor]) -> None:
    tensors: dict[str, np.ndarray] = {}
    for name, weight in sorted(weights.items()):
        value = weight.float().numpy()
        if value.ndim == 2:
            tensors[name], tensors[name + SCALE] = quantise(value)
        else:
            tensors[name] = value
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "np"})
    (folder / "model.safetensors").chmod(0o644)
    (folder / "config.json").write_text(json.dumps(student.CONFIG, indent=2) + "\n", encoding="utf-8")
    (folder / "tokenizer.json").write_text(tokenizer_json(), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=Path, nargs="+", required=True, help="folders to average")
    parser.add_argument("--lists", type=Path, help="fit the head on these lists; without it the head stays as trained")
    parser.add_argument("--fit", type=int, default=200, help="held-out lists the head is fitted on")
    parser.add_argument("--float32", type=Path, help="a folder for the averaged float32 model")
    parser.add_argument("--out", type=Path, help="a folder for the int8 model")
    args = parser.parse_args()
    torch.set_num_threads(loop.THREADS)
    weights = average(args.models)
    if args.lists:
        scale, bias = platt(*held_out_cosines(weights, train.Lists(args.lists, 0), args.fit))
        print(json.dumps({"scale": round(scale, 4), "bias": round(bias, 4)}))
        weights["head.scale"], weights["head.bias"] = torch.tensor([scale]), torch.tensor([bias])
    if args.float32:
        student.save(args.float32, weights)
    if args.out:
        write_int8(args.out, weights)


if __name__ == "__main__":
    main()
