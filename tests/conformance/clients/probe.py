"""Runs in a client's own environment: every case through each of the client's ranking functions, results as JSON.

A way to rank takes a Call and returns [(index, score or None)], best first, or raises whatever the client raises, or
Cannot for what the client has no means to say. The snippets of the client's page in docs/clients are ways as well: each
block is run as it stands there, but with the server's address, key and model, and what it prints is its ranking.
"""

import ast
import io
import json
import re
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import NamedTuple

PAGES = Path(__file__).resolve().parents[3] / "docs" / "clients"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
PRINTED = re.compile(r"^(\d+) (\S+)", re.MULTILINE)


class Call(NamedTuple):
    base: str
    key: str
    model: str
    query: str
    documents: list
    top_n: int | None


class Cannot(Exception):
    """The client cannot express this case."""


def plain(call):
    """For clients that accept only strings as documents and require a number of results."""
    if call.top_n is None:
        raise Cannot("its number of results is no null")
    return strings(call)


def strings(call):
    if not all(isinstance(document, str) for document in call.documents):
        raise Cannot("its documents are strings")
    return call


def own_top(call):
    """For clients that cut the list themselves and send no number of results; raises Cannot where that differs."""
    if call.top_n is not None and call.top_n < 1:
        raise Cannot("it sends no number of results")
    return call


def attempt(rank, call):
    started = time.monotonic()
    try:
        ranking = [[index, score] for index, score in rank(call)]
        return {"ranking": ranking, "seconds": time.monotonic() - started}
    except Cannot as reason:
        return {"cannot": str(reason)}
    except BaseException as error:
        chain, texts = error, []
        while chain is not None and len(texts) < 5:
            texts.append(f"{type(chain).__name__}: {chain}")
            chain = chain.__cause__ or chain.__context__
        response = getattr(error, "response", None)
        headers = getattr(response, "headers", None) or getattr(error, "headers", None) or {}
        return {
            "error": " <- ".join(texts)[:3000],
            "seconds": time.monotonic() - started,
            "type": type(error).__name__,
            "status": getattr(error, "status_code", None) or getattr(error, "http_status", None),
            "headers": {str(name).lower(): str(value) for name, value in dict(headers).items()},
        }


def snippets(page, call):
    """Block number -> the ranking it prints. Assignments of names that a reader replaces are replaced here, too."""
    ours = {"BASE": call.base, "KEY": call.key, "MODEL": call.model, "query": call.query, "documents": call.documents}
    scope, found = dict(ours), {}
    for number, block in enumerate(BLOCK.findall((PAGES / page).read_text(encoding="utf-8")), 1):
        tree = ast.parse(block)
        tree.body = [node for node in tree.body if not (isinstance(node, ast.Assign) and _names(node) <= set(ours))]

        def run(call, tree=tree):
            output = io.StringIO()
            with redirect_stdout(output):
                exec(compile(tree, page, "exec"), scope)
            return [
                (int(index), None if score == "None" else float(score))
                for index, score in PRINTED.findall(output.getvalue())
            ]

        found[f"{page}#{number}"] = attempt(run, call)
    return found


def _names(node):
    targets = [part for target in node.targets for part in getattr(target, "elts", [target])]
    return {getattr(target, "id", None) for target in targets}


def main(ways, page=None, patient=None):
    """``ways``: name -> function; ``patient``: one that asks twice in a hurry and leaves it to the client to wait.

    The cases come on standard input, what happened goes to standard output.
    """
    cases = {name: Call(**call) for name, call in json.load(sys.stdin).items()}
    with redirect_stdout(io.StringIO()):
        hurry = cases.pop("patience")
        report = {name: {case: attempt(rank, call) for case, call in cases.items()} for name, rank in ways.items()}
        if patient:
            report["patient"] = {"patience": attempt(patient, hurry)}
        printed = snippets(page, cases["success"]) if page else {}
    sys.stdout.write(json.dumps({"ways": report, "snippets": printed}) + "\n")
