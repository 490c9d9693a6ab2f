"""Positions and windows against transformers' own functions and against the published rule for videos."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers.vision_utils import get_vision_cu_seqlens, get_vision_position_ids, get_vision_window_index

from fastvst.model.positions import IMAGE, TEXT, VIDEO, mrope_positions, vision_layout
from hf_parity import make_models, make_sample, small_config

sides = st.integers(1, 20)
grids = st.lists(st.tuples(st.integers(1, 3), sides, sides).map(lambda g: (g[0], 2 * g[1], 2 * g[2])), max_size=4)


@settings(max_examples=60, deadline=None)
@given(grids.filter(len), st.sampled_from([(112, 14), (56, 14), (96, 16)]))
def test_layout_equals_transformers(grids, sizes):
    window, patch = sizes
    layout = vision_layout(grids, window_size=window, patch_size=patch)
    tensor = torch.tensor(grids)
    order, offsets = get_vision_window_index(tensor, spatial_merge_size=2, window_size=window, patch_size=patch)
    assert torch.equal(torch.from_numpy(layout.window_order), order)
    assert torch.equal(torch.from_numpy(layout.window_lengths), offsets.diff())
    assert torch.equal(torch.from_numpy(layout.image_lengths), get_vision_cu_seqlens(tensor).diff())
    ids = get_vision_position_ids(tensor, 2).view(-1, 4, 2)[order].view(-1, 2)
    assert torch.equal(torch.from_numpy(layout.positions).long(), ids)


def test_layout_of_nothing_and_of_a_window_below_one_patch():
    layout = vision_layout([])
    assert layout.window_order.shape == (0,) and layout.positions.shape == (0, 2)
    with pytest.raises(ValueError, match="window_size 14 is smaller"):
        vision_layout([(1, 2, 2)], window_size=14)


parts = st.lists(
    st.one_of(
        st.tuples(st.just("image"), sides, sides),
        st.tuples(st.just("video"), st.integers(1, 6), st.integers(1, 6), st.integers(1, 6), st.floats(0.0, 5.0)),
        st.tuples(st.just("text"), st.integers(1, 30)),
    ),
    max_size=5,
).map(lambda p: [("text", 1), *p, ("text", 2)])


def lay_out(parts):
    modality = []
    shapes = []
    seconds = []
    for kind, *n in parts:
        if kind == "text":
            modality += [TEXT] * n[0]
            continue
        t, h, w = (1, *n) if kind == "image" else n[:3]
        modality += [TEXT] + [IMAGE if kind == "image" else VIDEO] * (t * h * w) + [TEXT]
        shapes.append((t, 2 * h, 2 * w))
        if kind == "video":
            seconds.append(n[3])
    return np.asarray(modality), shapes, seconds


@settings(max_examples=40, deadline=None)
@given(parts=parts)
def test_grid_rule_equals_transformers(hf, parts):
    config, theirs = hf
    sample = make_sample(config, parts)
    modality, shapes, seconds = lay_out(parts)
    assert np.array_equal(sample.tokens.numpy() >= 90, modality != TEXT) or len(shapes)
    kinds = torch.from_numpy(modality)[None].int()
    at = 0
    images = []
    videos = []
    for shape in shapes:
        at = int(np.flatnonzero(modality[at:] != TEXT)[0]) + at
        (images if modality[at] == IMAGE else videos).append(shape)
        at += shape[0] * shape[1] * shape[2] // 4
    options = {}
    if images:
        options["image_grid_thw"] = torch.tensor(images)
    if videos:
        options |= {"video_grid_thw": torch.tensor(videos), "second_per_grid_ts": seconds}
    expected, _ = theirs.model.get_rope_index(sample.tokens.long()[None], mm_token_type_ids=kinds, **options)
    assert np.array_equal(sample.positions.numpy(), expected[:, 0].numpy())


@pytest.fixture(scope="module")
def hf():
    config = small_config(video_rule="grid")
    return config, make_models(config, torch.float32)[1]


@settings(max_examples=40, deadline=None)
@example([("text", 1), ("video", 4, 1, 1, 1.4), ("text", 2)], 25)
@given(parts, st.sampled_from([1, 2, 25]))
def test_extent_rule_is_the_published_one(parts, per_second):
    """Text continues at 1 + the largest coordinate so far (Qwen2.5-VL arXiv 2502.13923 §2.1.3; transformers 4.49).

    Frame positions are `(torch.arange(t) * second_per_grid_t * tokens_per_second).long()`, as there.
    """
    modality, shapes, seconds = lay_out(parts)
    got = mrope_positions(
        modality, shapes, second_per_grid_ts=seconds, tokens_per_second=per_second, video_rule="extent"
    )
    expected = []
    at = 0
    shape_of = iter(shapes)
    step_of = iter(seconds)
    while at < len(modality):
        start = 1 + max((max(p) for p in expected), default=-1)
        if modality[at] == TEXT:
            expected.append((start,) * 3)
            at += 1
            continue
        t, h, w = next(shape_of)
        frames = torch.arange(t)
        if modality[at] == VIDEO:
            frames = (frames * next(step_of) * per_second).long()
        for frame in frames.tolist():
            for row in range(h // 2):
                for column in range(w // 2):
                    expected.append((start + frame, start + row, start + column))
        at = len(expected)
    assert np.array_equal(got, np.asarray(expected).T)


def test_rules_agree_on_images_and_differ_on_long_videos():
    image = np.asarray([TEXT] + [IMAGE] * 6 + [TEXT] * 2)
    assert np.array_equal(
        mrope_positions(image, [(1, 4, 6)], video_rule="grid"), mrope_positions(image, [(1, 4, 6)], video_rule="extent")
    )
    video = np.asarray([TEXT] + [VIDEO] * 4 + [TEXT])
    assert mrope_positions(video, [(4, 2, 2)], video_rule="extent")[:, -1].tolist() == [8] * 3  # 1 + 2 * 3 + 1
    assert mrope_positions(video, [(4, 2, 2)], video_rule="grid")[:, -1].tolist() == [2] * 3


@pytest.mark.parametrize(
    "modality, grids",
    [
        ([TEXT] + [IMAGE] * 3, [(1, 4, 2)]),
        ([TEXT, IMAGE], []),
        ([TEXT, TEXT], [(1, 2, 2)]),
        ([IMAGE, IMAGE, TEXT, IMAGE], [(1, 2, 4)]),
        ([IMAGE, VIDEO], [(1, 2, 4)]),
    ],
)
def test_counts_that_do_not_match_raise(modality, grids):
    with pytest.raises(ValueError, match="vision tokens, but its"):
        mrope_positions(np.asarray(modality), grids)


def test_unknown_rule_raises():
    with pytest.raises(ValueError, match="video_rule is 'other'"):
        mrope_positions(np.zeros(1), [], video_rule="other")
