"""The server most people write first: sentence-transformers behind FastAPI. A peer of bench/serve.py.

python bench/serve_minimal.py FOLDER PORT
"""

import sys

import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel
from sentence_transformers import CrossEncoder


class Request(BaseModel):
    """As Jina's and Cohere's."""

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
