"""ActionPolicy: the question of training, answers that are always actions, one batch or many."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from action_data import actions, write_libero
from fastvst.data import Processor
from fastvst.data.sources import open_source
from fastvst.data.sources.action_rows import ActionRows
from fastvst.evaluate.action_policy import ActionPolicy
from fastvst.model import Qwen25VL
from fastvst.rollout import Engine
from fastvst.vla.replies import Observation
from small_run import small_config


@pytest.fixture(scope="module")
def engine() -> Engine:
    torch.manual_seed(0)
    config = small_config()
    processor = Processor.preset("tiny", model_config=config, max_pixels=112 * 112, max_seq_len=512)
    return Engine(Qwen25VL(config), processor, memory=1 << 24)


def observations(count: int, size: int = 64) -> list[Observation]:
    rng = np.random.default_rng(0)
    return [
        Observation(
            {
                "agentview": rng.integers(0, 256, (size, size, 3), np.uint8),
                "wrist": np.zeros((size, size, 3), np.uint8),
            },
            rng.uniform(size=9),
            np.zeros(3),
            "Open the drawer.",
            False,
            0,
        )
        for _ in range(count)
    ]


OPTIONS = ActionRows("text", 999, dims=4, chunk=2, side=64)


def test_every_answer_is_a_chunk_alone_and_in_a_batch(engine) -> None:
    policy = ActionPolicy(engine, OPTIONS)
    seen = observations(5)
    together = policy(seen)
    assert [chunk.shape for chunk in together] == [(2, 4)] * 5 and np.abs(np.stack(together)).max() <= 1
    for one, chunk in zip(seen, together, strict=True):
        assert np.array_equal(policy([one])[0], chunk)
    assert policy([]) == []


def test_the_prompt_is_that_of_the_training_row(engine, tmp_path) -> None:
    shown = write_libero(tmp_path / "open_the_drawer_demo.hdf5", {"demo_0": actions(3, dims=4)}, size=64)
    options = dataclasses.replace(OPTIONS, state=True, cameras=("agentview_rgb", "eye_in_hand_rgb"))
    (row, *_) = open_source(tmp_path, actions=options)
    with_state = dataclasses.replace(
        observations(1)[0],
        images={
            "agentview": np.rot90(shown["demo_0"][0], 2),
            "robot0_eye_in_hand": np.rot90(shown["demo_0"][2], 2),
        },
        proprioception=np.arange(9) / 100,
    )
    found = engine.processor.encode(ActionPolicy(engine, options).prompt(with_state), add_generation_prompt=True)
    wanted = engine.processor.encode(row, add_generation_prompt=True)
    assert torch.equal(found.tokens, wanted.tokens) and torch.equal(found.patches, wanted.patches)


def test_a_blind_policy_sees_no_image(engine) -> None:
    seen = observations(3)
    blind = ActionPolicy(engine, OPTIONS, blind=True)
    assert len({chunk.tobytes() for chunk in blind(seen)}) == 1


def test_what_cannot_be_asked_is_refused(engine) -> None:
    with pytest.raises(ValueError, match="1 images; the model was trained with 2"):
        two = ActionPolicy(engine, dataclasses.replace(OPTIONS, cameras=("a", "b")))
        two([dataclasses.replace(observations(1)[0], images={"a": np.zeros((8, 8, 3), np.uint8)})])
    with pytest.raises(ValueError, match="lacks"):
        ActionPolicy(engine, ActionRows("tokens"))
