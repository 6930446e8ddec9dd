import httpx2
import openai
from probe import main


def client(call):
    return openai.OpenAI(base_url=f"{call.base}/v1", api_key=call.key, max_retries=0)


def body(call):
    return {"model": call.model, "query": call.query, "documents": call.documents, "top_n": call.top_n}


def post(call):
    response = client(call).post("/rerank", cast_to=httpx2.Response, body=body(call))
    return [(one["index"], one["relevance_score"]) for one in response.json()["results"]]


def retried(call):
    """With its own retries, which honour Retry-After; only the refusals differ from the way above."""
    response = client(call).with_options(max_retries=1).post("/rerank", cast_to=httpx2.Response, body=body(call))
    return [(one["index"], one["relevance_score"]) for one in response.json()["results"]]


def models(call):
    """The list of models, then one by name, then the ranking."""
    listed = [model.id for model in client(call).models.list()]
    assert listed, listed
    assert client(call).models.retrieve(call.model).object == "model"
    return post(call)


main({"post": post, "models": models})
