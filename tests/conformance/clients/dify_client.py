from dify_plugin.interfaces.model.openai_compatible.rerank import OAICompatRerankModel
from probe import main, strings


def openai_compatible(call):
    """Dify rescales the scores of each answer to 0 … 1, so only the order is compared."""
    credentials = {"endpoint_url": f"{call.base}/v1", "api_key": call.key, "endpoint_model_name": call.model}
    ranker = OAICompatRerankModel(model_schemas=[])
    found = ranker._invoke(call.model, credentials, call.query, strings(call).documents, top_n=call.top_n)
    return [(one.index, None) for one in found.docs]


main({"openai_compatible": openai_compatible})
