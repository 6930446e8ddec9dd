from haystack import Document
from haystack.utils import Secret
from haystack_integrations.components.rankers.cohere import CohereRanker
from haystack_integrations.components.rankers.jina import JinaRanker
from probe import Cannot, main, plain


def ranked(ranker, call):
    documents = [Document(content=text, meta={"place": place}) for place, text in enumerate(call.documents)]
    found = ranker.run(query=call.query, documents=documents, top_k=call.top_n)["documents"]
    return [(one.meta["place"], one.score) for one in found]


def positive(call):
    if call.top_n is not None and call.top_n < 1:
        raise Cannot("it refuses such numbers itself")
    return plain(call)


def jina(call):
    key = Secret.from_token(call.key)
    return ranked(JinaRanker(call.model, key, base_url=f"{call.base}/v1/rerank"), positive(call))


def cohere(call):
    key = Secret.from_token(call.key)
    return ranked(CohereRanker(call.model, api_key=key, api_base_url=call.base), positive(call))


main({"jina": jina, "cohere": cohere}, page="haystack.md")
