from probe import main, own_top, strings
from rerankers import Reranker


def way(kind, path):
    def rank(call):
        ranker = Reranker(
            call.model, model_type=kind, api_provider=kind, api_key=call.key, url=call.base + path, verbose=0
        )
        texts = strings(own_top(call)).documents
        found = ranker.rank(call.query, texts, doc_ids=list(range(len(texts))))
        return [(one.document.doc_id, one.score) for one in found.top_k(call.top_n or len(texts))]

    return rank


main(
    {
        "jina": way("jina", "/v1/rerank"),
        "cohere": way("cohere", "/v2/rerank"),
        "voyage": way("voyage", "/v1/rerank"),
        "tei": way("text-embeddings-inference", "/rerank"),
    },
    page="rerankers.md",
)
