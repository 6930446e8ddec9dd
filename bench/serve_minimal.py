"""A minimal server, sentence-transformers behind FastAPI, as a peer of bench/serve.py.

python bench/serve_minimal.py FOLDER PORT
"""

import sys

import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel
from sentence_transformers import CrossEncoder


class Request(BaseModel):
    """A request body in Jina's and Cohere's format."""

    query: str
    documents: list[str]


def build(folder: str) -> FastAPI:
    """The application around a cross-encoder."""
    model, app = CrossEncoder(folder), FastAPI()

    @app.post("/v1/rerank")
    def rerank(request: Request) -> dict[str, list[dict[str, float]]]:
        ranked = model.rank(request.query, request.documents)
        return {"results": [{"index": one["corpus_id"], "relevance_score": float(one["score"])} for one in ranked]}

    return app


if __name__ == "__main__":
    uvicorn.run(build(sys.argv[1]), port=int(sys.argv[2]), log_level="warning")
