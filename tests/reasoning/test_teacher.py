"""TeacherCoT against a real HTTP server on this machine."""

from __future__ import annotations

import base64
import io
import json
import re
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastvst.data import Sample
from fastvst.reasoning.teacher import TeacherConfig, TeacherError, ask_teacher, judge
from fastvst.scenes.scene import Scene, SceneObject, View
from fastvst.spatial.camera import Camera, look

STORY = "In the first picture I see a bed and beside it a lamp. " * 12


def scene() -> Scene:
    camera = Camera(32, 24, 30, 30, 16, 12, look(0, 0, 0), np.array([0.0, 1.5, 0.0]))
    things = tuple(SceneObject(k + 1, n, (k, 2 + k, 0.5, 1, 1, 1, -90, 0, 0)) for k, n in enumerate(("bed", "lamp")))
    return Scene("s", things, (View(camera, np.zeros((24, 32, 3), np.uint8), ()),))


def row(number: int) -> Sample:
    return Sample.from_messages(
        [
            {
                "role": "user",
                "content": [
                    {"type": "image", "image": Image.new("RGB", (32, 24))},
                    {"type": "text", "text": f"Q{number}: which? A. bed B. lamp"},
                ],
            },
            {"role": "assistant", "content": "B. lamp"},
        ],
        id=f"r{number}",
        source="t",
        answer={"type": "choice", "value": "lamp", "candidates": ["bed", "lamp"]},
        metadata={"task": "distance", "view": 0},
    )


CUT = "cut"


class Server:
    """Replies with `script(question number, number of requests)`: a text or a status code."""

    def __init__(self) -> None:
        self.script = lambda number, times: f"{STORY}\nAnswer: B. lamp"
        self.asked: list[dict] = []
        self.times: list[float] = []
        self.keys: list[str | None] = []
        self.lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                number = int(re.search(r"Question: Q(\d+)", body["messages"][0]["content"][-1]["text"])[1])
                with outer.lock:
                    outer.asked.append(body | {"number": number, "path": self.path})
                    outer.times.append(time.monotonic())
                    outer.keys.append(self.headers.get("Authorization"))
                    times = sum(a["number"] == number for a in outer.asked)
                said = outer.script(number, times)
                status = said if isinstance(said, int) else 200
                answer = {
                    "choices": [{"message": {"content": said}}],
                    "usage": {"prompt_tokens": 1000, "completion_tokens": 200},
                }
                data = json.dumps(answer if status == 200 else {"error": "busy"}).encode()
                self.send_response(status)
                cut = 7 if said == CUT else 0  # a server that was killed while it answered
                self.send_header("Content-Length", str(len(data) + cut))
                if status == 408:
                    self.send_header("Retry-After", "9" * 9)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.http.serve_forever, daemon=True)
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"


@pytest.fixture
def server() -> Iterator[Server]:
    found = Server()
    yield found
    found.http.shutdown()
    found.http.server_close()
    found.thread.join()


def config(server: Server, **options) -> TeacherConfig:
    return TeacherConfig(server.url, "teacher", pause=0.01, **options)


def test_traces_are_kept_resumed_and_paid_for(server: Server, tmp_path: Path) -> None:
    out = tmp_path / "traces.jsonl"
    home = scene()
    rows = [(home, row(n)) for n in range(6)]
    setup = config(server, key="secret", dollars_in=1.0, dollars_out=5.0)
    made, bill = ask_teacher(rows[:4], out, setup)
    assert {s.id for s in made} == {f"teacher-r{n}" for n in range(4)} and bill.kept == bill.requests == 4
    assert bill.tokens_in == 4000 and bill.dollars == pytest.approx(4 * (1000 + 5 * 200) / 1e6)
    assert set(server.keys) == {"Bearer secret"} and server.asked[0]["path"] == "/v1/chat/completions"
    text = made[0].messages[-1]["content"][0]["text"]
    assert text == f"<think>{STORY.strip()}</think> B. lamp" and made[0].kind == "thought_distance"
    sent = server.asked[0]["messages"][0]["content"]
    sizes = []
    for part in sent[:-1]:
        data = base64.b64decode(part["image_url"]["url"].removeprefix("data:image/png;base64,"))
        sizes.append(Image.open(io.BytesIO(data)).size)
    assert sizes == [(32, 24), (640, 640)]  # the view and the plan
    assert "1 | bed | 1.00 x 1.00 x 1.00" in sent[-1]["text"] and "True answer: B. lamp" in sent[-1]["text"]

    with open(out, "a") as file:
        file.write('{"id": "r4", "tra')  # killed while writing
    made, bill = ask_teacher(rows, out, setup)
    assert len(made) == 6 and bill.resumed == 4 and bill.requests == 2 and len(server.asked) == 6
    assert "2 traces kept" in str(bill) and len(out.read_text().splitlines()) == 6


def test_bad_traces_are_asked_for_again_and_then_given_up(server: Server, tmp_path: Path) -> None:
    bad = {
        0: f"{STORY}\nAnswer: A. bed",
        1: f"{STORY} In the bird's-eye view it is clear.\nAnswer: B. lamp",
        2: f"{STORY} The lamp is at (1.20, -0.4).\nAnswer: B. lamp",
        3: "Too short.\nAnswer: B. lamp",
        4: STORY,
        5: f"{STORY} </think>\nAnswer: B. lamp",
    }
    server.script = lambda number, times: bad[number] if number == 0 or times < 2 else f"{STORY}\nAnswer: B. lamp"
    made, bill = ask_teacher([(scene(), row(n)) for n in bad], tmp_path / "t.jsonl", config(server, tries=2, workers=1))
    assert bill.rejected == {"wrong_answer": 2, "forbidden": 2, "length": 1, "no_answer": 1, "tags": 1}
    assert bill.given_up == 1 and {s.id for s in made} == {f"teacher-r{n}" for n in range(1, 6)}
    again, bill = ask_teacher([(scene(), row(0))], tmp_path / "t.jsonl", config(server))
    assert again == [] and bill.requests == 0  # a dropped row is not requested again


def test_a_busy_server_is_asked_again_and_a_refusal_is_not(server: Server, tmp_path: Path) -> None:
    server.script = lambda number, times: 429 if times < 3 else f"{STORY}\nAnswer: B. lamp"
    made, bill = ask_teacher([(scene(), row(0))], tmp_path / "a.jsonl", config(server))
    assert len(made) == 1 and len(server.asked) == 3
    server.script = lambda number, times: 503
    with pytest.raises(TeacherError, match="gave up on row r1 after 3 tries; last: status 503"):
        ask_teacher([(scene(), row(1))], tmp_path / "b.jsonl", config(server, retries=2))
    server.script = lambda number, times: 401
    with pytest.raises(TeacherError, match=r"status 401.*busy.*row r2"):
        ask_teacher([(scene(), row(2))], tmp_path / "c.jsonl", config(server))
    assert sum(a["number"] == 2 for a in server.asked) == 1


def test_a_server_that_dies_while_it_answers_is_asked_again(server: Server, tmp_path: Path) -> None:
    server.script = lambda number, times: CUT if times < 3 else f"{STORY}\nAnswer: B. lamp"
    made, _ = ask_teacher([(scene(), row(0))], tmp_path / "a.jsonl", config(server))
    assert len(made) == 1 and len(server.asked) == 3
    server.script = lambda number, times: CUT
    with pytest.raises(TeacherError, match="gave up on row r1 after 2 tries; last: IncompleteRead"):
        ask_teacher([(scene(), row(1))], tmp_path / "b.jsonl", config(server, retries=1))


def test_a_server_cannot_make_it_wait_for_long(server: Server, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("fastvst.reasoning.teacher.LONGEST_WAIT", 0.3)
    server.script = lambda number, times: 408 if times < 2 else f"{STORY}\nAnswer: B. lamp"
    ask_teacher([(scene(), row(0))], tmp_path / "a.jsonl", config(server))
    assert server.times[1] - server.times[0] >= 0.3


def test_requests_keep_their_pace(server: Server, tmp_path: Path) -> None:
    rows = [(scene(), row(n)) for n in range(4)]
    ask_teacher(rows, tmp_path / "t.jsonl", config(server, requests_per_minute=120, workers=4))
    times = sorted(server.times)
    assert times[-1] - times[0] > 1.0  # three gaps of half a second; the first request may arrive late


def test_nobody_there(tmp_path: Path) -> None:
    setup = TeacherConfig("http://127.0.0.1:9/v1", "m", retries=1, pause=0.01)
    with pytest.raises(TeacherError, match="http://127.0.0.1:9/v1/chat/completions: gave up on row r0 after 2 tries"):
        ask_teacher([(scene(), row(0))], tmp_path / "t.jsonl", setup)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Answer: lamp", "length"),
        ("", "no_answer"),
        (f"{STORY} top-down layout. Answer: lamp", "forbidden"),
        (f"{STORY} its x-axis. Answer: lamp", "forbidden"),
        (f"{STORY}\nAnswer: lamp\nor bed", "wrong_answer"),
        (f"{STORY}\nAnswer: lamp.", None),
    ],
)
def test_judge(text: str, reason: str | None) -> None:
    assert judge(text, row(0), TeacherConfig("u", "m"))[1] == reason


def test_numbers_are_judged_within_their_tolerance() -> None:
    from dataclasses import replace

    answer = {"type": "number", "value": 70, "unit": "cm", "tolerance": 0.1}
    tall = replace(row(0), answer=answer)
    for said, reason in (("70 cm", None), ("76", None), ("78 cm", "wrong_answer"), ("tall", "wrong_answer")):
        assert judge(f"{STORY}\nAnswer: {said}", tall, TeacherConfig("u", "m"))[1] == reason
