import cohere
from cohere.core.request_options import RequestOptions
from probe import main

ONCE = RequestOptions(max_retries=0)


def given(call):
    return {"model": call.model, "query": call.query, "documents": call.documents, "top_n": call.top_n}


def read(response):
    assert response.id
    assert response.meta.tokens.input_tokens > 0
    return [(one.index, one.relevance_score) for one in response.results]


def v2(call):
    return read(cohere.ClientV2(call.key, base_url=call.base).rerank(**given(call), request_options=ONCE))


def v2_under_v1(call):
    return read(cohere.ClientV2(call.key, base_url=f"{call.base}/v1").rerank(**given(call), request_options=ONCE))


def v1(call):
    response = cohere.Client(call.key, base_url=call.base).rerank(
        **given(call), return_documents=True, max_chunks_per_doc=None, request_options=ONCE
    )
    assert all(one.document.text == call.documents[one.index] for one in response.results)
    return read(response)


def v1_mappings(call):
    documents = [{"text": text, "id": str(place)} for place, text in enumerate(call.documents)]
    asked = {**given(call), "documents": documents}
    response = cohere.Client(call.key, base_url=call.base).rerank(**asked, rank_fields=["text"], request_options=ONCE)
    return read(response)


main({"v2": v2, "v2_under_v1": v2_under_v1, "v1": v1, "v1_mappings": v1_mappings})
