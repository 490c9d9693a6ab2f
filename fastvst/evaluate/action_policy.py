"""ActionPolicy: a trained model as a function of a simulator's observations (see episodes.py).

It asks the question of the training rows, decodes all observations as one batch of the engine, and allows only tokens
that make an action at each position of the answer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from fastvst.data.sample import Sample
from fastvst.data.sources.action_rows import ActionRows, Step, question_row
from fastvst.data.sources.rows import to_sample
from fastvst.rollout import Engine, SamplingParams
from fastvst.vla import ActionError
from fastvst.vla.replies import Observation


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
        prompts = [self.prompt(one) for one in observations]
        found: list[np.ndarray | ActionError] = []
        for (rollout,) in self.engine.generate(prompts, self.params):
            try:
                found.append(self.actions.codec.decode_tokens(rollout.tokens, self.processor.tokenizer))
            except ActionError as error:
                found.append(error)
        return found

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
