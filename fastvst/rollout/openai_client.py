"""The same `generate` on a server with OpenAI's chat completions API: vLLM, SGLang and others.

It serves rollouts beyond one node. Token ids come from the server (`return_tokens_as_token_ids`, which vLLM and SGLang
support), so that training gets the tokens that were sampled: encoding the decoded text again may give others.
"""

from __future__ import annotations

import base64
import dataclasses
import http.client
import io
import json
import random
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from fastvst import jsonl
from fastvst.data.chat import system_prompt
from fastvst.data.file_range import FileRange
from fastvst.data.fov import unify_fov_messages
from fastvst.data.images import load_rgb
from fastvst.data.sample import Message, Part, Sample
from fastvst.rollout.request import Rollout, RolloutError, SamplingParams, params_of_each

if TYPE_CHECKING:
    from fastvst.data.processor import Processor

LONGEST_PAUSE = 60.0  # seconds, whatever a server's Retry-After says
RETRIED = (408, 409, 429, 500, 502, 503, 504)  # as in OpenAI's own client: the next try may succeed


@dataclass(frozen=True)
class ServerConfig:
    """Address of the server, and limits.

    Attributes:
        base_url: up to and including "/v1".
        model: the name under which the server serves the model.
        api_key: sent as a bearer token.
        timeout: seconds for one request.
        retries: tries after the first one, with waits of 0.5 s, 1 s, 2 s, ... or what the server's Retry-After says.
        concurrency: requests at the same time.
    """

    base_url: str
    model: str = ""
    api_key: str = ""
    timeout: float = 600.0
    retries: int = 5
    concurrency: int = 64


class OpenAIEngine:
    """`Engine.generate` over HTTP."""

    def __init__(self, config: ServerConfig, processor: Processor | None = None) -> None:
        """
        Args:
            processor: finds token ids if the server sends only texts of tokens, and resizes images of 3D box prompts.
        """
        self.config = config
        self.processor = processor

    def generate(
        self,
        prompts: Sequence[Sample],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: Callable[[int, list[Rollout]], None] | None = None,
    ) -> list[list[Rollout]]:
        """As `Engine.generate`; `logprobs` and `raw_logprobs` are both what the server reports.

        Raises:
            ValueError: an EncodedSample (the server takes messages), or len(params) != len(prompts).
            RolloutError: the server refuses a request, or does not answer after all tries; names the prompt and the
                response.
        """
        each = params_of_each(params, len(prompts))
        for prompt in prompts:
            if not isinstance(prompt, Sample):
                raise ValueError(f"{prompt.source}/{prompt.id} is an EncodedSample; a server takes Samples only")
        results: list[list[Rollout]] = [[] for _ in prompts]
        pool = ThreadPoolExecutor(min(self.config.concurrency, max(1, len(prompts))))
        try:
            running: dict[Future, int] = {
                pool.submit(self.complete, prompt, p): i
                for i, (prompt, p) in enumerate(zip(prompts, each, strict=True))
            }
            while running:
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    index = running.pop(future)
                    results[index] = future.result()
                    if progress is not None:
                        progress(index, results[index])
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        return results

    def complete(self, prompt: Sample, params: SamplingParams) -> list[Rollout]:
        """The completions of one prompt; threads may call it. Raises as `generate`."""
        name = f"{prompt.source}/{prompt.id}"
        begin = time.perf_counter()
        response = self._post(name, self._body(prompt, params))
        seconds = time.perf_counter() - begin
        try:
            choices = sorted(response["choices"], key=lambda c: c.get("index", 0))
            rollouts = [self._rollout(name, choice, params, seconds) for choice in choices]
        except (KeyError, TypeError, AttributeError) as error:
            raise RolloutError(
                f"{name}: {self.config.base_url} sent {_short(response)}; expected a chat completion"
            ) from error
        if len(rollouts) != params.n:
            raise RolloutError(f"{name}: {self.config.base_url} sent {len(rollouts)} completions; expected {params.n}")
        return rollouts

    def _body(self, prompt: Sample, params: SamplingParams) -> dict[str, Any]:
        if params.allowed:
            raise RolloutError("`allowed` tokens by position are not sent to a server; use the engine")
        body: dict[str, Any] = {
            "model": self.config.model,
            "messages": self._messages(prompt),
            "n": params.n,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "max_tokens": params.max_tokens,
            "seed": params.seed,
            "stop": list(params.stops),
            "logprobs": params.logprobs,
            # Not in OpenAI's API; vLLM and SGLang support them. Their top_k -1 means all tokens.
            "top_k": params.top_k if params.top_k > 0 else -1,
            "min_p": params.min_p,
            "repetition_penalty": params.repetition_penalty,
            "ignore_eos": params.ignore_eos,
            "return_tokens_as_token_ids": True,
            "include_stop_str_in_output": False,
        }
        if self.processor is not None:  # never sample placeholders; -100 is OpenAI's value for that
            names = ("<|image_pad|>", "<|video_pad|>")
            body["logit_bias"] = {str(self.processor.token_id(name)): -100 for name in names}
        return body

    def _messages(self, prompt: Sample) -> list[dict[str, Any]]:
        messages: list[Message] = list(prompt.messages)
        if messages and messages[-1]["role"] == "assistant":
            messages.pop()
        if self.processor is not None and self.processor.config.enable_fov and prompt.kind == "bbox_3d":
            config = self.processor.config
            messages, _ = unify_fov_messages(messages, config.fov_base_width, config.max_source_pixels)
        if not messages or messages[0]["role"] != "system":
            system = {"type": "text", "text": system_prompt(prompt.kind)}
            messages = [{"role": "system", "content": [system]}, *messages]
        return [{"role": m["role"], "content": [_part(p) for p in m["content"]]} for m in messages]

    def _post(self, name: str, body: dict[str, Any]) -> dict[str, Any]:
        config = self.config
        url = config.base_url.rstrip("/") + "/chat/completions"
        headers = {"Content-Type": "application/json"}
        if config.api_key:
            headers["Authorization"] = f"Bearer {config.api_key}"
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)
        for attempt in range(config.retries + 1):
            pause = 0.5 * 2**attempt * random.uniform(0.8, 1.2)  # so that many clients do not retry at the same time
            try:
                with urllib.request.urlopen(request, timeout=config.timeout) as response:
                    return jsonl.loads(response.read())
            except urllib.error.HTTPError as error:
                detail = error.read()[:500].decode("utf-8", "replace")
                problem = f"{url} answers {error.code}: {detail}"
                if error.code not in RETRIED:
                    raise RolloutError(f"{name}: {problem}") from error
                after = error.headers.get("Retry-After", "")
                pause = min(float(after), LONGEST_PAUSE) if after.replace(".", "", 1).isdecimal() else pause
            except (urllib.error.URLError, TimeoutError, ConnectionError, http.client.HTTPException) as error:
                reason = error.reason if isinstance(error, urllib.error.URLError) else error
                problem = f"{url} does not answer ({reason})"
            except ValueError as error:
                problem = f"{url} sends a body that is not JSON ({error})"
            if attempt < config.retries:
                time.sleep(pause)
        raise RolloutError(f"{name}: {problem}; tried {config.retries + 1} times")

    def _rollout(self, name: str, choice: dict[str, Any], params: SamplingParams, seconds: float) -> Rollout:
        text = choice["message"].get("content") or ""
        content = (choice.get("logprobs") or {}).get("content") or []
        if params.logprobs and not content and text:
            raise RolloutError(f"{name}: {self.config.base_url} sends no logprobs; they were requested")
        tokens = [self._token_id(name, entry["token"]) for entry in content]
        logprobs = [float(entry["logprob"]) for entry in content]
        reason = "length" if choice.get("finish_reason") == "length" else "stop"
        return Rollout(tokens, text, logprobs, list(logprobs), reason, seconds, seconds)

    def _token_id(self, name: str, token: str) -> int:
        if token.startswith("token_id:"):
            return int(token.removeprefix("token_id:"))
        found = self.processor.tokenizer.token_to_id(token) if self.processor is not None else None
        if found is None:
            raise RolloutError(
                f"{name}: {self.config.base_url} sends the text of a token ({_short(token)}) instead of its id. "
                "Training needs ids: use a server that supports return_tokens_as_token_ids (vLLM, SGLang), or "
                "logprobs=False"
            )
        return found


def _part(part: Part) -> dict[str, Any]:
    """A part in the form of OpenAI's API, with media as base64."""
    if part["type"] == "text":
        return {"type": "text", "text": part["text"]}
    if part["type"] == "image":
        return {"type": "image_url", "image_url": {"url": _image_url(part)}}
    video = part["video"]
    if isinstance(video, (list, tuple)):  # vLLM's form of a list of frames
        frames = ",".join(_image_url({"image": f}, "JPEG").split(",", 1)[1] for f in video)
        return {"type": "video_url", "video_url": {"url": f"data:video/jpeg;base64,{frames}"}}
    if isinstance(video, FileRange):
        video = video.read()
    data = bytes(video) if isinstance(video, (bytes, bytearray)) else Path(video).read_bytes()
    return {"type": "video_url", "video_url": {"url": f"data:video/mp4;base64,{base64.b64encode(data).decode()}"}}


def _image_url(part: Part, form: str = "PNG") -> str:
    image = load_rgb(part["image"], max_source_pixels=1 << 28, time_limit=60.0)
    if part.get("resized_width") and part.get("resized_height"):
        image = image.resize((part["resized_width"], part["resized_height"]), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, format=form)
    return f"data:image/{form.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def connect(base_url: str, processor: Processor | None = None, **options: Any) -> OpenAIEngine:
    """An `OpenAIEngine`; the options are the other fields of ServerConfig."""
    known = {f.name for f in dataclasses.fields(ServerConfig)}
    if unknown := sorted(set(options) - known):
        raise ValueError(f"unknown server options {unknown}; expected some of {sorted(known)}")
    return OpenAIEngine(ServerConfig(base_url, **options), processor)


def _short(value: Any) -> str:
    """The beginning of a value's repr, for error messages."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
