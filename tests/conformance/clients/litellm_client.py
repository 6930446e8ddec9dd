import litellm
from probe import main, strings


def way(provider, path="", own=lambda call: call, **extra):
    def rank(call):
        response = litellm.rerank(
            model=f"{provider}/{call.model}", query=call.query, documents=own(call).documents, top_n=call.top_n,
            api_base=call.base + path, api_key=call.key, max_retries=0, **extra,
        )  # fmt: skip
        return [(one["index"], one["relevance_score"]) for one in response.results]

    return rank


main(
    {
        "jina_ai": way("jina_ai", return_documents=True),
        "cohere": way("cohere"),
        "infinity": way("infinity", "/infinity", return_documents=True),
        "hosted_vllm": way("hosted_vllm"),
        "huggingface": way("huggingface", own=strings),
        "voyage": way("voyage", "/voyage", own=strings),
    },
    page="litellm.md",
)
