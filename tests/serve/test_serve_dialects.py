"""Each dialect: requests, responses and errors.

Shapes are those of the services' own documentation; scores are the library's.
"""

import pytest

pytest.importorskip("starlette", reason="the service needs pip install 'turborank[serve]'")

from turborank.catalog import RETIRED
from turborank.reranker import sigmoid
from turborank.serve.dialects import DIALECTS, by_path
from turborank.tokens import Limits
from turborank.types import Pair

QUERY = "how do bees choose"
DOCUMENTS = ["scouts dance", "sourdough needs a starter", "tides follow the moon", ""]
RERANK = {"model": "bees", "query": QUERY, "documents": DOCUMENTS}
RERANK_PATHS = [path for path, names in by_path().items() if names[-1] not in ("vllm-score", "tei", "weaviate")]


@pytest.fixture(scope="module")
def expected(library):
    """(index, score, logit) of the library, best first."""
    return [(ranked.index, ranked.score, ranked.logit) for ranked in library.rank(QUERY, DOCUMENTS)]


@pytest.mark.parametrize("path", RERANK_PATHS)
def test_every_rerank_path_gives_the_librarys_scores(up, expected, path):
    reply = up.ask(path, RERANK)
    assert reply.status == 200
    assert [(one["index"], one["relevance_score"]) for one in reply.json["results"]] == [row[:2] for row in expected]
    assert reply.json["model"] == "bees"
    assert reply.json["usage"]["total_tokens"] == reply.json["meta"]["tokens"]["input_tokens"] > 0


def test_the_fields_of_a_jina_and_cohere_answer(up):
    body = up.ask("/v1/rerank", RERANK).json
    assert set(body) == {"id", "object", "model", "results", "usage", "meta"}
    assert body["object"] == "list"
    assert set(body["results"][0]) == {"index", "relevance_score"}
    assert body["meta"]["api_version"] == {"version": "1"}
    assert body["meta"]["billed_units"] == {"search_units": 1}
    assert up.ask("/v2/rerank", RERANK).json["meta"]["api_version"] == {"version": "2"}


def test_documents_come_back_as_objects_in_the_callers_own_form(up):
    mapping = {"title": "Bees", "text": "dance", "id": 7}
    body = up.ask("/v1/rerank", {**RERANK, "documents": [mapping, "tides"], "return_documents": True}).json
    assert {one["index"]: one["document"] for one in body["results"]} == {0: mapping, 1: {"text": "tides"}}


def test_null_and_strings_for_numbers_and_booleans_are_understood(up, expected):
    nulls = dict.fromkeys(("top_n", "return_documents", "max_tokens_per_doc", "rank_fields", "truncation", "model"))
    assert len(up.ask("/v1/rerank", {**RERANK, **nulls}).json["results"]) == len(DOCUMENTS)
    body = up.ask("/v1/rerank", {**RERANK, "top_n": "2", "return_documents": "true"}).json
    assert [one["index"] for one in body["results"]] == [row[0] for row in expected[:2]]
    assert all("document" in one for one in body["results"])


def test_a_query_may_be_an_object(up, expected):
    body = up.ask("/v1/rerank", {**RERANK, "query": {"text": QUERY}}).json
    assert [one["relevance_score"] for one in body["results"]] == [row[1] for row in expected]


@pytest.mark.parametrize(("top_n", "given"), [(1, 1), (3, 3), (99, 4)])
def test_top_n(up, top_n, given):
    assert len(up.ask("/v1/rerank", {**RERANK, "top_n": top_n}).json["results"]) == given


def test_threshold_keeps_what_scores_at_least_that(up, expected):
    middle = expected[1][1]
    body = up.ask("/v1/rerank", {**RERANK, "threshold": middle}).json
    assert [one["index"] for one in body["results"]] == [row[0] for row in expected[:2]]


def test_raw_scores_are_logits(up, expected):
    for extra in ({"raw_scores": True}, {"use_activation": False}):
        body = up.ask("/v1/rerank", {**RERANK, **extra}).json
        assert [one["relevance_score"] for one in body["results"]] == [row[2] for row in expected]
        assert body["meta"]["score"] == "logit"


def test_rank_fields_choose_what_is_read(up, library):
    documents = [{"a": "bees", "b": "x"}, {"a": "tides", "b": "y"}]
    body = up.ask("/v1/rerank", {**RERANK, "documents": documents, "rank_fields": ["b", "a"]}).json
    want = [(one.index, one.score) for one in library.rank(QUERY, ["x bees", "y tides"])]
    assert [(one["index"], one["relevance_score"]) for one in body["results"]] == want


def test_unknown_fields_are_named_and_those_without_effect_are_not(up):
    body = up.ask("/v1/rerank", {**RERANK, "instruction": "be kind", "user": "me"}).json
    assert body["meta"]["warnings"] == ["unknown field 'instruction' was ignored"]


def test_voyage_reads_data_with_documents_as_strings(up, expected):
    body = up.ask("/v1/rerank", {**RERANK, "top_k": 2, "return_documents": True, "truncation": True}).json
    assert [(one["index"], one["relevance_score"]) for one in body["data"]] == [row[:2] for row in expected[:2]]
    assert [one["document"] for one in body["data"]] == [DOCUMENTS[row[0]] for row in expected[:2]]
    assert body["object"] == "list"


def test_infinity_says_rerank_and_gives_strings(up, expected):
    body = up.ask("/infinity/rerank", {**RERANK, "model": "default/not-specified", "return_documents": True}).json
    assert body["object"] == "rerank"
    assert body["id"].startswith("infinity-")
    assert isinstance(body["created"], int)
    assert [one["document"] for one in body["results"]] == [DOCUMENTS[row[0]] for row in expected]


@pytest.mark.parametrize(
    ("path", "extra", "key"), [("/v1/rerank", {"top_k": 1}, "data"), ("/infinity/rerank", {}, "results")]
)
def test_documents_as_strings_are_the_text_that_was_read(up, path, extra, key):
    documents = [{"title": "Bees", "text": "scouts", "id": 7, "meta": {"x": 1}}]
    body = up.ask(path, {"query": "q", "documents": documents, "return_documents": True, **extra}).json
    assert [one["document"] for one in body[key]] == ["Bees scouts"]
    chosen = {"query": "q", "documents": documents, "return_documents": True, "rank_fields": ["text"], **extra}
    assert [one["document"] for one in up.ask(path, chosen).json[key]] == ["scouts"]


@pytest.mark.parametrize(("field", "answer"), [("texts", "results"), ("top_k", "data"), ("property", "scores")])
def test_a_null_tells_whose_client_asks_where_clients_send_it(up, field, answer):
    asked = up.ask("/rerank", {**RERANK, field: None})
    assert asked.status == 200
    assert answer in asked.json


def test_vllm_returns_documents_unasked_and_takes_zero_for_all(up):
    body = up.ask("/vllm/v1/rerank", {**RERANK, "top_n": 0}).json
    assert body["id"].startswith("rerank-")
    assert len(body["results"]) == len(DOCUMENTS)
    assert all(one["document"] == {"text": DOCUMENTS[one["index"]]} for one in body["results"])
    assert len(up.ask("/vllm/rerank", {**RERANK, "documents": "one"}).json["results"]) == 1


@pytest.mark.parametrize(
    ("left", "right", "pairs"),
    [
        ({"text_1": "a"}, {"text_2": ["b", "c"]}, [("a", "b"), ("a", "c")]),
        ({"queries": ["a", "b"]}, {"documents": ["c", "d"]}, [("a", "c"), ("b", "d")]),
        ({"data_1": ["a", "b"]}, {"items": "c"}, [("a", "c"), ("b", "c")]),
    ],
)
def test_vllm_scores_pairs_in_the_order_given(up, library, left, right, pairs):
    body = up.ask("/v1/score", {"model": "bees", **left, **right}).json
    assert body["object"] == "list"
    assert [one["index"] for one in body["data"]] == list(range(len(pairs)))
    assert [one["score"] for one in body["data"]] == [sigmoid(float(logit)) for logit in library.score(pairs)]


def test_vllm_score_wants_one_to_many_or_as_many(up):
    reply = up.ask("/score", {"text_1": ["a", "b"], "text_2": ["c", "d", "e"]})
    assert reply.status == 400
    assert "got 2" in reply.json["error"]["message"]
    assert up.ask("/score", {"text_1": "a"}).status == 422


def test_tei_is_told_by_its_texts_and_answers_a_bare_list(up, expected):
    reply = up.ask(
        "/rerank", {"query": QUERY, "texts": DOCUMENTS, "return_text": True, "truncation_direction": "Right"}
    )
    assert reply.json == [{"index": i, "score": score, "text": DOCUMENTS[i]} for i, score, _ in expected]
    assert reply.headers["x-compute-tokens"] == reply.headers["x-turborank-tokens"]
    assert int(reply.headers["x-compute-characters"]) == len(QUERY) * len(DOCUMENTS) + sum(map(len, DOCUMENTS))
    raw = up.ask("/tei/rerank", {"query": QUERY, "texts": DOCUMENTS, "raw_scores": True}).json
    assert [one["score"] for one in raw] == [row[2] for row in expected]


def test_weaviate_keeps_the_order_of_the_request(up, expected):
    reply = up.ask("/rerank", {"query": QUERY, "documents": DOCUMENTS, "property": "content"})
    by_index = {index: score for index, score, _ in expected}
    assert reply.json == {
        "query": QUERY,
        "property": "content",
        "scores": [{"document": text, "score": by_index[i]} for i, text in enumerate(DOCUMENTS)],
    }
    assert up.ask("/weaviate/rerank", {"query": QUERY, "documents": DOCUMENTS}).json["scores"]
    for path in ("/.well-known/live", "/weaviate/.well-known/ready"):
        assert up.ask(path).status == 204
    assert isinstance(up.ask("/weaviate/meta").json, dict)


BAD = {"query": "q", "documents": ["a", None]}
ERRORS = {  # dialect: (path, bad request, what its clients read out of the answer)
    "jina": ("/jina/v1/rerank", BAD, lambda body: body["detail"]),
    "cohere-v1": ("/cohere/v1/rerank", BAD, lambda body: body["message"]),
    "cohere-v2": ("/cohere/v2/rerank", BAD, lambda body: body["message"]),
    "voyage": ("/voyage/v1/rerank", BAD, lambda body: body["detail"]),
    "infinity": ("/infinity/rerank", BAD, lambda body: body["detail"][0]["msg"]),
    "vllm": ("/vllm/rerank", BAD, lambda body: body["error"]["message"]),
    "vllm-score": ("/vllm/score", {"text_1": "q", "text_2": ["a", None]}, lambda body: body["error"]["message"]),
    "tei": ("/tei/rerank", {"query": "q", "texts": ["a", None]}, lambda body: body["error"]),
    "weaviate": ("/weaviate/rerank", BAD, lambda body: body["error"]),
}


@pytest.mark.parametrize("name", DIALECTS)
def test_every_dialect_says_where_the_fault_is_in_its_own_way(up, name):
    path, body, message = ERRORS[name]
    assert path in DIALECTS[name].paths
    reply = up.ask(path, body)
    assert reply.status == 422
    assert "got null at $." in message(reply.json)
    assert reply.headers["x-request-id"]


GOOD = {"query": QUERY, "documents": DOCUMENTS}
ASKED = {"vllm-score": {"text_1": QUERY, "text_2": DOCUMENTS}, "tei": {"query": QUERY, "texts": DOCUMENTS}}


@pytest.mark.parametrize("name", [name for name in DIALECTS if name != "weaviate"])  # whose requests name no model
def test_every_dialect_says_which_model_replaced_an_old_one(up, name):
    path, _, message = ERRORS[name]
    if name == "infinity":  # its detail is of invalid fields only
        message = ERRORS["vllm"][2]
    for old, new in RETIRED.items():
        reply = up.ask(path, {**ASKED.get(name, GOOD), "model": old})
        assert reply.status == 404
        assert f"expected model to be one of bees, got '{old}', which {new} replaced; " in message(reply.json)


def test_openais_error_object_has_all_four_fields(up):
    error = up.ask("/v1/rerank", BAD).json["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"] == "documents[1]"
    assert error["code"] == "invalid_input"
    missing = up.ask("/v1/rerank", {**RERANK, "model": "gpt"})
    assert missing.status == 404
    assert missing.json["error"]["code"] == "model_not_found"
    assert "bees" in missing.json["error"]["message"]


def test_tei_names_the_kind_of_error(up):
    assert up.ask("/tei/rerank", {"query": "q", "texts": []}).json["error_type"] == "validation"


@pytest.mark.parametrize("documents", [None, [], "text", [1], [{"image": "x"}], [{"text": ["x"]}], {}])
def test_documents_must_be_documents(up, documents):
    assert up.ask("/v1/rerank", {"query": "q", "documents": documents}).status == 422


def test_a_missing_query_is_named(up):
    body = up.ask("/v1/rerank", {"documents": ["a"]}).json
    assert "query" in body["detail"]
    assert body["error"]["param"] == "query"


# How much was read -----------------------------------------------------------------------------------------------

LONG = " ".join(["abcdefghij"] * 80)  # 800 tokens of one letter each; the model reads 512


def test_the_answer_tells_what_was_read_and_cut(up):
    reply = up.ask("/v1/rerank", {"query": "abc", "documents": ["abc", LONG]})
    short, long = reply.json["meta"]["documents"]
    template = 4
    assert short == {"index": 0, "tokens": 3 + 3 + template, "truncated": 0, "span": [0, 3]}
    assert (long["tokens"], long["truncated"]) == (512, 3 + 800 + template - 512)
    assert long["span"][1] < len(LONG)
    assert reply.headers["x-turborank-truncated-tokens"] == str(long["truncated"])
    [warning] = reply.json["meta"]["warnings"]
    assert warning.startswith("1 of 2 documents were not read to their end, for example documents[1]")


@pytest.mark.parametrize("extra", [{"truncation": False}, {"length": "error"}])
def test_length_error_is_400_and_names_the_document(up, extra):
    reply = up.ask("/v1/rerank", {"query": "abc", "documents": ["abc", LONG], **extra})
    assert reply.status == 400
    assert reply.json["error"]["code"] == "too_long"
    assert reply.json["error"]["param"] == "documents[1]"
    assert "at most 512 tokens, got 807" in reply.json["message"]
    assert up.ask("/tei/rerank", {"query": "abc", "texts": ["abc", LONG], "truncate": False}).status == 422


def test_windows_read_everything_and_the_best_one_counts(up, library):
    body = up.ask("/v1/rerank", {"query": "abc", "documents": [LONG], "length": "windows"}).json
    assert body["meta"]["documents"][0]["truncated"] == 0
    windows = library.encoder.encode([Pair("abc", LONG)], Limits(policy="windows"))[0]
    start, end = body["meta"]["documents"][0]["span"]
    logits = library.score([("abc", LONG[first:last]) for first, last in (window.span for window in windows)])
    assert len(windows) > 1
    assert body["results"][0]["relevance_score"] == sigmoid(float(max(logits)))
    assert (start, end) in [window.span for window in windows]


@pytest.mark.parametrize(
    ("extra", "tokens", "cut"),
    [
        ({"max_tokens_per_doc": 10}, 3 + 10 + 4, 790),
        ({"max_doc_length": 10}, 3 + 10 + 4, 790),
        ({"truncate_prompt_tokens": 20}, 20, 807 - 20),
        ({"truncate_prompt_tokens": -1}, 512, 807 - 512),
        ({"max_tokens_per_query": 1, "max_tokens_per_doc": 5}, 1 + 5 + 4, 797),
        ({"max_chunks_per_doc": 1}, 512, 807 - 512),
    ],
)
def test_long_document_controls(up, extra, tokens, cut):
    [about] = up.ask("/v1/rerank", {"query": "abc", "documents": [LONG], **extra}).json["meta"]["documents"]
    assert (about["tokens"], about["truncated"]) == (tokens, cut)


def test_relevant_spans_are_passages_with_their_own_scores(up, library):
    first = "Scouts dance for the place they found in the wood."
    second = "The swarm follows the liveliest dance of them all."
    text = f"{first}\n\n  {second}"
    options = {"mode": "enabled", "threshold": 0.0, "max_spans": 5}
    body = up.ask("/v2/rerank", {"query": QUERY, "documents": [text], "relevant_spans": options}).json
    want = sorted(((sigmoid(float(library.score([(QUERY, part)])[0])), part) for part in (first, second)), reverse=True)
    got = body["results"][0]["relevant_spans"]
    assert [(one["score"], text[one["start"] : one["end"]]) for one in got] == want
    capped = up.ask("/v2/rerank", {"query": QUERY, "documents": [text], "relevant_spans": {"max_spans": 1}}).json
    assert capped["results"][0]["relevant_spans"] == got[:1]
    off = {"query": QUERY, "documents": [text], "relevant_spans": {"mode": "disabled"}}
    assert "relevant_spans" not in up.ask("/v2/rerank", off).json["results"][0]


def test_spans_count_characters_as_python_does(up):
    text = "🐝🐝🐝 the bees are dancing over the meadow now. Ünïcödé wörds fóllów the bees in the second sentence."
    body = up.ask("/v1/rerank", {"query": "bees", "documents": [text], "relevant_spans": True}).json
    parts = {text[one["start"] : one["end"]] for one in body["results"][0]["relevant_spans"]}
    assert parts == {
        "🐝🐝🐝 the bees are dancing over the meadow now.",
        "Ünïcödé wörds fóllów the bees in the second sentence.",
    }


def test_a_thousand_documents(up, library):
    documents = [f"bees {i}" for i in range(1000)]
    body = up.ask("/v1/rerank", {"query": "bees", "documents": documents, "top_n": 5}).json
    want = [(one.index, one.score) for one in library.rank("bees", documents, top_n=5)]
    assert [(one["index"], one["relevance_score"]) for one in body["results"]] == want
    assert body["meta"]["billed_units"]["search_units"] == 10


# What else is asked for ------------------------------------------------------------------------------------------


def test_models_are_listed_for_openai_cohere_and_infinity_at_once(up):
    body = up.ask("/v1/models").json
    assert body["object"] == "list"
    assert body["data"] == body["models"]
    [entry] = body["data"]
    assert (entry["id"], entry["object"], entry["owned_by"]) == ("bees", "model", "turborank")
    assert entry["endpoints"] == ["rerank"]
    assert entry["context_length"] == 512
    assert entry["stats"] == {"queue_fraction": 0.0}
    assert up.ask("/v1/models/bees").json["id"] == "bees"
    assert up.ask("/v1/models/other").status == 404


def test_info_is_what_tei_clients_read(up):
    body = up.ask("/info").json
    assert body["model_id"] == "bees"
    assert body["max_input_length"] == 512
    assert "reranker" in body["model_type"]


@pytest.mark.parametrize("path", ["//v1//rerank", "/v1/rerank/"])
def test_extra_slashes_of_base_urls_are_accepted(up, path):
    assert up.ask(path, RERANK).status == 200


def test_request_ids_are_kept_when_sane_and_made_otherwise(up):
    assert up.ask("/health", headers={"x-request-id": "abc-1"}).headers["x-request-id"] == "abc-1"
    assert up.ask("/health", headers={"x-request-id": "a b"}).headers["x-request-id"].startswith("req_")
