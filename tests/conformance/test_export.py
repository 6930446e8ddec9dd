"""sentence-transformers' CrossEncoder loads the folder that ``turborank export`` wrote and returns the same scores.

Needs an environment with sentence-transformers beside turborank (passes with 5.1.0 and 6.2.0); skipped elsewhere.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed in this environment")

import torch
from families import FAMILIES, save_family
from safetensors.torch import load_file, save_file
from sentence_transformers import CrossEncoder

from turborank import Reranker, checkpoint
from turborank.export import export

pytestmark = pytest.mark.filterwarnings("default")  # theirs

PAIRS = [
    ("What is the capital of France?", "Paris is the capital of France."),
    ("What is the capital of France?", "Bread bakes, and Berlin is the capital of Germany!"),
    ("paris", "the " * 700),  # cut to 512 tokens
    ("what is " * 200, "bread bakes " * 200),  # both are cut
    ("", "Zürich"),
]


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A random model in the layout that students are saved in: canonical names, three files, no labels."""
    folder = tmp_path / "student"
    save_family(folder, request.param)
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {checkpoint.verify.canonical(name): value for name, value in tensors.items()}, folder / "model.safetensors"
    )
    return folder


def test_cross_encoder_scores_as_we_do(model: Path, tmp_path: Path) -> None:
    export(str(model), "sentence-transformers", tmp_path / "out")
    encoder: Any = CrossEncoder(str(tmp_path / "out"), device="cpu")
    ours = Reranker(model, engine="reference", precision="fp32")
    logits = np.asarray(ours.score(PAIRS))
    assert np.ptp(logits) > 1e-2
    # First as it comes: version 5 goes on with whatever activation it was last given.
    np.testing.assert_allclose(encoder.predict(PAIRS), 1 / (1 + np.exp(-logits)), atol=1e-4, rtol=0)
    found = encoder.predict(PAIRS, activation_fn=torch.nn.Identity())
    np.testing.assert_allclose(found, logits, atol=1e-4, rtol=0)


def test_every_tensor_finds_its_place(model: Path, tmp_path: Path) -> None:
    """transformers initialises tensors whose names it does not know at random, without an error."""
    from transformers import AutoModelForSequenceClassification

    export(str(model), "sentence-transformers", tmp_path / "out")
    found, told = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    assert found.config.num_labels == 1


def test_what_was_exported_is_a_reranker_here_too(model: Path, tmp_path: Path) -> None:
    export(str(model), "sentence-transformers", tmp_path / "out")
    for folder in (model, tmp_path / "out"):
        assert checkpoint.read(folder).config == checkpoint.read(model).config
    ours, again = (Reranker(folder, engine="reference").score(PAIRS[:2]) for folder in (model, tmp_path / "out"))
    np.testing.assert_array_equal(ours, again)
