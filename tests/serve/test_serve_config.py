"""Settings have the same name in options, environment variables and the file."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from http.client import HTTPConnection
from io import StringIO

import pytest

pytest.importorskip("starlette", reason="the service needs pip install 'turborank[serve]'")

from turborank.errors import InputError
from turborank.serve import config, telemetry
from turborank.serve.config import FIELDS, Settings, load

EXAMPLES = {str: "x", int: 7, float: 7.5, bool: True}


def test_flags_win_over_the_environment_which_wins_over_the_file(tmp_path):
    file = tmp_path / "turborank.toml"
    file.write_text("port = 1\nmax_documents = 2\ntimeout = 3\nmodel = ['a', 'b']\n")
    environment = {"TURBORANK_PORT": "10", "TURBORANK_MAX_DOCUMENTS": "20", "TURBORANK_CONFIG": str(file)}
    got = load({"port": 100, "max_documents": None}, environment=environment)
    assert (got.port, got.max_documents, got.timeout, got.model) == (100, 20, 3.0, ("a", "b"))


@pytest.mark.parametrize("name", FIELDS)
def test_every_setting_can_come_from_each_source(tmp_path, name):
    kind = config.TYPES[name]
    value = EXAMPLES.get(kind, ("a=b", "c=d"))
    value = {"length": "windows", "log_level": "debug"}.get(name, value)
    if kind is int:
        value = max(value, int(FIELDS[name].metadata["minimum"] or 0))
    pair = {"tls_certificate": {"tls_key": "k"}, "tls_key": {"tls_certificate": "c"}}.get(name, {})
    text = ",".join(value) if isinstance(value, tuple) else str(value)
    written = list(value) if isinstance(value, tuple) else value
    (tmp_path / "c.toml").write_text(
        f"{name} = {json.dumps(written)}\n" + "".join(f"{k} = '{v}'\n" for k, v in pair.items())
    )
    from_file = load(environment={}, path=str(tmp_path / "c.toml"))
    from_environment = load(pair, environment={f"TURBORANK_{name.upper()}": text})
    from_flags = load({name: written, **pair}, environment={})
    assert getattr(from_file, name) == getattr(from_environment, name) == getattr(from_flags, name) == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prot = 1", "did you mean 'port'"),
        ("port = 70000", "port to be at most 65535, got 70000"),
        ("port = 'x'", "expected port in .* to be of type int, got 'x'"),
        ("port = true", "of type int"),
        ("offline = 1", "of type bool"),
        ("model = 5", "list of strings"),
        ("timeout = 0", "timeout to be at least 0.01"),
        ("timeout = nan", "timeout to be at least"),
        ("length = 'cut'", "expected length to be one of"),
        ("alias = ['x']", "NAME=MODEL"),
        ("tls_key = 'k'", "together"),
        ("port = ", "TOML"),
    ],
)
def test_faults_name_the_setting(tmp_path, text, message):
    (tmp_path / "c.toml").write_text(text)
    with pytest.raises(InputError, match=message):
        load(environment={}, path=str(tmp_path / "c.toml"))


def test_the_environment_is_checked_as_well():
    with pytest.raises(InputError, match="environment variable TURBORANK_PORT"):
        load(environment={"TURBORANK_PORT": "many"})


def test_defaults_are_valid():
    assert Settings().loopback
    assert all(field.metadata["help"].endswith(".") for field in FIELDS.values())


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("::1", True),
        ("[::1]", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("example.org", False),
    ],
)
def test_loopback(host, loopback):
    assert config.is_loopback(host) is loopback


def test_logs_are_json_and_carry_fields():
    stream = StringIO()
    record = logging.LogRecord("x", logging.INFO, "", 0, "request", (), None)
    record.fields = {"status": 200}
    stream.write(telemetry.JsonFormatter().format(record))
    line = json.loads(stream.getvalue())
    assert (line["event"], line["status"], line["level"]) == ("request", 200, "info")


def test_the_command_serves_logs_no_text_and_ends_on_sigterm(model, tmp_path):
    environment = {**os.environ, "TURBORANK_PORT": "0", "TURBORANK_ENGINE": "reference", "TURBORANK_MODEL": str(model)}
    code = "import sys; from turborank.cli import serve; serve.serve(log_level='info')"
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE, text=True)
    lines = []
    try:
        port = None
        for line in process.stderr:
            lines.append(json.loads(line))
            if "running on" in lines[-1]["event"]:
                port = int(lines[-1]["event"].split(":")[2].split()[0])
            if port is not None and any(one["event"] == "model_loaded" for one in lines):
                break  # either comes first
        connection = HTTPConnection("127.0.0.1", port, timeout=20)
        content = json.dumps({"query": "my private question", "documents": ["my private text"], "x-private": 1})
        headers = {"Content-Type": "application/json", "Authorization": "Bearer private-key"}
        connection.request("POST", "/v1/rerank?private", content, headers)
        assert connection.getresponse().status == 200
        connection.close()
        process.send_signal(signal.SIGTERM)
        rest = process.stderr.read()
        assert process.wait(20) == 0
    finally:
        process.kill()
    process.stderr.close()
    lines += [json.loads(line) for line in rest.splitlines()]
    events = [line["event"] for line in lines]
    assert {"starting", "model_loaded", "request", "draining"} <= set(events)
    assert "no API keys" in lines[0]["keys"]
    assert "private" not in json.dumps(lines)
    [request] = [line for line in lines if line["event"] == "request"]
    assert {"request_id", "documents", "tokens", "compute_ms", "queue_ms", "total_ms"} <= set(request)
    assert time.strptime(request["time"][:19], "%Y-%m-%dT%H:%M:%S")
