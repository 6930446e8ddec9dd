import cohere
from cohere.core.request_options import RequestOptions
from probe import main, strings

ONCE = RequestOptions(max_retries=0)


def given(call):
    return {"model": call.model, "query": call.query, "documents": call.documents, "top_n": call.top_n}


def read(response):
    assert response.id
    assert response.meta.tokens.input_tokens > 0
    return [(one.index, one.relevance_score) for one in response.results]


def v2(call):
    return read(cohere.ClientV2(call.key, base_url=call.base).rerank(**given(strings(call)), request_options=ONCE))


def v2_under_v1(call):
    client = cohere.ClientV2(call.key, base_url=f"{call.base}/v1")
    return read(client.rerank(**given(strings(call)), max_tokens_per_doc=None, request_options=ONCE))


def v1(call):
    response = cohere.Client(call.key, base_url=call.base).rerank(
        **given(call), return_documents=True, max_chunks_per_doc=None, request_options=ONCE
    )
    for one in response.results:
        document = call.documents[one.index]
        assert one.document.text == (document if isinstance(document, str) else document["text"])
    return read(response)


def v1_fields(call):
    """Documents as mappings, with ``rank_fields``."""
    documents = [one if isinstance(one, dict) else {"text": one, "id": "7"} for one in call.documents]
    asked = {**given(call), "documents": documents}
    fields = ["title", "text"]
    return read(cohere.Client(call.key, base_url=call.base).rerank(**asked, rank_fields=fields, request_options=ONCE))


def patient(call):
    """Two requests; the second exceeds the rate limit, and the client's retry waits for Retry-After."""
    client = cohere.ClientV2(call.key, base_url=call.base)
    client.rerank(**given(strings(call)), request_options=ONCE)
    return read(client.rerank(**given(call), request_options=RequestOptions(max_retries=1)))


main({"v2": v2, "v2_under_v1": v2_under_v1, "v1": v1, "v1_fields": v1_fields}, patient=patient, page="cohere.md")
