"""Launches, matrix products, compilations and waits of the host, counted on meta tensors without a GPU."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from torch import Tensor

from fastvst.batch import PackedBatch, pack
from fastvst.model import ModelConfig, Qwen25VL
from fastvst.model.decoder import DecoderLayer
from fastvst.model.layers import run_block
from fastvst.model.qwen25vl import attend_packed
from fastvst.model.vision import VisionBlock
from fastvst.train.optimizer import clip_gradients
from fastvst_kernels import packed_attention, prepare
from fastvst_kernels.window import op as window_op
from hf_parity import make_sample
from launches import Launches

ROW = [("text", 90), ("image", 6, 8), ("text", 70), ("video", 2, 4, 6, 1.0), ("text", 30)]


@pytest.fixture(autouse=True)
def windows_by_kernel(monkeypatch):
    """What the windows keep for the backward pass follows from the choice of the kernel, so from the device."""
    monkeypatch.setattr(window_op, "uses_kernel", lambda *_: True)


def batch_of(config: ModelConfig) -> PackedBatch:
    return pack([make_sample(config, ROW, seed=i) for i in range(3)]).to("meta")


def layer_of(config: ModelConfig) -> DecoderLayer:
    with torch.device("meta"):
        return DecoderLayer(config, 0).to(torch.bfloat16)


def block_of(config: ModelConfig, *, windowed: bool) -> VisionBlock:
    with torch.device("meta"):
        return VisionBlock(config.vision, windowed=windowed).to(torch.bfloat16)


def rows_of(count: int, width: int) -> Tensor:
    return torch.empty(count, width, dtype=torch.bfloat16, device="meta", requires_grad=True)


def counted(block, x: Tensor, *args) -> tuple[Launches, Launches]:
    """Launches of a block under `light`, forward and backward; the tables of angles are made once for a run."""
    with Launches():
        run_block(block, "light", x, *args)
    with Launches() as forward:
        y = run_block(block, "light", x, *args)
    with Launches() as backward:
        y.backward(torch.empty_like(y))
    return forward, backward


def said(found: Launches) -> str:
    return f"{found.total}: {dict(found.launches)}"


@pytest.mark.parametrize("preset", ["3b", "7b"])
def test_a_decoder_layer(preset):
    config = ModelConfig.preset(preset)
    batch = batch_of(config)
    x = rows_of(batch.num_tokens, config.hidden_size)
    forward, backward = counted(layer_of(config), x, batch.positions, attend_packed(batch))
    assert forward.total <= 9, said(forward)
    assert backward.total <= 20, said(backward)
    assert len(forward.products) == 4 and len(backward.products) == 9  # each twice, and o_proj again
    assert not forward.waits and not backward.waits


@pytest.mark.parametrize("windowed", [True, False])
def test_a_vision_block(windowed):
    config = ModelConfig.preset("7b")
    batch = batch_of(config)
    x = rows_of(batch.num_patches, config.vision.hidden_size)
    offsets = (batch.cu_windows, batch.max_window) if windowed else (batch.cu_images, batch.max_image, batch.image_plan)
    forward, backward = counted(block_of(config, windowed=windowed), x, batch.vision_positions, *offsets)
    assert forward.total <= 10, said(forward)
    assert backward.total <= 23, said(backward)
    assert backward.launches["sum"] == 0, "a bias's gradient has a pass of its own"
    assert not forward.waits and not backward.waits


def test_without_a_plan_every_layer_would_make_one():
    """A test of the counter: the launches of the plan are seen."""
    config = ModelConfig.preset("3b")
    batch = dataclasses.replace(batch_of(config))  # without plans

    def attend(_, q, k, v):
        return packed_attention(q, k, v, batch.cu_seqlens, causal=True)

    with Launches() as forward, torch.no_grad():
        layer_of(config)(rows_of(batch.num_tokens, config.hidden_size), batch.positions, attend, light=False)
    assert forward.total > 60


@pytest.mark.parametrize("preset", ["3b", "7b"])
def test_every_product_of_a_step_is_aligned_and_nothing_waits(preset):
    """Forward and backward passes of the model with two decoder layers and nine blocks, one of them of whole frames."""
    config = ModelConfig.preset(preset)
    tower = dataclasses.replace(config.vision, depth=9, fullatt_block_indexes=(7,))
    config = dataclasses.replace(config, num_hidden_layers=2, vision=tower)
    with torch.device("meta"):
        model = Qwen25VL(config).to(torch.bfloat16)
    batch = batch_of(config)
    for policy in ("light", "full"):
        model.recompute = policy
        with Launches() as found:
            hidden = model(batch, head=torch.nn.functional.linear)
            hidden.backward(torch.empty_like(hidden))
        assert len(found.products) > 100 and not found.waits
        wrong = [p for p in found.products if not p.aligned or p.bias_into_gaps]
        assert not wrong, wrong[:3]


def test_the_lint_sees_what_the_tower_had_before_its_padding():
    a, b = (torch.empty(40, width, dtype=torch.bfloat16, device="meta") for width in (3420, 1280))
    out = torch.empty(40, 3424, dtype=torch.bfloat16, device="meta")[:, :3420]
    with Launches() as found:
        torch.mm(a.t(), b)
        torch.mm(torch.empty(40, 3456, dtype=torch.bfloat16, device="meta").t(), b)
        torch.addmm(a[0], b, b.new_empty(1280, 3420), out=out)
    assert [p.aligned for p in found.products] == [False, True, False]
    assert [p.bias_into_gaps for p in found.products] == [False, False, True]


def test_clipping_has_no_slow_path():
    """A factor of another dtype makes torch multiply tensor by tensor, 730 launches a step for the 7b."""
    parameters = [torch.nn.Parameter(torch.ones(3, 5)) for _ in range(4)]
    for parameter in parameters:
        parameter.grad = torch.full((3, 5), 7.0)
    with Launches() as found:
        clip_gradients(parameters, 1.0)
    assert found.launches["_foreach_mul_"] == 1 and found.launches["_foreach_norm"] == 1 and not found.waits
    assert found.total <= 12
    mixed = [args for name, args in found.foreach if name == "_foreach_mul_"]
    assert all(factor.dtype == tensor.dtype for tensors, factor in mixed for tensor in tensors)


def random_pack(rng: random.Random, config: ModelConfig) -> tuple[int, int, dict]:
    """Rows of the decoder and of the tower, and the tensors that describe them; sizes 1, 3, 16 and odd ones too."""
    lengths = [rng.choice((1, 3, 16, 17, rng.randint(1, 4000))) for _ in range(rng.randint(1, 9))]
    windows = [4 * rng.randint(1, 16) for _ in range(rng.randint(1, 60))]
    frames = [sum(windows[i : i + 7]) for i in range(0, len(windows), 7)]
    tensors = {}
    for name, sizes, causal in (("text", lengths, True), ("frames", frames, False)):
        offsets = torch.tensor([0, *torch.tensor(sizes).cumsum(0).tolist()], dtype=torch.int32)
        tensors[name] = (offsets.to("meta"), prepare(offsets, causal=causal).to("meta"), max(sizes))
    edges = torch.tensor([0, *torch.tensor(windows).cumsum(0).tolist()], dtype=torch.int32)
    tensors["windows"] = (edges.to("meta"), max(windows))
    return sum(lengths), sum(windows), tensors


def test_two_hundred_packs_of_any_size_compile_nothing_new():
    """What triton compiles for the first pack serves all; another compilation would stop one rank while others wait."""
    rng = random.Random(0)
    config = ModelConfig.preset("7b")
    layer = layer_of(config)
    blocks = {windowed: block_of(config, windowed=windowed) for windowed in (True, False)}
    keys: list[dict[str, int]] = []
    found = Launches()
    for _ in range(200):
        tokens, patches, tensors = random_pack(rng, config)
        offsets, plan, longest = tensors["text"]
        positions = torch.empty(3, tokens, dtype=torch.int32, device="meta")

        def attend(_, q, k, v, offsets=offsets, plan=plan, longest=longest):
            return packed_attention(q, k, v, offsets, causal=True, max_seqlen=longest, plan=plan)

        with found:
            y = run_block(layer, "light", rows_of(tokens, config.hidden_size), positions, attend)
            y.backward(torch.empty_like(y))
            places = torch.empty(patches, 2, dtype=torch.int32, device="meta")
            frames, frame_plan, largest = tensors["frames"]
            for windowed, where in ((True, tensors["windows"]), (False, (frames, largest, frame_plan))):
                x = rows_of(patches, config.vision.hidden_size)
                y = run_block(blocks[windowed], "light", x, places, *where)
                y.backward(torch.empty_like(y))
        keys.append({name: len(values) for name, values in found.keys.items()})
    assert keys[-1] == keys[0]
    # Twice: for the decoder and for the tower; the norm's forward also alone and with a sum before it, and the tower's
    # backward also with the sums for its biases.
    more = {name: count for name, count in keys[0].items() if count > 2}
    assert more == {"rms_norm_forward_kernel": 4, "rms_norm_backward_kernel": 3}


@pytest.mark.parametrize("preset", ["3b", "7b"])
def test_all_buckets_of_decoding_compile_the_same_kernels(preset):
    from fastvst.rollout.cuda_graphs import BUCKETS
    from fastvst_kernels.decode.kernels import decode
    from fastvst_kernels.decode.tables import PageTables

    config = ModelConfig.preset(preset)

    def meta(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    pages = meta(400, 16, config.num_key_value_heads, config.head_dim, dtype=torch.bfloat16)
    found = Launches()
    for rows in (*BUCKETS, 160, 512):
        q = meta(rows, config.num_attention_heads, config.head_dim, dtype=torch.bfloat16)
        for own, prefix, group, splits in ((1, 1, 1, 1), (8, 128, 8, 5), (64, 33, 16, 16), (3, 7, 2, 2)):
            tables = PageTables(
                meta(rows, own), meta(rows), meta(rows, prefix), meta(rows), meta(rows + 1), min(group, rows)
            )
            with found:
                decode(q, pages, pages, tables, 0.1, splits=splits)
    # The partial kernel: prompts in tiles of 16 and of 64 queries.
    assert {name: len(values) for name, values in found.keys.items()} == {
        "decode_partial_kernel": 2,
        "decode_merge_kernel": 1,
    }
