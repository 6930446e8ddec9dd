import httpx2
import openai
from probe import main


def client(call, retries=0):
    return openai.OpenAI(base_url=f"{call.base}/v1", api_key=call.key, max_retries=retries)


def body(call):
    return {"model": call.model, "query": call.query, "documents": call.documents, "top_n": call.top_n}


def read(response):
    return [(one["index"], one["relevance_score"]) for one in response.json()["results"]]


def post(call):
    return read(client(call).post("/rerank", cast_to=httpx2.Response, body=body(call)))


def models(call):
    """The list of models, then one by name, then the ranking."""
    listed = [model.id for model in client(call).models.list()]
    assert listed, listed
    assert client(call).models.retrieve(call.model).object == "model"
    return post(call)


def patient(call):
    """Two requests; the second exceeds the rate limit, and the client's retry waits for Retry-After."""
    asking = client(call, retries=1)
    asking.post("/rerank", cast_to=httpx2.Response, body=body(call))
    return read(asking.post("/rerank", cast_to=httpx2.Response, body=body(call)))


main({"post": post, "models": models}, patient=patient, page="openai.md")
