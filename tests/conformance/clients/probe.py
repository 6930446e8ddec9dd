"""Runs inside a client's own environment: the same cases through each of its ways to rank, what happened as JSON.

A way to rank takes a Call and returns [(index, score or None)], best first, or raises whatever the client raises.
"""

import io
import json
import sys
from contextlib import redirect_stdout
from typing import NamedTuple


class Call(NamedTuple):
    base: str
    key: str
    model: str
    query: str
    documents: list
    top_n: int


def attempt(rank, call):
    try:
        return {"ranking": [[index, score] for index, score in rank(call)]}
    except BaseException as error:
        chain, texts = error, []
        while chain is not None and len(texts) < 5:
            texts.append(f"{type(chain).__name__}: {chain}")
            chain = chain.__cause__ or chain.__context__
        response = getattr(error, "response", None)
        headers = getattr(response, "headers", None) or getattr(error, "headers", None) or {}
        return {
            "error": " <- ".join(texts)[:3000],
            "type": type(error).__name__,
            "status": getattr(error, "status_code", None) or getattr(error, "http_status", None),
            "headers": {str(name).lower(): str(value) for name, value in dict(headers).items()},
        }


def main(ways):
    """``ways``: name -> function. The cases come on standard input, what happened goes to standard output."""
    cases = json.load(sys.stdin)
    noise = io.StringIO()
    with redirect_stdout(noise):
        report = {
            name: {case: attempt(rank, Call(**call)) for case, call in cases.items()} for name, rank in ways.items()
        }
    sys.stdout.write(json.dumps(report) + "\n")
