"""Start the service, wait until it is ready, send a rerank request, stop it.

Needs pip install 'turborank[serve]'. Any Jina, Cohere, Voyage, vLLM or TEI client can send the request instead.

python examples/serve_and_call.py
"""

import json
import socket
import subprocess
import sys
import time
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen

REQUEST = {
    "query": "how do bees choose a home?",
    "documents": ["Scout bees dance for the hollow tree that they like best.", "Bread rises because yeast makes gas."],
    "top_n": 1,
}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def post(url: str, body: object) -> Any:
    request = Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urlopen(request, timeout=60) as response:
        return json.load(response)


def wait_until_ready(url: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            urlopen(f"{url}/ready", timeout=5).close()
            return
        except (URLError, ConnectionError):  # not listening yet, or 503 while the model loads
            time.sleep(0.1)
    raise TimeoutError(f"expected {url}/ready to answer within {seconds} seconds")


def main() -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "turborank", "serve", "--port", str(port)]
    server = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        wait_until_ready(url)
        answer = post(f"{url}/v1/rerank", REQUEST)
        for result in answer["results"]:
            print(f"document {result['index']}  score {result['relevance_score']:.3f}")
        print(f"{answer['usage']['total_tokens']} tokens")
    finally:
        server.terminate()
        server.wait(30)


if __name__ == "__main__":
    main()
