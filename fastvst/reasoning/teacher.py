"""TeacherCoT: ask a vision-language model behind an OpenAI-compatible endpoint to explain a known answer.

The teacher sees the views, the plan from above, the table of objects, and the question with its answer (VST-R, arXiv
2511.05491). A trace is kept only if it ends with the true answer and mentions neither the plan nor coordinates. Every
reply is appended to a JSONL file at once, so an interrupted run resumes where it stopped.
"""

from __future__ import annotations

import base64
import concurrent.futures
import dataclasses
import http.client
import io
import json
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from fastvst import jsonl
from fastvst.data.sample import Sample
from fastvst.reasoning.bev import draw_bev, object_table
from fastvst.scenes.scene import Scene

PROMPT = """You write the reasoning of somebody who looks at {pictures} of a room and answers a question about it.
You are also given, for your eyes only, a plan of the room from above and a table of its objects; in the plan camera 1
looks up the page. Use them to get the geometry right, but write as if you saw only the pictures.

Rules:
- First person. Describe {describe}, then lay out the room, restate the question, and derive the answer step by step.
- Call objects by their looks and places. Never mention the plan, the table, a map, a bird's-eye view, or coordinates.
- 150 to 400 words. End with one line that reads exactly: Answer: {answer}

Objects:
{table}

Question: {question}
True answer: {answer}"""
# A trace must not mention the plan, or positions as tuples of numbers.
FORBIDDEN = re.compile(
    r"\bBEV\b|bird'?s[- ]eye|top[- ]down|\bplan from above|\bfloor ?plan|\bobject table|\bcoordinates?\b|\bx[- ]axis|"
    r"\by[- ]axis|\(\s*-?\d+(?:\.\d+)?\s*,\s*-?\d+(?:\.\d+)?\s*(?:,[^)]*)?\)|Cam-\d",
    re.IGNORECASE,
)
LONGEST_WAIT = 60.0  # seconds, whatever a server's Retry-After says
RETRIED = (408, 409, 429, 500, 502, 503, 504)


@dataclass(frozen=True)
class TeacherConfig:
    """The endpoint of the teacher model, its limits, and the length of a trace.

    Attributes:
        url: root of the API, e.g. "http://localhost:8000/v1".
        model: name of the model at the endpoint.
        key: bearer token, or empty.
        tries: traces requested before a row is dropped.
        requests_per_minute: limit for all workers together; 0 = no limit.
        workers: requests in flight.
        retries: repeats of one request after a connection error or status 408, 409, 429 or 5xx; pauses double.
        pause: seconds before the first retry.
        timeout: seconds for one request.
        temperature, max_tokens: sampling parameters of the teacher.
        dollars_in, dollars_out: price per million prompt and completion tokens, for the cost report.
        min_words, max_words: limits of the length of a trace.
    """

    url: str
    model: str
    key: str = ""
    tries: int = 3
    requests_per_minute: float = 0.0
    workers: int = 4
    retries: int = 4
    pause: float = 1.0
    timeout: float = 120.0
    temperature: float = 0.7
    max_tokens: int = 1200
    dollars_in: float = 0.0
    dollars_out: float = 0.0
    min_words: int = 60
    max_words: int = 500


@dataclass
class Bill:
    """Counts and cost of a run. `rejected` counts the dropped traces by reason."""

    requests: int = 0
    kept: int = 0
    given_up: int = 0
    resumed: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    dollars: float = 0.0
    rejected: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        why = ", ".join(f"{reason} {count}" for reason, count in sorted(self.rejected.items())) or "none"
        return (
            f"teacher: {self.kept} traces kept, {self.given_up} rows given up, {self.resumed} found done; "
            f"{self.requests} requests, {self.tokens_in} + {self.tokens_out} tokens, ${self.dollars:.4f}; "
            f"rejected: {why}"
        )


class TeacherError(RuntimeError):
    """The endpoint failed or is not OpenAI-compatible; the message holds the URL, the status and the reply."""


class _Pace:
    """Limits the requests per minute of all threads together, spread evenly."""

    def __init__(self, per_minute: float):
        self.gap = 60.0 / per_minute if per_minute > 0 else 0.0
        self.lock = threading.Lock()
        self.next = 0.0

    def wait(self) -> None:
        with self.lock:
            now = time.monotonic()
            at = max(now, self.next)
            self.next = at + self.gap
        if at > now:
            time.sleep(at - now)


def judge(text: str, sample: Sample, config: TeacherConfig) -> tuple[str, str | None]:
    """(trace without its last line, None), or ("", why it is refused): "no_answer", "wrong_answer", "forbidden",
    "length", "tags"."""
    body, mark, said = text.strip().rpartition("Answer:")
    if not mark:
        return "", "no_answer"
    said = said.strip()
    body = body.strip()
    if not agrees(said, sample):
        return "", "wrong_answer"
    if FORBIDDEN.search(body):
        return "", "forbidden"
    if "<think>" in body or "</think>" in body or "<|" in body:
        return "", "tags"
    if not config.min_words <= len(body.split()) <= config.max_words:
        return "", "length"
    return body, None


def agrees(said: str, sample: Sample) -> bool:
    """Whether a line states the row's answer.

    A text matches with or without its option letter, a number within the answer's relative tolerance.
    """
    answer = sample.answer or {}
    if answer.get("type") == "number":
        number = re.match(r"-?\d+(?:\.\d+)?", said)
        return number is not None and abs(float(number[0]) - answer["value"]) <= answer["tolerance"] * answer["value"]
    accepted = {str(answer.get("value")), sample.messages[-1]["content"][0]["text"].rsplit("So, the answer is ", 1)[-1]}
    return said.lower().rstrip(".") in {text.lower().rstrip(".") for text in accepted}


def ask_teacher(
    rows: Iterable[tuple[Scene, Sample]], out: str | Path, config: TeacherConfig
) -> tuple[list[Sample], Bill]:
    """Rows with reasoning, kind "thought_<task>", and the bill of the run.

    Args:
        rows: direct single-turn rows with their scenes; read lazily, a few ahead of the replies.
        out: JSONL file of {id, trace, reason, usage}; rows found there are not requested again.

    Raises:
        TeacherError: the endpoint refuses (a status 4xx that is not retried), keeps failing, or sends an invalid reply.
    """
    path = Path(out)
    jsonl.append(path, [])  # creates the file, and cuts off a line that a killed run left torn
    done = {row["id"]: row for row in jsonl.read(path)}
    bill = Bill()
    pace = _Pace(config.requests_per_minute)
    lock = threading.Lock()
    made: list[Sample] = []

    def work(scene: Scene, sample: Sample) -> Sample | None:
        for attempt in range(config.tries):
            pace.wait()
            text, usage = _request(scene, sample, config)
            trace, reason = judge(text, sample, config)
            last = reason is None or attempt + 1 == config.tries
            with lock:
                bill.requests += 1
                bill.tokens_in += usage[0]
                bill.tokens_out += usage[1]
                bill.dollars += (usage[0] * config.dollars_in + usage[1] * config.dollars_out) / 1e6
                if reason is not None:
                    bill.rejected[reason] = bill.rejected.get(reason, 0) + 1
                if last:
                    bill.kept = bill.kept + (reason is None)
                    bill.given_up = bill.given_up + (reason is not None)
                    row = {"id": sample.id, "trace": trace, "reason": reason, "usage": usage}
                    jsonl.append(path, [row], ensure_ascii=False)
            if reason is None:
                return thought(sample, trace)
        return None

    with concurrent.futures.ThreadPoolExecutor(config.workers) as pool:
        waiting: list[concurrent.futures.Future] = []
        try:
            for scene, sample in rows:
                if sample.id in done:
                    bill.resumed += 1
                    trace = done[sample.id]["trace"]
                    made += [thought(sample, trace)] if trace else []
                    continue
                waiting.append(pool.submit(work, scene, sample))
                if len(waiting) >= 2 * config.workers:
                    made += _result(waiting.pop(0))
            for future in waiting:
                made += _result(future)
        except BaseException:
            for future in waiting:
                future.cancel()
            raise
    return made, bill


def _result(future: concurrent.futures.Future) -> list[Sample]:
    sample = future.result()
    return [] if sample is None else [sample]


def thought(sample: Sample, trace: str) -> Sample:
    """The row with a trace before its answer, of kind "thought_<task>"."""
    answer = sample.messages[-1]["content"][0]["text"].rsplit("So, the answer is ", 1)[-1].rstrip(".")
    task = sample.metadata.get("task", sample.kind)
    reply = {"role": "assistant", "content": [{"type": "text", "text": f"<think>{trace}</think> {answer}"}]}
    return dataclasses.replace(
        sample,
        id=f"teacher-{sample.id}",
        kind=f"thought_{task}",
        messages=[*sample.messages[:-1], reply],
        metadata={**sample.metadata, "task": f"thought_{task}"},
    )


def _request(scene: Scene, sample: Sample, config: TeacherConfig) -> tuple[str, tuple[int, int]]:
    """Text and (prompt, completion) token counts of one reply."""
    views = list(sample.metadata.get("views", [sample.metadata.get("view", 0)]))
    images = [part["image"] for part in sample.parts("image")]
    question = " ".join(p["text"] for p in sample.messages[0]["content"] if p["type"] == "text")
    several = len(images) > 1
    text = PROMPT.format(
        pictures=f"{len(images)} pictures" if several else "a picture",
        describe="each picture and how the camera moved between them" if several else "the picture",
        table=object_table(scene, views),
        question=question,
        answer=sample.messages[-1]["content"][0]["text"],
    )
    content = [*(_image(p) for p in [*images, draw_bev(scene, views)]), {"type": "text", "text": text}]
    body = {
        "model": config.model,
        "messages": [{"role": "user", "content": content}],
        "temperature": config.temperature,
        "max_tokens": config.max_tokens,
    }
    answer = _post(f"{config.url.rstrip('/')}/chat/completions", body, sample, config)
    try:
        usage = answer.get("usage") or {}
        counts = int(usage.get("prompt_tokens", 0)), int(usage.get("completion_tokens", 0))
        return str(answer["choices"][0]["message"]["content"]), counts
    except (KeyError, IndexError, TypeError) as error:
        shown = json.dumps(answer)[:200]
        raise TeacherError(f"{config.url}: no choices[0].message.content in the answer {shown}") from error


def _image(image: Image.Image) -> dict[str, Any]:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, format="PNG")
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}


def _post(url: str, body: dict[str, Any], sample: Sample, config: TeacherConfig) -> dict[str, Any]:
    headers = {"Content-Type": "application/json"}
    if config.key:
        headers["Authorization"] = f"Bearer {config.key}"
    data = json.dumps(body).encode()
    problem = ""
    for attempt in range(config.retries + 1):
        request = urllib.request.Request(url, data=data, headers=headers)
        wait = config.pause * 2**attempt
        try:
            with urllib.request.urlopen(request, timeout=config.timeout) as response:
                return jsonl.loads(response.read())
        except urllib.error.HTTPError as error:
            said = error.read()[:300].decode("utf-8", "replace")
            problem = f"status {error.code}: {said}"
            if error.code not in RETRIED:
                raise TeacherError(f"{url}: {problem} (row {sample.id})") from error
            asked = error.headers.get("Retry-After", "")
            wait = max(wait, min(float(asked), LONGEST_WAIT)) if asked.replace(".", "", 1).isdecimal() else wait
        except (OSError, ValueError, http.client.HTTPException) as error:  # refused, reset, late, cut, or not JSON
            problem = f"{type(error).__name__}: {error}"
        if attempt < config.retries:
            time.sleep(wait)
    raise TeacherError(f"{url}: gave up on row {sample.id} after {config.retries + 1} tries; last: {problem}")
