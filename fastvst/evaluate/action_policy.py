"""ActionPolicy: a trained model as a function of a simulator's observations (see episodes.py).

It asks the question of the training rows, decodes all observations as one batch of the engine, and allows only tokens
that make an action at each position of the answer. Evaluations take the most likely action; reinforcement learning
samples, and keeps prompt and completion (`decide`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastvst import jsonl
from fastvst.batch import EncodedSample
from fastvst.config import from_dict
from fastvst.data.sample import Sample
from fastvst.data.sources.action_rows import ActionRows, Step, question_row
from fastvst.data.sources.rows import to_sample
from fastvst.rollout import Engine, Rollout, SamplingParams
from fastvst.vla import ActionError
from fastvst.vla.replies import Observation


def recorded_actions(model: str | Path) -> ActionRows:
    """The options of the actions in config.json of the run that wrote the model directory `model`.

    Raises:
        ValueError: there are none, or its sources have different ones.
    """
    path = Path(model).absolute().parent / "config.json"
    settings: dict[str, Any] = jsonl.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    sources = settings.get("data", {}).get("sources", [])
    found = [one["actions"] for one in (settings, *sources) if one.get("actions")]
    if not found:
        raise ValueError(f"{path} names no source of actions")
    if any(one != found[0] for one in found):
        raise ValueError(f"the sources in {path} have different actions")
    return from_dict(ActionRows, found[0])


@dataclass(frozen=True)
class Decision:
    """What the model answered to one observation.

    Attributes:
        action: (chunk, dims) float64 in the units of the simulator, or why the completion is no action.
    """

    prompt: EncodedSample
    rollout: Rollout
    action: np.ndarray | ActionError


class ActionPolicy:
    """Chunks of actions for observations, greedy.

    Args:
        engine: with a processor whose tokenizer has the tokens of the codec.
        actions: of the training data. Its `cameras` count; their names are those of the training files, so images are
            taken in the order of the simulator's cameras.
        blind: show a grey image instead of the camera's, to measure what the images are worth.

    Raises:
        ValueError: an engine without a processor, or a tokenizer without the tokens.
    """

    def __init__(self, engine: Engine, actions: ActionRows, *, blind: bool = False) -> None:
        if engine.processor is None:
            raise ValueError("the engine needs a processor, which turns questions into tokens")
        self.engine = engine
        self.processor = engine.processor
        self.actions = dataclasses.replace(actions, augment=0.0)
        self.blind = blind
        allowed = actions.codec.allowed(self.processor.tokenizer)
        self.params = SamplingParams(temperature=0, max_tokens=len(allowed), allowed=allowed, logprobs=False)

    def __call__(self, observations: Sequence[Observation]) -> list[np.ndarray | ActionError]:
        """(chunk, dims) float64 for each observation, in the units of the simulator; an ActionError where the answer is
        none."""
        return [decision.action for decision in self.decide(observations, [self.params] * len(observations))]

    def decide(self, observations: Sequence[Observation], params: Sequence[SamplingParams]) -> list[Decision]:
        """One decision for each observation, sampled with its own parameters: `params` of this class, or like it."""
        prompts = [self.engine.encode(self.prompt(one), each) for one, each in zip(observations, params, strict=True)]
        rollouts = [rollout for (rollout,) in self.engine.generate(prompts, params)]
        return [Decision(p, r, self._action(r)) for p, r in zip(prompts, rollouts, strict=True)]

    def _action(self, rollout: Rollout) -> np.ndarray | ActionError:
        try:
            return self.actions.codec.decode_tokens(rollout.tokens, self.processor.tokenizer)
        except ActionError as error:
            return error

    def prompt(self, observation: Observation) -> Sample:
        """The question of the training rows about an observation."""
        wanted = max(1, len(self.actions.cameras))
        shown = list(observation.images.values())[:wanted]
        if len(shown) < wanted:
            raise ValueError(f"the simulator shows {len(shown)} images; the model was trained with {wanted} cameras")
        if self.blind:
            shown = [np.full_like(one, 128) for one in shown]
        images = [Image.fromarray(np.ascontiguousarray(one)) for one in shown]
        still = np.zeros((1, self.actions.dims))  # an answer that is left out again
        step = Step(
            "observation", images, observation.instruction, still, observation.proprioception, self.actions.side
        )
        sample = to_sample(question_row(step, self.actions), source="simulator", where="observation", folder=Path())
        asked = [message for message in sample.messages if message["role"] != "assistant"]
        return dataclasses.replace(sample, messages=asked)
