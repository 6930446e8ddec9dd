"""API keys, allowed models and rate limits."""

import os
import re
import stat

import pytest

pytest.importorskip("starlette", reason="the service needs pip install 'turborank[serve]'")

from serving import running

from turborank.errors import InputError
from turborank.serve import app, auth, server
from turborank.serve.config import Settings
from turborank.serve.service import Service
from turborank.serve.wire import Problem
from turborank.types import Pair

BODY = {"query": "bees", "documents": ["scouts", "tides"]}


HASH = f"[[keys]]\nsha256 = '{'0' * 64}'\n"
TEAM = f"{HASH}name = 'a'\n"


def bearer(secret: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}"}


@pytest.fixture
def ring_file(tmp_path):
    return tmp_path / "keys.toml"


def test_a_new_key_is_shown_once_and_kept_as_a_hash(ring_file):
    secret = auth.new(ring_file, "team", models=("bees",), requests=60)
    assert re.fullmatch(r"tr-[\w-]{43}", secret)
    assert secret not in ring_file.read_text()
    assert stat.S_IMODE(os.stat(ring_file).st_mode) == 0o600
    [key] = auth.read(ring_file)
    assert (key.name, key.models, key.requests_per_minute, key.tokens_per_minute) == ("team", ("bees",), 60, 0)
    other = auth.new(ring_file, "other")
    assert [key.name for key in auth.read(ring_file)] == ["team", "other"]
    ring = auth.KeyRing(ring_file)
    assert [ring.find(one).name for one in (secret, other)] == ["team", "other"]
    assert ring.find(secret + "x") is None
    assert ring.find(auth.digest(secret)) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nonsense\n", "at line 1, column 9"),
        ("[[keys]]\nname = a\n", "at line 2, column 8"),
        ("[[key]]\n", "unknown field `key`"),
        ("keys = 1\n", r"Expected `array`, got `int` - at `\$.keys`"),
        ("keys = [1]\n", r"Expected `object`, got `int` - at `\$.keys\[0\]`"),
        ("[[keys]]\nname = 'a'\n", r"required field `sha256` - at `\$.keys\[0\]`"),
        (HASH + "name = 'a b'\n", r"\$.keys\[0\].name`"),
        (HASH + 'name = "a\\n"\n', r"\$.keys\[0\].name`"),
        (HASH + "name = 1\n", r"Expected `str`, got `int` - at `\$.keys\[0\].name`"),
        (f"{TEAM}\n[[keys]]\nname = 'b'\nsha256 = '{'0' * 63}'\n", r"\$.keys\[1\].sha256`"),
        (TEAM + "requests_per_minute = -1\n", r"`int` >= 0 - at `\$.keys\[0\].requests_per_minute`"),
        (TEAM + "tokens_per_minute = true\n", r"`int`, got `bool` - at `\$.keys\[0\].tokens_per_minute`"),
        (TEAM + "models = 'x'\n", r"`array`, got `str` - at `\$.keys\[0\].models`"),
        (TEAM + "models = [1]\n", r"`str`, got `int` - at `\$.keys\[0\].models\[0\]`"),
        (TEAM + "model = 'x'\n", r"unknown field `model` - at `\$.keys\[0\]`"),
        (TEAM * 2, "each name once in .*, got a more than once"),
    ],
)
def test_a_broken_key_file_is_refused_with_the_place(ring_file, text, message):
    ring_file.write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        auth.read(ring_file)
    assert str(ring_file) in str(caught.value)


def test_a_key_file_that_is_not_utf_8_is_refused(ring_file):
    ring_file.write_bytes(b"# \xff\n")
    with pytest.raises(InputError, match=r"expected a TOML file of .*utf-8"):
        auth.read(ring_file)


def test_a_name_is_given_once(ring_file):
    auth.new(ring_file, "team")
    for name in ("team", "", "a/b", "x" * 65):
        with pytest.raises(InputError, match="name"):
            auth.new(ring_file, name)


def test_the_file_is_read_again_when_it_changes_and_a_broken_one_changes_nothing(ring_file):
    now, complaints = [0.0], []
    first = auth.new(ring_file, "first")
    ring = auth.KeyRing(ring_file, complain=complaints.append, clock=lambda: now[0])
    second = auth.new(ring_file, "second")
    now[0] += auth.CHECK_EVERY
    assert ring.find(second).name == "second"
    ring_file.write_text("[[keys")
    now[0] += auth.CHECK_EVERY
    assert ring.find(first).name == "first"
    assert "the keys stay as they were" in complaints[0]
    ring_file.write_text("")
    now[0] += auth.CHECK_EVERY
    assert ring.find(first) is None
    assert ring.required


def test_keys_stay_valid_when_their_file_vanishes_and_comes_back_without_them(ring_file):
    now, complaints = [0.0], []
    secret = auth.new(ring_file, "first")
    ring = auth.KeyRing(ring_file, complain=complaints.append, clock=lambda: now[0])
    ring_file.unlink()
    now[0] += auth.CHECK_EVERY
    assert ring.find(secret).name == "first"
    assert re.fullmatch(r"the keys stay as they were: .*No such file or directory.*", complaints[0])
    now[0] += auth.CHECK_EVERY
    assert ring.find(secret).name == "first"
    assert len(complaints) == 1  # once for each change
    auth.new(ring_file, "second")
    now[0] += auth.CHECK_EVERY
    assert ring.find(secret) is None


def test_long_queries_are_refused_by_name():
    settings = Settings(max_document_characters=10)
    auth.check_sizes(settings, [Pair("q" * 10, "d" * 10)])
    with pytest.raises(
        Problem, match=r"expected at most 10 \(max_document_characters\), got a query of 11 characters at query"
    ):
        auth.check_sizes(settings, [Pair("q" * 11, "d")])


class Compared(str):
    """A digest that only hmac.compare_digest may compare: it takes as long whatever the two have in common."""

    __slots__ = ()
    __hash__ = str.__hash__

    def __eq__(self, other):
        raise AssertionError("a comparison that ends at the first difference")

    __ne__ = __lt__ = __gt__ = __eq__


def test_every_key_is_compared_and_each_in_constant_time(ring_file, monkeypatch):
    secrets = [auth.new(ring_file, name) for name in "abc"]
    ring, compared = auth.KeyRing(ring_file), []
    compare, digest = auth.hmac.compare_digest, auth.digest
    monkeypatch.setattr(auth.hmac, "compare_digest", lambda a, b: compared.append((a, b)) or compare(a, b))
    monkeypatch.setattr(auth, "digest", lambda secret: Compared(digest(secret)))
    for secret, name in [(secrets[0], "a"), (secrets[2], "c"), ("tr-unknown", None), ("", None), ("ü" * 10_000, None)]:
        compared.clear()
        found = ring.find(secret)
        assert (found.name if found else None, len(compared)) == (name, 3)
        assert {len(side) for pair in compared for side in pair} == {64}


# Who else can read or write the files ---------------------------------------------------------------------------

MODES = pytest.mark.skipif(os.name == "nt", reason="this system has no file modes")


@MODES
@pytest.mark.parametrize(
    ("mode", "mine", "expected"),
    [
        (0o600, True, ""),
        (0o400, True, ""),
        (0o640, True, "has mode 0640: others can read it"),
        (0o644, True, "has mode 0644: others can read it"),
        (0o604, True, "has mode 0604: others can read it"),
        (0o440, False, ""),  # a Secret of Kubernetes, read as a member of fsGroup
        (0o444, False, "has mode 0444: others can read it"),
    ],
)
def test_a_file_that_others_can_read_is_told(ring_file, monkeypatch, mode, mine, expected):
    auth.new(ring_file, "team")
    ring_file.chmod(mode)
    monkeypatch.setattr(os, "geteuid", lambda: ring_file.stat().st_uid + (not mine))
    assert expected in (found := auth.exposed(ring_file))
    assert bool(found) is bool(expected)


@MODES
@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_a_key_file_that_others_can_write_is_refused(ring_file, mode):
    secret = auth.new(ring_file, "team")
    ring_file.chmod(mode)
    with pytest.raises(InputError, match=f"only its owner can write, got mode {mode:04o} at .*chmod 600"):
        auth.KeyRing(ring_file)
    ring_file.chmod(0o600)
    now, complaints = [0.0], []
    ring = auth.KeyRing(ring_file, complain=complaints.append, clock=lambda: now[0])
    auth.new(ring_file, "late")
    ring_file.chmod(mode)
    now[0] += auth.CHECK_EVERY
    assert [key.name for key in ring._keys if ring.find(secret)] == ["team"]
    assert (
        f"the keys stay as they were: expected a key file that only its owner can write, got mode {mode:04o}"
        in (complaints[0])
    )


@MODES
def test_the_server_warns_of_files_that_others_can_read(tmp_path, ring_file, caplog):
    auth.new(ring_file, "team")
    certificate_key = tmp_path / "privkey.pem"
    certificate_key.write_text("-")
    for path in (ring_file, certificate_key):
        path.chmod(0o644)
    settings = Settings(keys=str(ring_file), tls_key=str(certificate_key), tls_certificate="x")
    with caplog.at_level("WARNING", logger="turborank.serve"):
        Service(settings).close()
    warnings = [record.fields["warning"] for record in caplog.records if record.message == "readable_by_others"]
    assert [str(path) in warning for path, warning in zip((ring_file, certificate_key), warnings, strict=True)]
    ring_file.chmod(0o600), certificate_key.chmod(0o600)
    caplog.clear()
    Service(settings).close()
    assert not caplog.records


def test_over_http(model, ring_file):
    good = auth.new(ring_file, "good")
    narrow = auth.new(ring_file, "narrow", models=("other",))
    with running(model, keys=str(ring_file)) as up:
        assert up.ask("/v1/rerank", BODY, bearer(good)).status == 200
        assert up.ask("/v1/rerank", BODY, {"authorization": f"bearer  {good} "}).status == 200
        refused = up.ask("/v1/rerank", BODY, bearer("tr-wrong"))
        assert (refused.status, refused.json["error"]["type"]) == (401, "authentication_error")
        assert refused.headers["www-authenticate"] == "Bearer"
        for headers in (
            {},
            {"Authorization": good},
            {"Authorization": "Basic abc"},
            {"Authorization": "Bearer "},
            bearer("ü"),
        ):
            assert up.ask("/v1/rerank", BODY, headers).status == 401
        assert up.ask("/tei/rerank", {"query": "q", "texts": ["a"]}).content == b""
        assert up.ask("/infinity/rerank", BODY).json == {"detail": "Unauthorized"}
        forbidden = up.ask("/v1/rerank", BODY, bearer(narrow))
        assert (forbidden.status, forbidden.json["error"]["code"]) == (403, "model_not_allowed")
        assert up.ask("/v1/models").status == 401
        assert up.ask("/v1/models", headers=bearer(narrow)).json["data"] == []
        for path in ("/", "/health", "/ready", "/metrics", "/openapi.json"):
            assert up.ask(path).status == 200
        assert up.ask("/openapi.json").json["security"] == [{"key": []}]


def test_two_authorization_headers_are_refused(ring_file):
    good = auth.new(ring_file, "good").encode()
    ring = auth.KeyRing(ring_file)
    header = (b"Authorization", b"Bearer " + good)
    assert auth.authorise(ring, [header]).name == "good"
    with pytest.raises(Problem, match="got 2"):
        auth.authorise(ring, [header, (b"authorization", b"Bearer x")])


def test_a_single_key_may_come_from_the_environment(model, monkeypatch):
    monkeypatch.setenv("TURBORANK_API_KEY", "secret-of-the-container")
    with running(model) as up:
        assert up.ask("/v1/rerank", BODY).status == 401
        assert up.ask("/v1/rerank", BODY, bearer("secret-of-the-container")).status == 200


def test_a_key_of_the_environment_may_end_in_a_newline_and_must_fit_a_header(model):
    for text in ("secret\n", " secret "):
        assert Service(Settings(), api_key=text).ring.find("secret") is not None
    with pytest.raises(InputError, match="TURBORANK_API_KEY to be of ASCII"):
        Service(Settings(), api_key="gehäim")


def test_a_file_that_no_key_can_be_appended_to_stays_as_it_was(tmp_path, ring_file):
    ring_file.write_text("keys = []\n")
    with pytest.raises(InputError, match=r"expected a file that \[\[keys\]\] can be appended to"):
        auth.new(ring_file, "late")
    assert ring_file.read_text() == "keys = []\n"
    with pytest.raises(InputError, match=r"expected to write the key file .*No such file or directory"):
        auth.new(tmp_path / "nowhere" / "keys.toml", "late")


def test_other_machines_need_a_key(model):
    with pytest.raises(InputError, match="expected API keys for a server that others can reach"):
        server.make(Settings(model=(str(model),), host="0.0.0.0"), app.build)


# Rates: a bucket holds one minute's worth -------------------------------------------------------------------------


def test_a_bucket_refills_steadily():
    now = [0.0]
    bucket = auth.Bucket(60, lambda: now[0])
    bucket.take(60)
    assert bucket.wait() == 1.0
    now[0] = 0.5
    assert bucket.wait() == 0.5
    now[0] = 1000.0
    assert bucket.level() == 60
    bucket.take(90)  # what a request costs is known afterwards
    assert bucket.wait() == 31.0


def test_rates_over_http(model, ring_file):
    slow, free = auth.new(ring_file, "slow", requests=2), auth.new(ring_file, "free")
    with running(model, keys=str(ring_file)) as up:
        first, second, third = (up.ask("/v1/rerank", BODY, bearer(slow)) for _ in range(3))
        assert [one.status for one in (first, second, third)] == [200, 200, 429]
        assert [one.headers["x-ratelimit-remaining-requests"] for one in (first, second)] == ["1", "0"]
        assert first.headers["x-ratelimit-limit-requests"] == "2"
        assert third.json["error"]["type"] == "rate_limit_error"
        assert 25 <= int(third.headers["retry-after"]) <= 30  # two a minute: one every 30 s
        assert "requests_per_minute" in third.json["message"]
        assert up.ask("/v1/rerank", BODY, bearer(free)).status == 200


def test_token_rates_count_what_was_read(model, ring_file):
    secret = auth.new(ring_file, "slow", tokens=30)
    with running(model, keys=str(ring_file)) as up:
        first = up.ask("/v1/rerank", BODY, bearer(secret))
        assert first.headers["x-ratelimit-remaining-tokens"] == str(30 - first.json["usage"]["total_tokens"])
        assert up.ask("/v1/rerank", BODY, bearer(secret)).status == 200
        assert up.ask("/v1/rerank", BODY, bearer(secret)).status == 429
