"""pack: offsets, slots, tower order and loss rows against a plain loop over the samples; validation; equality."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fake_data import FakeProcessor, fake_row
from fastvst.batch import IGNORE, NORMALISED, EncodedSample, PackedBatch, pack
from fastvst.data.sources.rows import to_sample
from fastvst_kernels import prepare

SIZES = st.tuples(st.integers(1, 9), st.integers(1, 9)).map(lambda s: f"{s[0]}x{s[1]}")
SAMPLES = st.lists(st.tuples(st.integers(3, 12), st.lists(SIZES, max_size=3)), min_size=1, max_size=5)


def encode(specs) -> list[EncodedSample]:
    rows = [fake_row(str(i), words, tuple(images)) for i, (words, images) in enumerate(specs)]
    return [FakeProcessor().encode(to_sample(row, source="s", where="w", folder=None)) for row in rows]


def text(length: int, supervised: list[int], name: str = "t") -> EncodedSample:
    (sample,) = encode([(length, [])])
    labels = torch.full((length,), IGNORE, dtype=torch.int32)
    labels[supervised] = sample.tokens[supervised]
    return dataclasses.replace(sample, labels=labels, id=name)


@settings(max_examples=40, deadline=None)
@given(SAMPLES)
def test_a_pack_is_the_concatenation_of_its_samples(specs) -> None:
    samples = encode(specs)
    batch = pack(samples)
    batch.validate()
    offsets = batch.cu_seqlens.tolist()
    targets = []
    vision = 0
    windows = 0
    frames = 0
    for index, sample in enumerate(samples):
        begin, end = offsets[index : index + 2]
        assert torch.equal(batch.tokens[begin:end], sample.tokens.long())
        assert torch.equal(batch.labels[begin:end], sample.labels.long())
        assert torch.equal(batch.positions[:, begin:end], sample.positions)
        for at, label in enumerate(sample.labels.tolist()):
            if label != IGNORE:
                targets.append((begin + at - 1, label))  # the row before predicts it
        slots = batch.vision_slots[vision : vision + len(sample.vision_slots)] - begin
        # Merged token j of the tower is token order[j] of the sample, in patches and slots.
        for j, unit in enumerate(sample.window_order.tolist()):
            tower = 4 * (vision + j)
            assert torch.equal(batch.patches[tower : tower + 4], sample.patches[4 * unit : 4 * unit + 4])
            assert slots[j] == sample.vision_slots[unit]
            assert batch.window_order[vision + j] == vision + unit
        assert batch.cu_windows[windows : windows + len(sample.window_lengths) + 1].diff().tolist() == (
            sample.window_lengths.tolist()
        )
        vision += len(sample.vision_slots)
        windows += len(sample.window_lengths)
        frames += len(sample.image_lengths)
    assert list(zip(batch.loss_rows.tolist(), batch.targets.tolist())) == targets
    assert batch.target_weights.tolist() == [1.0] * len(targets)
    assert (batch.loss_weights > 0).tolist() == (batch.labels != IGNORE).tolist()
    assert batch.cu_images.numel() == frames + 1
    assert batch.max_seqlen == max(len(s) for s in samples)
    assert batch.max_image == max([0, *(int(s.image_lengths.max()) for s in samples if len(s.image_lengths))])
    assert batch.flops == sum(s.cost.flops for s in samples)
    assert batch.sample_ids == tuple(f"s/{i}" for i in range(len(samples)))


def test_completions_of_a_shared_prompt_begin_after_its_last_row() -> None:
    prompt = text(4, [])
    first = text(3, [0, 1, 2])
    second = text(2, [0, 1])
    alone = text(3, [0, 2])
    weights = [torch.full((len(s),), w) for s, w in ((prompt, 9.0), (first, 0.5), (second, 2.0), (alone, 1.0))]
    batch = pack([prompt, first, second, alone], groups=[-1, 0, 0, -1], loss_weights=weights)
    batch.validate()
    # No row predicts a first token without a prompt before it (row 9), so it is no target.
    assert batch.loss_rows.tolist() == [3, 4, 5, 3, 7, 10]
    assert batch.targets.tolist() == [*first.tokens.tolist(), *second.tokens.tolist(), int(alone.tokens[2])]
    assert batch.target_weights.tolist() == [0.5] * 3 + [2.0] * 2 + [1.0]


def test_nothing_to_pack_and_impossible_groups_are_errors() -> None:
    with pytest.raises(ValueError, match="at least one encoded sample"):
        pack([])
    samples = [text(3, [1]) for _ in range(3)]
    for groups, message in (
        ([0, -1, -1], "before its completions"),
        ([-1, 0, 1], "itself a completion"),
        ([-1, -1, 0], "without gaps"),
        ([-1, 0], "expected .3"),
    ):
        with pytest.raises(ValueError, match=message):
            pack(samples, groups=groups)


def test_validate_names_the_broken_field() -> None:
    batch = pack(encode([(5, ["2x3"]), (6, [])]))
    breaks: dict[str, torch.Tensor | tuple[str, ...]] = {
        "cu_seqlens": batch.cu_seqlens + 1,
        "labels": batch.labels[1:],
        "positions": batch.positions[:2],
        "vision_slots": batch.vision_slots + 1000,
        "loss_rows": batch.loss_rows - 1000,
        "sample_ids": ("one",),
    }
    for name, value in breaks.items():
        with pytest.raises(ValueError, match=name):
            dataclasses.replace(batch, **{name: value}).validate()
    doubled = batch.vision_slots.clone()
    doubled[0] = doubled[1]
    with pytest.raises(ValueError, match="vision_slots names a row twice"):
        dataclasses.replace(batch, vision_slots=doubled).validate()


def test_equality_sees_every_field() -> None:
    batch, again = (pack(encode([(5, ["2x3"]), (6, [])])) for _ in range(2))
    assert batch.equal(again)
    for field in dataclasses.fields(PackedBatch):
        value = getattr(batch, field.name)
        if field.name == "groups":
            other = torch.zeros(2, dtype=torch.int32)
        elif isinstance(value, torch.Tensor):
            other = value.double()  # same values, other dtype
        else:
            other = ("x",) if isinstance(value, tuple) else value + 1
        assert not batch.equal(dataclasses.replace(batch, **{field.name: other})), field.name


def test_plans_follow_a_batch_to_a_device_and_not_to_other_offsets() -> None:
    batch = pack(encode([(5, ["2x3"]), (6, [])]))
    assert (
        batch.plan is None and batch.to("cpu").plan is None and pack(encode([(3, [])])).with_plans().image_plan is None
    )
    moved = batch.to("meta")
    assert moved.plan.num_tokens == 17 and moved.image_plan.num_tokens == 24 and moved.plan.causal
    assert all(table.is_meta for table in (*moved.plan.queries.values(), *moved.image_plan.keys.values()))
    planned = batch.with_plans()
    assert planned.with_plans() is planned and planned.equal(batch)
    wanted = prepare(batch.cu_seqlens, causal=True)
    assert all(torch.equal(planned.plan.queries[block], table) for block, table in wanted.queries.items())
    q = torch.zeros(17, 2, 16)
    planned.plan.check(q, planned.cu_seqlens, None, True)
    with pytest.raises(ValueError, match="for other offsets"):
        planned.plan.check(q, torch.tensor([0, 9, 17], dtype=torch.int32), None, True)
    assert dataclasses.replace(planned, cu_seqlens=batch.cu_seqlens + 0).plan is None


def test_moving_keeps_everything_and_a_description_counts() -> None:
    batch = pack(encode([(5, ["2x3"]), (6, [])]))
    assert batch.to("cpu").equal(batch) and batch.to("meta").tokens.device.type == "meta"
    line = batch.describe()
    assert (
        "2 sequences, 17 tokens (14" not in line and "2 sequences, 17 tokens" in line and "1 images, 24 patches" in line
    )


def test_uint8_patches_become_the_float32_ones_on_the_way_to_the_tower() -> None:
    from PIL import Image

    from fastvst.data import Processor, Sample

    def sample(name: str, *sizes: tuple[int, int]) -> Sample:
        images = [Image.effect_noise(size, 80).convert("RGB") for size in sizes]
        parts = [{"type": "image", "image": image} for image in images] + [{"type": "text", "text": "What?"}]
        messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "A chair."}]
        return Sample.from_messages(messages, id=name)

    floats = Processor.preset("tiny", image_mean=(0.4, 0.5, 0.6), image_std=(0.2, 0.3, 0.25))
    samples = [sample("a", (84, 56), (60, 140)), sample("text"), sample("b", (56, 300))]
    plain = pack([floats.encode(one) for one in samples])
    light = pack([floats.with_uint8_patches().encode(one) for one in samples])
    light.validate()
    assert plain.patches.dtype == torch.float32 and light.patches.dtype == torch.uint8
    assert plain.pixel_values() is plain.patches
    torch.testing.assert_close(light.pixel_values(), plain.patches, rtol=3e-7, atol=3e-7)  # 2 units of rounding
    assert dataclasses.replace(light, patches=plain.patches, pixel_stats=NORMALISED).equal(plain)
    assert light.patches.nbytes * 4 == plain.patches.nbytes
    only_text = pack([floats.with_uint8_patches().encode(sample("t"))])
    assert only_text.pixel_values().shape == (0, 1176) and only_text.pixel_values().dtype == torch.float32
    with pytest.raises(ValueError, match="memory/b has torch.float32 patches.*encode both with one processor"):
        pack([floats.with_uint8_patches().encode(samples[0]), floats.encode(samples[2])])
    with pytest.raises(ValueError, match="no pixel_stats"):
        dataclasses.replace(light, pixel_stats=NORMALISED).pixel_values()
    with pytest.raises(ValueError, match="no pixel_stats"):
        dataclasses.replace(light, pixel_stats=NORMALISED).validate()
