"""HTTPS with a self-signed certificate: clients that trust it are answered, others and plain HTTP are not."""

import json
import shutil
import ssl
import subprocess
from http.client import HTTPSConnection

import pytest

pytest.importorskip("starlette", reason="the service needs pip install 'turborank[serve]'")

from serving import JSON, running

from turborank.errors import InputError
from turborank.serve import app, server
from turborank.serve.config import Settings

BODY = {"query": "bees", "documents": ["scouts", "tides"]}


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A self-signed certificate for 127.0.0.1 and its key."""
    if not shutil.which("openssl"):
        pytest.skip("no openssl on this machine to make a certificate with")
    folder = tmp_path_factory.mktemp("tls")
    subject = ["-subj", "/CN=turborank", "-addext", "subjectAltName=IP:127.0.0.1"]
    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", str(folder / "key.pem")]
    command = ["openssl", "req", "-x509", *key, "-out", str(folder / "cert.pem"), "-days", "2", *subject]
    subprocess.run(command, check=True, capture_output=True)
    return folder / "cert.pem", folder / "key.pem"


def ask(port, context):
    connection = HTTPSConnection("127.0.0.1", port, timeout=30, context=context)
    try:
        connection.request("POST", "/v1/rerank", json.dumps(BODY), JSON)
        response = connection.getresponse()
        return response.status, json.load(response), connection.sock.version()
    finally:
        connection.close()


def test_https_works_with_a_trusted_certificate(model, library, certificate):
    cert, key = certificate
    with running(model, tls_certificate=str(cert), tls_key=str(key)) as up:
        status, answer, version = ask(up.port, ssl.create_default_context(cafile=cert))
        assert status == 200
        want = [(one.index, one.score) for one in library.rank(BODY["query"], BODY["documents"])]
        assert [(one["index"], one["relevance_score"]) for one in answer["results"]] == want
        assert version in ("TLSv1.2", "TLSv1.3")
        with pytest.raises(ssl.SSLCertVerificationError):
            ask(up.port, ssl.create_default_context())
        old = ssl.create_default_context(cafile=cert)
        with pytest.warns(DeprecationWarning, match="TLSv1_1"):
            old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_1
        with pytest.raises(ssl.SSLError):
            ask(up.port, old)
        with pytest.raises(OSError, match=r"closed|reset|Remote end"):
            up.ask("/v1/rerank", BODY)


def test_a_certificate_that_cannot_be_used_is_refused_before_anything_is_loaded(model, certificate, tmp_path):
    cert, key = map(str, certificate)
    (tmp_path / "empty.pem").write_text("")
    locked = str(tmp_path / "locked.pem")
    command = ["openssl", "pkey", "-in", key, "-aes256", "-passout", "pass:secret", "-out", locked]
    subprocess.run(command, check=True, capture_output=True)
    empty, gone = str(tmp_path / "empty.pem"), str(tmp_path / "gone.pem")
    for wrong in ((cert, gone), (empty, key), (cert, cert), (cert, locked)):
        with pytest.raises(InputError, match="expected a PEM certificate at"):
            server.make(Settings(model=(str(model),), tls_certificate=wrong[0], tls_key=wrong[1]), app.build)
