"""RL steps on completions of an HTTP server with OpenAI's API, which samples from its own copy of the model."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fastvst.config import ConfigError
from fastvst.data import Processor, Sample
from fastvst.model import Qwen25VL
from fastvst.rl.rollouts import served_model
from fastvst.rollout import Engine, RolloutError, SamplingParams
from rl_run import REWARD, load_rl, rl_arguments, write_questions
from small_run import write_model

rl = load_rl()


class Server(ThreadingHTTPServer):
    """Samples with an engine; `shift` is added to the log-probabilities, as if its weights were old."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        processor = Processor.from_pretrained(folder, max_pixels=56 * 56, max_seq_len=128)
        self.engine = Engine(Qwen25VL.from_pretrained(folder), processor, memory=1 << 24)
        self.lock = threading.Lock()
        self.bodies = []
        self.shift = 0.0
        self.extra: list[int] = []
        self.status = 200

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        def part(given: dict[str, Any]) -> dict[str, Any]:
            if given["type"] == "text":
                return given
            data = given["image_url"]["url"].split(",")[1]
            limits = {name: body["mm_processor_kwargs"][name] for name in ("min_pixels", "max_pixels")}
            return {"type": "image", "image": Image.open(io.BytesIO(base64.b64decode(data))), **limits}

        messages = [{"role": m["role"], "content": [part(p) for p in m["content"]]} for m in body["messages"]]
        params = SamplingParams(
            n=body["n"],
            temperature=body["temperature"],
            top_p=body["top_p"],
            max_tokens=body["max_tokens"],
            seed=body["seed"],
        )
        sample = Sample.from_messages(messages)
        with self.lock:
            self.bodies.append(body)
            (rollouts,) = self.engine.generate([sample], params)
        assert self.engine.processor is not None
        prompt = self.engine.processor.encode(sample, add_generation_prompt=True).tokens.tolist()
        choices = []
        for index, r in enumerate(rollouts):
            pairs = zip(r.tokens, r.logprobs, strict=True)
            content = [{"token": f"token_id:{token}", "logprob": value + self.shift} for token, value in pairs]
            choices.append(
                {
                    "index": index,
                    "message": {"content": r.text},
                    "logprobs": {"content": content},
                    "finish_reason": r.finish_reason,
                }
            )
        return {"choices": choices, "prompt_token_ids": [*prompt, *self.extra]}


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.reply(200, {"data": [{"id": "mine"}, {"id": "other"}]} if self.path == "/v1/models" else {})

    def do_POST(self) -> None:
        server: Server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.reply(server.status, server.complete(body) if server.status == 200 else {"error": "no such model"})

    def reply(self, status: int, content: dict[str, Any]) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    folder = tmp_path_factory.mktemp("parts")
    (folder / "mine.py").write_text(REWARD)
    return write_questions(folder / "data"), write_model(folder / "model"), folder / "mine.py"


@pytest.fixture
def server(parts: tuple[Path, Path, Path]) -> Iterator[Server]:
    made = Server(parts[1])
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield made
    made.shutdown()
    made.server_close()


def run(server: Server, parts: tuple[Path, Path, Path], out: Path, *more: str) -> list[dict[str, Any]]:
    rl.main(rl_arguments(out, *parts, f"sampling.base_url={server.url}", "update.importance=token", *more))
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_a_step_on_the_completions_of_a_server(server: Server, parts: tuple[Path, Path, Path], tmp_path: Path) -> None:
    first, second = run(server, parts, tmp_path / "run", "steps=2")
    sent = [p["type"] for b in server.bodies for m in b["messages"] for p in m["content"]]
    assert "image_url" in sent and {b["model"] for b in server.bodies} == {"mine"} and server.bodies[0]["n"] == 4
    assert len(server.bodies[0]["logit_bias"]) == 2
    # At step 0 the server has the trainer's weights, so images and template give equal log-probabilities.
    assert first["sampler_gap_max"] < 1e-4 and first["grad_norm"] > 0 and first["answer_tokens"] > 0
    assert second["sampler_gap_max"] > 1e-3, "the server still has the old weights"
    groups = [json.loads(line) for line in (tmp_path / "run" / "rollouts.jsonl").read_text().splitlines()]
    assert len(groups[0]["answers"]) == 4 and any(a["text"] for g in groups for a in g["answers"])


def test_importance_weights_use_the_servers_log_probabilities(
    server: Server, parts: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    plain = run(server, parts, tmp_path / "plain", "steps=1", "optimizer.clip=1e9")
    server.shift = 0.5  # the server reports exp(0.5) times the probability: every weight is exp(-0.5)
    (shifted,) = run(server, parts, tmp_path / "shifted", "steps=1", "optimizer.clip=1e9")
    ratio = shifted["grad_norm"] / plain[0]["grad_norm"]
    assert abs(ratio - 0.60653) < 1e-3 and abs(shifted["sampler_gap"] - 0.5) < 1e-3


def test_the_served_model_is_the_first_in_the_servers_list(server: Server) -> None:
    assert served_model(server.url) == served_model(server.url + "/") == "mine"
    for wrong in (server.url.removesuffix("/v1"), "http://127.0.0.1:9/v1"):
        with pytest.raises(RolloutError, match=r"/models does not list a model .*sampling.base_url"):
            served_model(wrong)


def test_another_prompt_ends_the_run_and_names_both_lengths(
    server: Server, parts: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    server.extra = [11]
    with pytest.raises(RolloutError, match=r"small/.* has \d+ tokens on http.* and \d+ in the trainer"):
        run(server, parts, tmp_path / "run", "steps=1")


def test_top_p_is_refused_with_a_server(server: Server, parts: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """Its log-probabilities are those of the kept tokens: the importance ratio of an unchanged policy is below 1."""
    with pytest.raises(ConfigError, match=r"sampling\.top_p 0\.7.*would not be 1"):
        run(server, parts, tmp_path / "run", "steps=1", "sampling.top_p=0.7")


def test_a_refused_request_ends_the_run_and_names_the_prompt(
    server: Server, parts: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    server.status = 404
    with pytest.raises(RolloutError, match="small/.*chat/completions answers 404: .*no such model"):
        run(server, parts, tmp_path / "run", "steps=1")
