"""The same `generate` on a server with OpenAI's chat completions API: vLLM, SGLang and others.

It serves rollouts beyond one node. Token ids come from the server (`return_tokens_as_token_ids`, which vLLM and SGLang
support), so that training gets the tokens that were sampled: encoding the decoded text again may give others.
"""

from __future__ import annotations

import base64
import dataclasses
import http.client
import io
import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from fastvst import jsonl
from fastvst.data.chat import content_parts, system_prompt
from fastvst.data.file_range import FileRange
from fastvst.data.fov import unify_fov_messages
from fastvst.data.image_modes import AS_DISPLAYED, ImageRules
from fastvst.data.images import load_rgb
from fastvst.data.sample import Message, Part, Sample
from fastvst.rollout.http_call import Call
from fastvst.rollout.request import Rollout, RolloutError, SamplingParams, params_of_each

if TYPE_CHECKING:
    from fastvst.data.processor import Processor, TokenizedSample

MOST_PIXELS = 1 << 28  # of an image
LONGEST_PAUSE = 60.0  # seconds, whatever a server's Retry-After says
RETRIED = (408, 409, 429, 500, 502, 503, 504)  # as in OpenAI's own client: the next try may succeed


class ServerError(RolloutError):
    """A server does not answer, refuses, or sends what cannot be used; another server may answer the same request."""


@dataclass(frozen=True)
class ServerConfig:
    """Address of the server, and limits.

    Attributes:
        base_url: up to and including "/v1".
        model: the name under which the server serves the model.
        api_key: sent as a bearer token; no message and no repr shows it.
        timeout: seconds for one request.
        retries: tries after the first one, with waits of 0.5 s, 1 s, 2 s, ... or what the server's Retry-After says.
        concurrency: requests at the same time.
    """

    base_url: str
    model: str = ""
    api_key: str = field(default="", repr=False)
    timeout: float = 600.0
    retries: int = 5
    concurrency: int = 64

    def shown(self, text: str) -> str:
        """A text of the server for a message, without the API key that it may repeat."""
        return text.replace(self.api_key, "(key)") if self.api_key else text


def get_json(config: ServerConfig, url: str, call: Call, body: Any = None, timeout: float | None = None) -> Any:
    """The JSON that a server sends: a GET, or a POST of `body`. An empty response is None.

    Raises:
        ServerError: no response in time, a status other than 200, or not JSON.
    """
    try:
        method = "GET" if body is None else "POST"
        reply = call.send(method, url, key=config.api_key, body=body, timeout=timeout or config.timeout)
    except (OSError, http.client.HTTPException) as error:
        raise ServerError(config.shown(f"{url} does not answer ({error!r})")) from None
    if reply.status != 200:
        raise ServerError(f"{url} answers {_status(config, reply.status, reply.body)}")
    try:
        return jsonl.loads(reply.body) if reply.body else None
    except ValueError as error:
        raise ServerError(config.shown(f"{url} sends a body that is not JSON ({error})")) from None


def _status(config: ServerConfig, status: int, body: bytes) -> str:
    hint = " (a redirect: give the address that it leads to)" if 300 <= status < 400 else ""
    return f"{status}{hint}: {config.shown(body.decode('utf-8', 'replace'))[:500]}"


class OpenAIEngine:
    """`Engine.generate` over HTTP.

    Attributes:
        weights: the version of the weights that the server must have after every answer (vLLM's /weight_info); "" =
            not asked for.
    """

    def __init__(self, config: ServerConfig, processor: Processor | None = None) -> None:
        """
        Args:
            processor: that of the trainer. Then images are sent at the trainer's own sizes, and every answer must bring
                the token ids of its prompt, which are compared with the trainer's; videos are refused, because servers
                choose other frames. Without it images are sent as they are, and nothing is compared.
        """
        self.config = config
        self.processor = processor
        self.weights = ""

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

    def complete(self, prompt: Sample, params: SamplingParams, call: Call | None = None) -> list[Rollout]:
        """The completions of one prompt; threads may call it. Raises as `generate`.

        Args:
            call: another thread can end it; then CallCancelled is raised.
        """
        call = call or Call()
        name = f"{prompt.source}/{prompt.id}"
        expected = None
        if self.processor is not None:
            if prompt.parts("video"):
                raise RolloutError(
                    f"{name} has a video, and a server samples other frames of it than the trainer: four frames were "
                    "74 tokens on vLLM and 306 here. Sample videos with the trainer's own engine (no sampling.base_url)"
                )
            expected = self.processor.inspect(prompt, add_generation_prompt=True)
        begin = time.perf_counter()
        response = self._post(name, self._body(prompt, params, expected), call)
        seconds = time.perf_counter() - begin
        if expected is not None:
            _compare_prompts(name, self.config.base_url, expected.tokens.tolist(), response)
        try:
            choices = sorted(response["choices"], key=lambda c: c.get("index", 0))
            rollouts = [self._rollout(name, choice, params, seconds) for choice in choices]
        except (KeyError, TypeError, AttributeError) as error:
            raise ServerError(
                self.config.shown(f"{name}: {self.config.base_url} sent {_short(response)}; expected a chat completion")
            ) from error
        if len(rollouts) != params.n:
            raise ServerError(f"{name}: {self.config.base_url} sent {len(rollouts)} completions; expected {params.n}")
        if self.weights:
            _check_weights(self.config, self.weights, call)
        return rollouts

    def _body(self, prompt: Sample, params: SamplingParams, expected: TokenizedSample | None) -> dict[str, Any]:
        if params.allowed:
            raise RolloutError("`allowed` tokens by position are not sent to a server; use the engine")
        body: dict[str, Any] = {
            "model": self.config.model,
            "messages": self._messages(prompt, None if expected is None else [one.size for one in expected.inputs]),
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
            # Images have the trainer's sizes already, which are within these limits: the server keeps them.
            least = self.processor.geometry.factor**2
            size = {"shortest_edge": least, "longest_edge": MOST_PIXELS}  # the limits by their newer names
            body["mm_processor_kwargs"] = {"min_pixels": least, "max_pixels": MOST_PIXELS, "size": size}
            body["return_token_ids"] = True
        return body

    def _messages(self, prompt: Sample, sizes: Sequence[tuple[int, int]] | None) -> list[dict[str, Any]]:
        """The messages in the form of OpenAI's API, texts stripped as in `chat.render`.

        Args:
            sizes: (width, height) of each image, as the trainer resizes it; None: images as they are.
        """
        messages: list[Message] = list(prompt.messages)
        if messages and messages[-1]["role"] == "assistant":
            messages.pop()
        rules = AS_DISPLAYED
        if self.processor is not None:
            config = self.processor.config
            rules = config.rules
            if config.enable_fov and prompt.kind == "bbox_3d":
                messages, _ = unify_fov_messages(messages, config.fov_base_width, config.max_source_pixels, rules)
        if not messages or messages[0]["role"] != "system":
            system = {"type": "text", "text": system_prompt(prompt.kind)}
            messages = [{"role": "system", "content": [system]}, *messages]
        left = None if sizes is None else iter(sizes)
        sent = []
        for message in messages:
            media = iter([part for part in message["content"] if part["type"] != "text"])
            parts = []
            for kind, text in content_parts(message):
                if kind == "text":
                    parts.append({"type": "text", "text": text})
                else:
                    parts.append(_media(next(media), None if left is None else next(left), rules))
            sent.append({"role": message["role"], "content": parts})
        return sent

    def _post(self, name: str, body: dict[str, Any], call: Call) -> dict[str, Any]:
        config = self.config
        url = config.base_url.rstrip("/") + "/chat/completions"
        for attempt in range(config.retries + 1):
            pause = 0.5 * 2**attempt * random.uniform(0.8, 1.2)  # so that many clients do not retry at the same time
            try:
                reply = call.send("POST", url, key=config.api_key, body=body, timeout=config.timeout)
                if reply.status == 200:
                    return jsonl.loads(reply.body)
                problem = f"{url} answers {_status(config, reply.status, reply.body)}"
                if reply.status not in RETRIED:
                    raise ServerError(f"{name}: {problem}")
                after = reply.headers.get("Retry-After", "")
                pause = min(float(after), LONGEST_PAUSE) if after.replace(".", "", 1).isdecimal() else pause
            except (OSError, http.client.HTTPException) as error:
                problem = f"{url} does not answer ({error!r})"
            except ValueError as error:
                problem = f"{url} sends a body that is not JSON ({error})"
            if attempt < config.retries:
                call.pause(pause)
        raise ServerError(config.shown(f"{name}: {problem}; tried {config.retries + 1} times"))

    def _rollout(self, name: str, choice: dict[str, Any], params: SamplingParams, seconds: float) -> Rollout:
        text = choice["message"].get("content") or ""
        content = (choice.get("logprobs") or {}).get("content") or []
        if params.logprobs and not content and text:
            raise ServerError(f"{name}: {self.config.base_url} sends no logprobs; they were requested")
        tokens = [_token_id(name, entry["token"], self.config, self.processor) for entry in content]
        logprobs = [float(entry["logprob"]) for entry in content]
        reason = choice.get("finish_reason")
        if reason not in ("stop", "length"):  # vLLM says "abort" when a pause has ended a request
            raise ServerError(
                f"{name}: {self.config.base_url} ended a completion with {_short(reason)}; expected stop or length"
            )
        return Rollout(
            *(tokens, text, logprobs, list(logprobs), reason, seconds, seconds),
            server=self.config.base_url,
            weights=self.weights,
        )


def _token_id(name: str, token: str, config: ServerConfig, processor: Processor | None) -> int:
    """The id of a token that a server sends as "token_id:7", or as its text."""
    if token.startswith("token_id:"):
        return int(token.removeprefix("token_id:"))
    found = processor.tokenizer.token_to_id(token) if processor is not None else None
    if found is None:
        raise ServerError(
            f"{name}: {config.base_url} sends the text of a token ({_short(token)}) instead of its id. "
            "Training needs ids: use a server that supports return_tokens_as_token_ids (vLLM, SGLang), or "
            "logprobs=False"
        )
    return found


def _check_weights(config: ServerConfig, expected: str, call: Call) -> None:
    """Raise ServerError unless the server has the weights `expected`.

    It had them before it was asked, so all tokens of an answer that came before are of these weights.
    """
    found = get_json(config, f"{root_of(config.base_url)}/weight_info", call, timeout=60.0)
    version = found.get("weight_version") if isinstance(found, dict) else None
    if version != expected:
        raise ServerError(
            f"{config.base_url} has the weights {_short(version)}; expected {expected!r}. Another program has changed "
            "them, or the server was restarted"
        )


def _compare_prompts(name: str, url: str, ours: list[int], response: dict[str, Any]) -> None:
    """Raise RolloutError unless the server has read the trainer's prompt."""
    theirs = response.get("prompt_token_ids") if isinstance(response, dict) else None
    if not isinstance(theirs, list) or not theirs:
        raise ServerError(
            f"{name}: {url} sends no prompt_token_ids, so its prompt cannot be compared with the "
            "trainer's: use a server that supports return_token_ids (tried: vLLM 0.32)"
        )
    if theirs == ours:
        return
    place = next((i for i, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), None)
    at = min(len(ours), len(theirs)) if place is None else place
    raise RolloutError(
        f"{name}: the prompt has {len(theirs)} tokens on {url} and {len(ours)} in the trainer. "
        f"They differ from token {at}: {theirs[at : at + 4]} there, {ours[at : at + 4]} here. Serve the directory "
        "that the trainer loads (chat template, preprocessor_config.json), and start vLLM with "
        "--trust-request-mm-kwargs, so that it keeps the sizes of images"
    )


def _media(part: Part, size: tuple[int, int] | None, rules: ImageRules) -> dict[str, Any]:
    """An image or a video in the form of OpenAI's API, as base64; an image with the given (width, height)."""
    if part["type"] == "image":
        return {"type": "image_url", "image_url": {"url": _image_url(part, size, rules)}}
    video = part["video"]
    if isinstance(video, (list, tuple)):  # vLLM's form of a list of frames
        frames = ",".join(_image_url({"image": f}, None, rules, "JPEG").split(",", 1)[1] for f in video)
        return {"type": "video_url", "video_url": {"url": f"data:video/jpeg;base64,{frames}"}}
    if isinstance(video, FileRange):
        video = video.read()
    data = bytes(video) if isinstance(video, (bytes, bytearray)) else Path(video).read_bytes()
    return {"type": "video_url", "video_url": {"url": f"data:video/mp4;base64,{base64.b64encode(data).decode()}"}}


def _image_url(part: Part, size: tuple[int, int] | None, rules: ImageRules, form: str = "PNG") -> str:
    image = load_rgb(part["image"], max_source_pixels=MOST_PIXELS, time_limit=60.0, rules=rules)
    if size is None and part.get("resized_width") and part.get("resized_height"):
        size = (part["resized_width"], part["resized_height"])
    if size is not None and image.size != size:
        image = image.resize(size, Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, format=form)
    return f"data:image/{form.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def connect(base_url: str, processor: Processor | None = None, **options: Any) -> OpenAIEngine:
    """An `OpenAIEngine`; the options are the other fields of ServerConfig."""
    known = {f.name for f in dataclasses.fields(ServerConfig)}
    if unknown := sorted(set(options) - known):
        raise ValueError(f"unknown server options {unknown}; expected some of {sorted(known)}")
    return OpenAIEngine(ServerConfig(base_url, **options), processor)


def root_of(base_url: str) -> str:
    """The address of a server without "/v1"; vLLM's other routes are below it."""
    return base_url.rstrip("/").removesuffix("/v1")


def _short(value: Any) -> str:
    """The beginning of a value's repr, for error messages."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
