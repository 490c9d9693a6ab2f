"""An HTTP server with OpenAI's chat completions and vLLM's routes for new weights, which samples with our own engine.

It reads a weights directory as `fastvst.vllm_plugin` does, and can be old, fail, or forget what it has loaded.
"""

from __future__ import annotations

import base64
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from PIL import Image

from fastvst.data import Processor, Sample
from fastvst.model import Qwen25VL
from fastvst.rollout import Engine, SamplingParams
from fastvst.vllm_plugin import read_checked


class Server(ThreadingHTTPServer):
    """
    Attributes:
        shift: added to the log-probabilities, as if its weights were old.
        extra: tokens that it finds in every prompt.
        status: of every answer.
        key: the API key that it wants.
        breaks_after: completions requests until it answers 500; None = never.
        forgets: from its first answer on its weights are not those that it was given, as after a restart.
        bodies: of the completions requests; routes: the other POSTs, with their bodies.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        processor = Processor.from_pretrained(folder, max_pixels=56 * 56, max_seq_len=128)
        self.engine = Engine(Qwen25VL.from_pretrained(folder), processor, memory=1 << 24)
        self.config = json.loads((folder / "config.json").read_text())
        self.lock = threading.Lock()
        self.bodies: list[dict[str, Any]] = []
        self.routes: list[tuple[str, Any]] = []
        self.keys: list[str] = []
        self.shift = 0.0
        self.extra: list[int] = []
        self.status = 200
        self.key = ""
        self.breaks_after: int | None = None
        self.forgets = False
        self.version = "default"
        self.active = False
        self.max_model_len: int | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def start(self) -> Server:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def stop(self) -> None:
        self.shutdown()
        self.server_close()

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

    def control(self, route: str, body: Any) -> tuple[int, Any]:
        """vLLM's routes, with its rules of order."""
        with self.lock:
            self.routes.append((route, body))
            if route == "/start_weight_update":
                if self.active:
                    return 500, {"error": "start_weight_update called while a weight update is already active"}
                self.active = True
            elif route == "/update_weights":
                if not self.active:
                    return 500, {"error": "start_weight_update must be called before update_weights"}
                try:
                    read_checked(body["update_info"]["path"], self.config)
                    model = Qwen25VL.from_pretrained(body["update_info"]["path"])
                except (OSError, ValueError) as error:
                    self.active = False
                    return 500, {"error": str(error)}
                self.engine = Engine(model, self.engine.processor, memory=1 << 24)
            elif route == "/finish_weight_update":
                if not self.active:
                    return 500, {"error": "finish_weight_update called without a matching start_weight_update"}
                self.active = False
                if body.get("weight_version"):
                    self.version = body["weight_version"]
        return 200, {}


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.keys.append(self.headers.get("Authorization", ""))
        model = {"id": "mine", "max_model_len": self.server.max_model_len}
        version = "default" if self.server.forgets and self.server.bodies else self.server.version
        found = {
            "/v1/models": {"data": [model, {"id": "other"}]},
            "/weight_info": {"weight_version": version},
            "/get_world_size": {"world_size": 2},
        }
        self.reply(200, found.get(self.path, {}))

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server.keys.append(self.headers.get("Authorization", ""))
        if server.key and self.headers.get("Authorization") != f"Bearer {server.key}":
            self.reply(401, {"error": f"wrong key: {self.headers.get('Authorization')}"})
        elif self.path != "/v1/chat/completions":
            self.reply(*server.control(self.path, body))
        elif server.breaks_after is not None and len(server.bodies) >= server.breaks_after:
            self.reply(400, {"error": "broken"})
        else:
            self.reply(server.status, server.complete(body) if server.status == 200 else {"error": "no such model"})

    def reply(self, status: int, content: Any) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments: object) -> None:
        pass
