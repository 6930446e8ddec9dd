from probe import main
from rerankers import Reranker


def way(kind, path):
    def rank(call):
        ranker = Reranker(
            call.model, model_type=kind, api_provider=kind, api_key=call.key, url=call.base + path, verbose=0
        )
        found = ranker.rank(call.query, call.documents, doc_ids=list(range(len(call.documents))))
        return [(one.document.doc_id, one.score) for one in found.top_k(call.top_n)]

    return rank


main(
    {
        "jina": way("jina", "/v1/rerank"),
        "cohere": way("cohere", "/v2/rerank"),
        "voyage": way("voyage", "/v1/rerank"),
        "tei": way("text-embeddings-inference", "/rerank"),
    }
)
