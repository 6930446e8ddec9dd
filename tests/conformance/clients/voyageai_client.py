import voyageai
from probe import main, strings


def rerank(call):
    client = voyageai.Client(api_key=call.key, base_url=f"{call.base}/v1")
    answer = client.rerank(call.query, strings(call).documents, model=call.model, top_k=call.top_n)
    assert answer.total_tokens > 0
    assert all(one.document == call.documents[one.index] for one in answer.results)
    return [(one.index, one.relevance_score) for one in answer.results]


main({"rerank": rerank}, page="voyageai.md")
