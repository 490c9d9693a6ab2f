"""An engine without a model: completions have pseudo-random lengths and tokens. For tests of the sampling phase."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fastvst.batch import EncodedSample
from fastvst.rl.prompts import Prompt
from fastvst.rollout import Rollout, SamplingParams


@dataclass
class ScriptedRequest:
    """Completions with the tokens that they will have."""

    scripts: list[list[int]]
    limit: int
    drawn: list[list[int]] = field(default_factory=list)
    rollouts: list[Rollout | None] = field(default_factory=list)

    @property
    def done(self) -> bool:
        return None not in self.rollouts

    def end(self, index: int, reason: str) -> None:
        tokens = self.drawn[index]
        text = " ".join(map(str, tokens))
        self.rollouts[index] = Rollout(tokens, text, [-1.0] * len(tokens), [], reason, 0.0, 0.0)


@dataclass
class ScriptedEngine:
    """Has the methods of RankEngine that the sampling phase calls; `rows` completions get a token in a step."""

    rows: int = 8
    slots: int = 12
    seconds: dict[str, float] = field(default_factory=lambda: {"prefill": 0.0, "decode": 0.0})
    running: list[tuple[ScriptedRequest, int]] = field(default_factory=list)
    asked: list[tuple[int, int]] = field(
        default_factory=list
    )  # (prompt's number, tokens of the sample) of each request

    problem: Exception | None = None
    figures: dict[str, float] = field(default_factory=dict)

    def open(self) -> None:
        pass

    def fail(self) -> None:
        raise AssertionError("this engine has no problem")

    def add(
        self, prompt: Prompt, samples: Sequence[EncodedSample], params: Sequence[SamplingParams]
    ) -> list[ScriptedRequest]:
        made = []
        for sample, p in zip(samples, params, strict=True):
            self.asked.append((prompt.number, len(sample)))
            rng = random.Random(f"{p.seed} {prompt.number} {len(sample)}")
            scripts = [
                [rng.randrange(300, 400) for _ in range(rng.randint(1, 2 * p.max_tokens))][: p.max_tokens]
                for _ in range(p.n)
            ]
            made.append(ScriptedRequest(scripts, p.max_tokens, [[] for _ in scripts], [None] * p.n))
            self.running += [(made[-1], index) for index in range(p.n)]
        return made

    def step(self) -> bool:
        ended = False
        for request, index in self.running[: self.rows]:
            drawn = request.drawn[index]
            drawn.append(request.scripts[index][len(drawn)])
            if len(drawn) == len(request.scripts[index]):
                request.end(index, "length" if len(drawn) == request.limit else "stop")
                ended = True
        self.running = [(r, i) for r, i in self.running if r.rollouts[i] is None]
        return ended

    def cancel(self, request: Any) -> None:
        for index, rollout in enumerate(request.rollouts):
            if rollout is None:
                request.end(index, "cancelled")
        self.running = [(r, i) for r, i in self.running if r is not request]

    @property
    def idle(self) -> bool:
        return not self.running


def as_row(record: Any) -> dict[str, Any]:
    """A GroupRecord as plain values that can be compared and sent between processes."""
    plain = {f.name: getattr(record, f.name) for f in dataclasses.fields(record) if f.name != "prompt"}
    return plain | {"number": record.prompt.number, "rewards": [dataclasses.astuple(r) for r in record.rewards]}
