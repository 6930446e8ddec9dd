import time

from llama_index.core.schema import NodeWithScore, TextNode
from llama_index.postprocessor.cohere_rerank import CohereRerank
from llama_index.postprocessor.jinaai_rerank import JinaRerank
from llama_index.postprocessor.tei_rerank import TextEmbeddingInference
from probe import main, own_top, plain

# Where the key is spent, cohere's client waits and tries again, twice for a minute; this class cannot tell it not to.
time.sleep = lambda seconds: None


def ranked(postprocessor, call):
    nodes = [NodeWithScore(node=TextNode(text=text, id_=str(place))) for place, text in enumerate(call.documents)]
    return [(int(one.node.node_id), one.score) for one in postprocessor.postprocess_nodes(nodes, query_str=call.query)]


def jina(call):
    return ranked(JinaRerank(plain(call).top_n, call.model, f"{call.base}/v1", call.key), call)


def cohere(call):
    return ranked(CohereRerank(plain(call).top_n, call.model, call.key, base_url=call.base, max_retries=0), call)


def tei(call):
    return ranked(TextEmbeddingInference(own_top(plain(call)).top_n, call.base, auth_token=f"Bearer {call.key}"), call)


main({"jina": jina, "cohere": cohere, "tei": tei}, page="llamaindex.md")
