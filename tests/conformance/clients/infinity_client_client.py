from infinity_client import Client
from infinity_client.api.default import rerank
from infinity_client.models import HTTPValidationError, RerankInput
from langchain_community.document_compressors.infinity_rerank import InfinityRerank
from probe import main, own_top, plain, strings


def server(call):
    headers = {"Authorization": f"Bearer {call.key}"}
    return Client(f"{call.base}/infinity", headers=headers, raise_on_unexpected_status=True)


def client(call):
    body = RerankInput(call.query, strings(call).documents, model=call.model, top_n=call.top_n, return_documents=True)
    answer = rerank.sync(client=server(call), body=body)
    if isinstance(answer, HTTPValidationError):
        raise ValueError(answer.detail[0].msg)
    return [(one.index, one.relevance_score) for one in answer.results]


def langchain(call):
    ranker = InfinityRerank(client=server(own_top(plain(call))), model=call.model, top_n=call.top_n)
    return [(one["index"], one["relevance_score"]) for one in ranker.rerank(call.documents, call.query)]


main({"client": client, "langchain": langchain}, page="infinity.md")
