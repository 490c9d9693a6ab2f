"""Group records with given completions and rewards, for the tests of an RL run's files."""

from __future__ import annotations

import numpy as np
from PIL import Image

from fastvst.data import Sample
from fastvst.rl.prompts import Prompt, make_prompt
from fastvst.rl.records import GroupRecord
from fastvst.rl.rewards.verifiable import Reward

UGLY_TEXTS = ["<script>alert(1)</script>", "\x00\x1b[31m\x7f", "half \ud83d a character", "", "x" * 50_000]


def question(number: int = 0, room: int = 0, task: str = "size") -> Prompt:
    image = Image.fromarray(np.full((40, 60, 3), 128, dtype=np.uint8))
    content = [{"type": "image", "image": image}, {"type": "text", "text": "<b>how</b>?"}]
    sample = Sample.from_messages(
        [{"role": "user", "content": content}],
        id=f"q{number}",
        answer={"type": "number", "value": 3},
        metadata={"task": task, "room_seed": room},
    )
    return make_prompt(sample, number=number)


def record(number: int, texts: list[str], rewards: list[float], verdict: str = "keep", **more: object) -> GroupRecord:
    scored = [Reward(r, 1.0, 0.5 + r / 2, "mra") for r in rewards]
    lengths = [len(t) for t in texts]
    finishes = ["length" if len(t) > 100 else "stop" for t in texts]
    return GroupRecord(question(number, **more), texts, lengths, finishes, scored, [0.0] * len(texts), verdict)  # type: ignore[arg-type]
