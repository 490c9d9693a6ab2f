"""A server reads the trainer's prompt, token for token, or the client says what differs.

The server here has the published chat template, which does not strip, and its own limits for images, as vLLM has.
"""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastvst.data import Processor, Sample
from fastvst.data.images import smart_resize
from fastvst.rollout import RolloutError
from fastvst.rollout.openai_client import OpenAIEngine, connect
from fastvst.spatial.prompts import camera_line
from fastvst_kernels.sampling.reference import apply_filters_


class Server(ThreadingHTTPServer):
    """Answers with the token ids of the prompt that it has read.

    Attributes:
        trusts: it takes the limits of images from the request.
        ids: it sends token ids.
    """

    def __init__(self, processor: Processor) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.processor = processor
        self.trusts = True
        self.ids = True
        self.bodies: list[dict[str, Any]] = []

    def read(self, body: dict[str, Any]) -> list[int]:
        """The prompt by the published template; an image of w x h has w x h / 28^2 pads."""
        limits = body["mm_processor_kwargs"] if self.trusts else {"min_pixels": 8 * 784, "max_pixels": 12 * 784}
        text = ""
        for message in body["messages"]:
            text += f"<|im_start|>{message['role']}\n"
            for part in message["content"]:
                if part["type"] == "text":
                    text += part["text"]
                    continue
                image = Image.open(io.BytesIO(base64.b64decode(part["image_url"]["url"].split(",")[1])))
                sizes = {name: limits[name] for name in ("min_pixels", "max_pixels")}
                height, width = smart_resize(image.height, image.width, factor=28, **sizes)
                text += f"<|vision_start|>{'<|image_pad|>' * (height * width // 784)}<|vision_end|>"
            text += "<|im_end|>\n"
        text += "<|im_start|>assistant\n"
        return self.processor.tokenizer.encode(text, add_special_tokens=False).ids


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        server: Server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server.bodies.append(body)
        logprobs = {"content": [{"token": "token_id:9", "logprob": 0.0}]}
        choice = {"message": {"content": "a"}, "logprobs": logprobs, "finish_reason": "stop"}
        choices = [{"index": i, **choice} for i in range(body["n"])]
        answer: dict[str, Any] = {"choices": choices}
        if server.ids and body["return_token_ids"]:
            answer["prompt_token_ids"] = server.read(body)
        data = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture(scope="module")
def processor() -> Processor:
    return Processor.preset("tiny", min_pixels=784, max_pixels=20 * 784, max_seq_len=600, fov_base_width=112)


@pytest.fixture
def server(processor: Processor) -> Iterator[Server]:
    made = Server(processor)
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield made
    made.shutdown()
    made.server_close()


def ask(*parts: str | Image.Image, kind: str = "qa", **options: int) -> Sample:
    content: list[dict[str, Any]] = []
    for part in parts:
        text = isinstance(part, str)
        content.append({"type": "text", "text": part} if text else {"type": "image", "image": part, **options})
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "a chair"}]
    return Sample.from_messages(messages, id="x", kind=kind)


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(width).integers(0, 255, (height, width, 3), dtype=np.uint8))


CAMERA = f"{camera_line(320, 240, 280.0, 280.0, 160.0, 120.0)}\nWhere is the chair?"
TURNS = [
    {"role": "system", "content": " You see. "},
    {"role": "user", "content": [{"type": "image", "image": noise(99, 99)}, {"type": "text", "text": "a "}]},
    {"role": "assistant", "content": " b "},
    {"role": "user", "content": " c "},
]
PROMPTS = {
    "text": ask("how far is it?"),
    "blanks": ask("  \n how far  is it? \n\n "),
    "a small image": ask(noise(30, 20), " what? "),
    "a large image": ask(" see", noise(640, 333), "what? "),
    "three images": ask(noise(61, 90), "and", noise(200, 50), " and ", noise(300, 301), "which is nearest?"),
    "an explicit size": ask(noise(100, 80), "what?", resized_width=140, resized_height=56),
    "limits of its own": ask(noise(400, 400), "what?", max_pixels=4 * 784),
    "boxes": ask(noise(320, 240), CAMERA, kind="bbox_3d"),
    "thinking": ask(noise(50, 50), "why? ", kind="thought_spatial"),
    "another turn": Sample.from_messages(TURNS),
}


def engine(server: Server, processor: Processor) -> OpenAIEngine:
    return connect(f"http://127.0.0.1:{server.server_address[1]}/v1", processor, model="m", retries=0)


@pytest.mark.parametrize("name", PROMPTS)
def test_the_server_reads_the_trainers_prompt(server: Server, processor: Processor, name: str) -> None:
    """The client compares the tokens itself, and raises where they differ; here they are compared once more."""
    ((rollout,),) = engine(server, processor).generate([PROMPTS[name]])
    encoded = processor.encode(PROMPTS[name], add_generation_prompt=True)
    assert rollout.tokens == [9] and server.read(server.bodies[0]) == encoded.tokens.tolist()
    sent = [p["image_url"]["url"] for m in server.bodies[0]["messages"] for p in m["content"] if "image_url" in p]
    sizes = [Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))).size for url in sent]
    assert tuple(sizes) == encoded.sizes and (name != "boxes" or encoded.notes == ("fov_unified",))


def test_a_server_with_its_own_limits_is_refused_with_both_lengths(server: Server, processor: Processor) -> None:
    server.trusts = False
    client = engine(server, processor)
    client.generate([PROMPTS["text"]])
    wanted = len(processor.encode(PROMPTS["a large image"], add_generation_prompt=True).tokens)
    with pytest.raises(
        RolloutError, match=rf"memory/x: the prompt has \d+ tokens on http.* and {wanted} in the trainer"
    ):
        client.generate([PROMPTS["a large image"]])
    server.ids = False
    with pytest.raises(RolloutError, match="sends no prompt_token_ids.*return_token_ids"):
        client.generate([PROMPTS["text"]])


def test_a_video_is_refused(server: Server, processor: Processor) -> None:
    content = [{"type": "video", "video": [noise(56, 56)] * 4}, {"type": "text", "text": "what?"}]
    with pytest.raises(RolloutError, match=r"memory/0 has a video.*the trainer's own engine"):
        engine(server, processor).generate([Sample.from_messages([{"role": "user", "content": content}])])
    assert not server.bodies


def test_what_a_bias_and_filters_of_a_server_do_to_log_probabilities() -> None:
    """The server takes placeholders out of the softmax, the trainer leaves them in it: each token gains -log(1 - p).

    With top_p or min_p every kept token gains -log(kept share).
    """
    torch.manual_seed(0)
    logits = torch.randn(6, 50)
    trainer = torch.log_softmax(logits.double(), -1)
    biased = logits.double().index_fill(1, torch.tensor([3, 4]), 0) - 100 * torch.zeros(50).index_fill(
        0, torch.tensor([3, 4]), 1
    )
    gain = torch.log_softmax(biased, -1) - trainer
    others = [i for i in range(50) if i not in (3, 4)]
    expected = -torch.log1p(-trainer[:, [3, 4]].exp().sum(-1, keepdim=True))
    torch.testing.assert_close(gain[:, others], expected.expand(-1, 48), atol=1e-9, rtol=0)
    for top_p, min_p in ((0.7, 0.0), (1.0, 0.2), (0.8, 0.1)):
        kept = logits.clone()
        column = torch.ones(6, 1)
        apply_filters_(kept, (50 * column).long(), top_p * column, min_p * column)
        inside = kept.isfinite()
        share = trainer.exp().masked_fill(~inside, 0).sum(-1, keepdim=True)
        gain = torch.log_softmax(kept.double(), -1) - trainer
        assert (~inside).any() and (share < 1).all()
        torch.testing.assert_close(gain[inside], (-share.log()).expand(-1, 50)[inside], atol=1e-6, rtol=0)
