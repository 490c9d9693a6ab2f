"""rollouts.jsonl: every question that was asked, every answer, its reward by term, and pictures of some."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fastvst import jsonl
from fastvst.data.images import load_rgb
from fastvst.rl.prompts import Prompt
from fastvst.rl.rewards.verifiable import Reward

MAX_PIXELS = 178_956_970  # Pillow's own bomb limit
PICTURES = 2  # questions of each step whose pictures are kept


@dataclass
class Asked:
    """A question, its answers, and what became of them.

    Attributes:
        texts, lengths, finishes: of the n answers; lengths in tokens.
        rewards: by the reward functions; `penalties`: what was taken away for length (0 or below).
        verdict: "keep", "too_easy" or "too_hard".
        advantages: empty where the group was not kept.
    """

    prompt: Prompt
    texts: Sequence[str]
    lengths: Sequence[int]
    finishes: Sequence[str]
    rewards: Sequence[Reward]
    penalties: Sequence[float]
    verdict: str
    advantages: list[float] = field(default_factory=list)

    @property
    def totals(self) -> list[float]:
        """What is maximised, for each answer."""
        return [r.overall + p for r, p in zip(self.rewards, self.penalties, strict=True)]

    @property
    def accuracies(self) -> list[float]:
        return [r.accuracy for r in self.rewards]


class RolloutLog:
    """One file per rank, rank 0's is rollouts.jsonl. Rows of steps that a resumed run does again are dropped first."""

    def __init__(self, out: Path, *, rank: int, first_step: int) -> None:
        self.out = out
        self.path = out / ("rollouts.jsonl" if rank == 0 else f"rollouts-{rank:05d}.jsonl")
        out.mkdir(parents=True, exist_ok=True)
        jsonl.drop_from_step(self.path, first_step)

    def write(self, step: int, asked: Sequence[Asked]) -> None:
        """Append a step. Pictures of the first kept questions go to <out>/rollouts/."""
        shown = [a for a in asked if a.verdict == "keep"][:PICTURES]
        rows = []
        for one in asked:
            pictures = self._pictures(step, one.prompt) if any(one is s for s in shown) else []
            rows.append(_row(step, one, pictures))
        jsonl.append(self.path, rows, default=str)

    def _pictures(self, step: int, prompt: Prompt) -> list[str]:
        folder = self.out / "rollouts"
        folder.mkdir(exist_ok=True)
        names = []
        for index, part in enumerate(prompt.sample.parts("image")):
            picture = load_rgb(part["image"], max_source_pixels=MAX_PIXELS, time_limit=10.0)
            picture.thumbnail((448, 448))
            name = f"{step:06d}-{prompt.number}-{index}.jpg"
            picture.save(folder / name, quality=85)
            names.append(f"rollouts/{name}")
        return names


def _row(step: int, one: Asked, pictures: list[str]) -> dict[str, Any]:
    prompt = one.prompt
    advantages = one.advantages or [0.0] * len(one.texts)
    return {
        "step": step,
        "number": prompt.number,
        "id": prompt.sample.id,
        "source": prompt.sample.source,
        "task": prompt.task,
        "modes": list(prompt.modes),
        "question": prompt.question,
        "answer": prompt.answer.get("value") if isinstance(prompt.answer, dict) else prompt.answer,
        "pictures": pictures,
        "verdict": one.verdict,
        "answers": [
            {
                "text": text,
                "tokens": length,
                "finish": finish,
                **asdict(reward),
                "overlong": penalty,
                "advantage": round(advantage, 6),
            }
            for text, length, finish, reward, penalty, advantage in zip(
                one.texts, one.lengths, one.finishes, one.rewards, one.penalties, advantages, strict=True
            )
        ],
    }
