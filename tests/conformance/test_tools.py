"""Validators over the served OpenAPI document and deploy/: schemathesis, Helm, Kubernetes' schemas,
hadolint and the Compose specification, each in an environment beside those of the clients.

TURBORANK_CONFORMANCE=~/.cache/turborank-conformance pytest tests/conformance/test_tools.py
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette", reason="the service needs pip install 'turborank[serve]'")
sys.path.append(str(Path(__file__).parents[1] / "serve"))

from environments import VARIABLE, python
from helpers import write_checkpoint
from serving import running

from turborank.serve.config import load

pytestmark = [
    pytest.mark.core,
    pytest.mark.skipif(not os.environ.get(VARIABLE), reason=f"{VARIABLE} names no folder for the tools"),
]

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
CHART = DEPLOY / "helm" / "turborank"
CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
EXAMPLES = os.environ.get("SCHEMATHESIS_EXAMPLES", "5")  # of each operation, beside those of the schema's edges


def tool(environment: str, name: str, *arguments: str, **given: Any) -> subprocess.CompletedProcess[str]:
    """Run a command of an environment."""
    command = [str(python(environment).parent / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=900, **given)


def test_schemathesis_finds_no_500(tmp_path: Path) -> None:
    """With the served OpenAPI document: its examples, boundary values of every schema, and random requests."""
    with running(write_checkpoint(tmp_path / "bees")) as up:
        arguments = ("--checks", CHECKS, "--max-examples", EXAMPLES, "--seed", "1")
        done = tool("schemathesis", "schemathesis", "run", f"{up.url}/openapi.json", *arguments)
        # A deadline of 0.1 s may pass on a busy machine: 504 is then right, and the only fault to be forgiven.
        kinds = set(re.findall(r"❌ (ST\d+ .+?):", done.stdout))
        answers = set(re.findall(r"^ *\[(\d{3})\] ", done.stdout, flags=re.MULTILINE))
        late = kinds == {"ST101 Server error"} and answers == {"504"}
        assert done.returncode == 0 or late, done.stdout[-6000:]
        assert up.ask("/v1/rerank", {"query": "a", "documents": ["b"]}).status == 200


RENDER = """
import json, sys
from helm_python import chart
path, values = sys.argv[1], json.loads(sys.argv[2])
print(json.dumps([chart.lint(path, values, strict=True), chart.Chart.load(path).render(values, name="search")]))
"""
VALUES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "scaling": {"autoscaling": {"enabled": True, "maxReplicas": 4}, "scrape": False},
    "settings": {"settings": {"port": 9000, "model": ["a", "b=c"], "offline": True}, "image": {"tag": "1.2.3"}},
}


@pytest.mark.parametrize("case", VALUES)
def test_helm_lints_and_renders_the_chart_and_kubernetes_knows_every_field(case: str, tmp_path: Path) -> None:
    code = subprocess.run(
        [str(python("deploy")), "-c", RENDER, str(CHART), json.dumps(VALUES[case])],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert code.returncode == 0, code.stderr
    report, manifests = json.loads(code.stdout)
    assert report["errors"] == []
    assert [one for one in report["messages"] if one["severity"] > 1] == []
    written = {name.rpartition("/")[2]: text for name, text in manifests.items() if text.strip()}
    expected = {"configmap.yaml", "deployment.yaml", "service.yaml"} | (
        {"autoscaler.yaml"} if case == "scaling" else set()
    )
    assert set(written) - {"NOTES.txt"} == expected
    for name in expected:
        (tmp_path / name).write_text(written[name])
    files = [str(tmp_path / name) for name in sorted(expected)]
    valid = tool("deploy", "kubernetes-validate", "--strict", "--no-warn", *files)
    assert valid.returncode == 0, valid.stdout + valid.stderr
    toml = re.search(r"turborank\.toml: \|\n((?:    .*\n)+)", written["configmap.yaml"])
    assert toml
    (tmp_path / "turborank.toml").write_text(re.sub(r"^    ", "", toml.group(1), flags=re.MULTILINE))
    settings = load(environment={}, path=str(tmp_path / "turborank.toml"))  # what the pod will read
    assert settings.port == VALUES[case].get("settings", {}).get("port", 8080)
    assert f"containerPort: {settings.port}" in written["deployment.yaml"]


def test_hadolint_has_nothing_to_say_about_the_dockerfile() -> None:
    done = tool("deploy", "hadolint", "--no-color", str(DEPLOY / "Dockerfile"))
    assert (done.returncode, done.stdout) == (0, "")


def test_the_compose_file_is_of_the_compose_specification() -> None:
    schema = ("--builtin-schema", "vendor.compose-spec")
    done = tool("deploy", "check-jsonschema", *schema, str(DEPLOY / "compose.yaml"))
    assert done.returncode == 0, done.stdout
