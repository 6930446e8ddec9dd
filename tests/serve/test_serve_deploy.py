"""The files of deploy/ name settings, paths and commands that exist."""

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

pytest.importorskip("starlette", reason="the service needs pip install 'turborank[serve]'")

from turborank.serve.config import FIELDS, load

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
CHART = DEPLOY / "helm" / "turborank"


def settings_in(text: str) -> set[str]:
    return {name.lower() for name in re.findall(r"TURBORANK_([A-Z_]+)", text)} - {"api_key", "model"}


def test_the_settings_file_can_be_loaded():
    assert load(environment={}, path=str(DEPLOY / "turborank.toml")).keys == "/etc/turborank/keys.toml"


@pytest.mark.parametrize("name", ["Dockerfile", "compose.yaml", "helm/turborank/templates/deployment.yaml"])
def test_variables_are_settings(name):
    assert settings_in((DEPLOY / name).read_text()) <= set(FIELDS)


def test_compose_and_values_are_yaml_and_name_settings():
    yaml = pytest.importorskip("yaml")
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    assert compose["services"]["turborank"]["build"]["dockerfile"] == "deploy/Dockerfile"
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    assert set(values["settings"]) <= set(FIELDS)
    used = set(re.findall(r"\.Values\.(\w+)", "".join(path.read_text() for path in CHART.rglob("templates/*"))))
    assert used == set(values)
    assert yaml.safe_load((CHART / "Chart.yaml").read_text())["apiVersion"] == "v2"


def test_probes_and_the_scaling_gauge_exist(up):
    text = (CHART / "templates" / "deployment.yaml").read_text() + (DEPLOY / "Dockerfile").read_text()
    paths = set(re.findall(r"path: (/\w+)", text)) | set(re.findall(r"8080(/\w+)'", text))
    assert paths == {"/ready", "/health", "/metrics"}
    assert all(up.ask(path).status == 200 for path in paths)
    gauge = re.search(r"name: (turborank_\w+)", (CHART / "templates" / "autoscaler.yaml").read_text()).group(1)
    assert f"\n{gauge} " in up.ask("/metrics").content.decode()


def test_templates_open_and_close_their_blocks():
    for path in CHART.rglob("templates/*"):
        text = path.read_text()
        opened = len(re.findall(r"\{\{-? *(?:if|range|define|with)\b", text))
        assert opened == len(re.findall(r"\{\{-? *end\b", text)), path
        assert text.count("{{") == text.count("}}"), path


def test_the_unit_is_a_unit():
    text = (DEPLOY / "turborank.service").read_text()
    assert "ExecStart=/opt/turborank/bin/turborank serve --config" in text
    if shutil.which("systemd-analyze"):
        done = subprocess.run(
            ["systemd-analyze", "verify", "--man=no", str(DEPLOY / "turborank.service")], capture_output=True, text=True
        )
        told = [
            line for line in done.stderr.splitlines() if "turborank.service" in line and "not executable" not in line
        ]
        assert told == []


def test_the_docs_name_what_there_is():
    from turborank.serve.dialects import by_path

    text = (DEPLOY.parent / "docs" / "serving.md").read_text()
    paths = set(re.findall(r"`(/[\w./{}-]+)`", text))
    assert {path for path in paths if "rerank" in path or "score" in path} - {"/v1"} == set(by_path()) - {
        "/vllm/score",
        "/vllm/v1/score",
    }
    assert tomllib.loads(re.search(r"```toml\n(.*?)```", text, re.DOTALL).group(1))["keys"]
