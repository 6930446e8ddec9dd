import time

import langchain_community.document_compressors.jina_rerank as jina_module
from langchain_cohere import CohereRerank
from langchain_community.document_compressors import JinaRerank
from langchain_core.documents import Document
from langchain_voyageai import VoyageAIRerank
from probe import main, strings

# Where the key is spent, cohere's client waits and tries again, twice for a minute; this class cannot tell it not to.
time.sleep = lambda seconds: None


def cohere(call):
    ranker = CohereRerank(base_url=call.base, cohere_api_key=call.key, model=call.model, top_n=call.top_n)
    return [(one["index"], one["relevance_score"]) for one in ranker.rerank(call.documents, call.query)]


def jina(call):
    jina_module.JINA_API_URL = f"{call.base}/v1/rerank"  # it has no base_url (langchain-community#78)
    ranker = JinaRerank(jina_api_key=call.key, model=call.model, top_n=call.top_n)
    return [(one["index"], one["relevance_score"]) for one in ranker.rerank(call.documents, call.query)]


def voyage(call):
    ranker = VoyageAIRerank(api_key=call.key, base_url=f"{call.base}/v1", model=call.model, top_k=call.top_n)
    texts = strings(call).documents
    documents = [Document(page_content=text, metadata={"place": place}) for place, text in enumerate(texts)]
    found = ranker.compress_documents(documents, call.query)
    return [(one.metadata["place"], one.metadata["relevance_score"]) for one in found]


main({"cohere": cohere, "jina": jina, "voyage": voyage}, page="langchain.md")
