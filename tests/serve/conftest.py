from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import write_checkpoint


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("models") / "bees")


@pytest.fixture(scope="session")
def up(model: Path) -> Iterator["object"]:
    """One server without keys, shared by the tests that do not change it."""
    pytest.importorskip("starlette", reason="the service needs pip install 'turborank[serve]'")
    from serving import running

    with running(model, length="truncate") as server:
        yield server


@pytest.fixture(scope="session")
def library(model: Path) -> "object":
    """The same model without a server, for comparison of the scores."""
    from turborank.reranker import Reranker

    return Reranker(model, engine="reference")
