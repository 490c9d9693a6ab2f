"""The client against a local HTTP server that can also refuse and fail."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image

from fastvst.data.sample import Sample
from fastvst.rollout import RolloutError, SamplingParams
from fastvst.rollout.openai_client import connect

RED = Image.new("RGB", (30, 20), (255, 0, 0))


class Server(ThreadingHTTPServer):
    """Keeps the requests; `failures` are (status, headers) of its first responses, before it works."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.bodies: list[dict] = []
        self.headers: list[dict] = []
        self.failures: list[tuple[int, dict]] = []
        self.broken_json = 0
        self.token = "token_id:{}"
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        server: Server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.bodies.append(body)
            server.headers.append(dict(self.headers))
            failure = server.failures.pop(0) if server.failures else None
            broken = server.broken_json > 0
            server.broken_json -= broken
        if failure:
            self._send(failure[0], b'{"error": "not now"}', failure[1])
            return
        question = body["messages"][-1]["content"][-1]["text"]
        choices = [
            {
                "index": i,
                "message": {"content": f"{question}-{i}"},
                "finish_reason": "length" if i else "stop",
                "logprobs": {"content": [{"token": server.token.format(10 + i), "logprob": -0.5 * i}]},
            }
            for i in reversed(range(body["n"]))
        ]
        self._send(200, b"<html>" if broken else json.dumps({"choices": choices}).encode(), {})

    def _send(self, status: int, data: bytes, headers: dict) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    thread = threading.Thread(target=made.serve_forever, daemon=True)
    thread.start()
    yield made
    made.shutdown()
    made.server_close()


def ask(text: str, image: Image.Image | None = None, kind: str = "qa") -> Sample:
    parts = [{"type": "image", "image": image}] if image else []
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]
    return Sample.from_messages([*messages, {"role": "assistant", "content": "secret"}], id=text, kind=kind)


def test_completions_come_in_order_with_tokens_and_logprobs(server: Server) -> None:
    engine = connect(server.url, model="m", api_key="k")
    seen: list[int] = []
    params = SamplingParams(n=2, temperature=0.7, top_k=5, max_tokens=9, stop="END", seed=3)
    found = engine.generate([ask(f"q{i}") for i in range(7)], params, progress=lambda i, r: seen.append(i))
    assert [[r.text for r in many] for many in found] == [[f"q{i}-0", f"q{i}-1"] for i in range(7)]
    assert [(r.tokens, r.logprobs, r.finish_reason) for r in found[0]] == [
        ([10], [0.0], "stop"),
        ([11], [-0.5], "length"),
    ]
    assert sorted(seen) == list(range(7))
    body = server.bodies[0]
    sent = {
        k: body[k] for k in ("model", "n", "temperature", "top_p", "top_k", "max_tokens", "stop", "seed", "logprobs")
    }
    assert sent == {
        "model": "m",
        "n": 2,
        "temperature": 0.7,
        "top_p": 1.0,
        "top_k": 5,
        "max_tokens": 9,
        "stop": ["END"],
        "seed": 3,
        "logprobs": True,
    }
    assert server.headers[0]["Authorization"] == "Bearer k"
    assert "secret" not in json.dumps(server.bodies)


def test_images_and_system_prompts_are_sent(server: Server) -> None:
    connect(server.url).generate([ask("what?", RED, kind="thought_spatial")])
    system, user = server.bodies[0]["messages"]
    assert system["role"] == "system" and "<think>" in system["content"][0]["text"]
    head, data = user["content"][0]["image_url"]["url"].split(",")
    assert head == "data:image/png;base64"
    assert Image.open(io.BytesIO(base64.b64decode(data))).tobytes() == RED.tobytes()


def test_temporary_failures_are_retried(server: Server) -> None:
    server.failures = [(503, {"Retry-After": "0.01"}), (429, {"Retry-After": "0.01"})]
    ((rollout,),) = connect(server.url).generate([ask("q")])
    assert rollout.text == "q-0" and len(server.bodies) == 3
    server.broken_json = 1
    ((rollout,),) = connect(server.url).generate([ask("q")])
    assert rollout.text == "q-0" and len(server.bodies) == 5


def test_errors_name_prompt_and_server(server: Server) -> None:
    server.failures = [(400, {})]
    with pytest.raises(RolloutError, match="memory/bad: .*chat/completions answers 400: .*not now"):
        connect(server.url).generate([ask("bad")])
    assert len(server.bodies) == 1, "a refusal is not retried"
    server.failures = [(200, {"Content-Length": "1000"})]  # it was killed while it answered
    assert connect(server.url).generate([ask("q")])
    server.failures = [(200, {"Content-Length": "1000"})]
    with pytest.raises(RolloutError, match="does not answer .*IncompleteRead.* tried 1 times"):
        connect(server.url, retries=0).generate([ask("q")])
    server.failures = [(500, {"Retry-After": "0"})] * 3
    with pytest.raises(RolloutError, match="answers 500.*tried 3 times"):
        connect(server.url, retries=2).generate([ask("q")])
    with pytest.raises(RolloutError, match="does not answer .*tried 1 times"):
        connect("http://127.0.0.1:9/v1", retries=0).generate([ask("q")])
    server.token = "word{}"
    with pytest.raises(RolloutError, match=r"the text of a token \('word10'\) instead of its id"):
        connect(server.url).generate([ask("q")])
    with pytest.raises(ValueError, match=r"unknown server options \['port'\]"):
        connect(server.url, port=3)
