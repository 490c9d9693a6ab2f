"""Groups in packs: every completion is in one pack, and both layouts have the same targets."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvst.data import Processor, Sample, pack
from fastvst.rl.packing import Answer, Group, divide_into_packs, make_pack
from rl_groups import make_groups, prompt_samples, small_processor


@pytest.fixture(scope="module")
def processor() -> Processor:
    return small_processor()


class PromptOfLength:
    """All that `divide_into_packs` reads of a prompt."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length


def marked(mark: int, length: int) -> Answer:
    return Answer(torch.full((length,), mark), torch.zeros(length))


@given(
    st.lists(st.tuples(st.integers(1, 60), st.lists(st.integers(0, 40), min_size=1, max_size=6)), max_size=12),
    st.integers(100, 300),
    st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_every_completion_is_in_one_pack_and_no_pack_exceeds_its_budget(shapes: Any, budget: int, shared: bool) -> None:
    groups = [
        Group(PromptOfLength(length), tuple(marked(100 * g + a, n) for a, n in enumerate(sizes)))  # type: ignore[arg-type]
        for g, (length, sizes) in enumerate(shapes)
    ]
    packs, sharing = divide_into_packs(groups, budget, shared=shared)
    marks = [int(a.tokens[0]) for members in packs for g in members for a in g.answers]
    assert sorted(marks) == [100 * g + a for g, (_, sizes) in enumerate(shapes) for a, n in enumerate(sizes) if n]
    sizes = [sum(len(g.prompt) + g.completion_tokens for g in members) for members in packs]
    assert all(size <= budget for size in sizes) and sum(sizes) == sharing.shared <= sharing.repeated
    if not shared:
        assert sharing.shared == sharing.repeated and sharing.split == 0
    alone = [sum(s) + length <= budget for length, s in shapes if any(s)]
    assert not shared or sharing.split == alone.count(False)


def test_a_completion_continues_its_prompt(processor: Processor) -> None:
    """Tokens and positions of the repeated layout equal those of the encoded conversation with the completion."""
    (sample,) = prompt_samples(1)
    prompt = processor.encode(sample, add_generation_prompt=True)
    whole = Sample.from_messages([*sample.messages, {"role": "assistant", "content": "two metres"}], id="0")
    expected = processor.encode(whole)
    answer = Answer(expected.tokens[len(prompt) :], torch.zeros(len(expected) - len(prompt)))
    made = make_pack([Group(prompt, (answer,))], processor.model_config, shared=False).batch
    assert torch.equal(made.tokens, expected.tokens.long()) and torch.equal(made.positions, expected.positions)
    assert made.num_targets == len(answer.tokens) and torch.equal(made.targets, answer.tokens.long())


def test_both_layouts_have_the_same_targets_and_count_their_flops(processor: Processor) -> None:
    groups = make_groups(processor, 5)
    shared, repeated = (make_pack(groups, processor.model_config, shared=s) for s in (True, False))
    shared.batch.validate()
    for name in ("advantages", "rollout_logprobs", "sequence_ids"):
        assert torch.equal(getattr(shared, name), getattr(repeated, name))
    assert torch.equal(shared.batch.targets, repeated.batch.targets)
    assert shared.batch.num_patches * 4 == repeated.batch.num_patches
    assert shared.batch.flops < 0.5 * repeated.batch.flops
    again = pack([processor.encode(s, add_generation_prompt=True) for s in prompt_samples(5)])
    assert shared.batch.num_images == again.num_images and make_pack([], processor.model_config).batch.num_tokens == 1
