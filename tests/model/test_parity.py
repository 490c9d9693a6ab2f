"""Our model against transformers' Qwen2.5-VL, unpatched: hidden states, logits, loss and every gradient."""

import dataclasses

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from fastvst.batch import pack
from fastvst_kernels import linear_cross_entropy
from hf_parity import hf_forward, hf_name, make_models, make_sample, published_grads, relative, small_config

# float64: transformers rounds to float32 inside norms and rotary tables; we do the same in the same order.
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}
SLOW = {
    "deadline": None,
    "derandomize": True,  # a float64 value may lie on a float32 rounding boundary
    "suppress_health_check": list(HealthCheck),
    "phases": [Phase.explicit, Phase.generate],
}

SIZES = [(1, 1), (1, 2), (4, 4), (8, 4), (5, 9), (3, 13), (4, 1), (9, 2)]  # merged tokens; windows are 4 x 4
text = st.tuples(st.just("text"), st.integers(1, 9))
image = st.sampled_from(SIZES).map(lambda s: ("image", *s))
video = st.tuples(
    st.just("video"), st.integers(1, 4), st.integers(1, 5), st.integers(1, 5), st.sampled_from([0.5, 1.0, 1.5, 2.0])
)
samples = st.lists(st.one_of(text, image, video), min_size=0, max_size=4).map(lambda p: [("text", 2), *p, ("text", 3)])


@st.composite
def configs(draw):
    kv, ratio, sections = draw(st.sampled_from([(1, 1), (1, 3), (2, 1), (2, 2), (1, 7)])) + (
        draw(st.sampled_from([(2, 3, 3), (1, 1, 6), (4, 2, 2)])),
    )
    depth = draw(st.integers(1, 3))
    return small_config(
        num_attention_heads=kv * ratio,
        num_key_value_heads=kv,
        hidden_size=16 * kv * ratio,
        num_hidden_layers=draw(st.integers(1, 3)),
        mrope_section=sections,
        tie_word_embeddings=draw(st.booleans()),
        rms_norm_eps=draw(st.sampled_from([1e-6, 1e-5])),
        rope_theta=draw(st.sampled_from([1e4, 1e6])),
        video_rule=draw(st.sampled_from(["grid", "extent"])),
        vision={
            "depth": depth,
            "num_heads": draw(st.sampled_from([1, 3])),
            "hidden_size": 48,
            "out_hidden_size": 16 * kv * ratio,
            "fullatt_block_indexes": tuple(draw(st.sets(st.integers(0, depth - 1)))),
            "window_size": draw(st.sampled_from([56, 112])),
        },
    )


def compare(config, rows, dtype, recompute="none"):
    """Run one pack through our model and each of its samples through transformers; compare everything."""
    ours, theirs = make_models(config, dtype)
    encoded = [make_sample(config, parts, seed=i) for i, parts in enumerate(rows)]
    batch = pack(encoded)
    batch.validate()
    ours.recompute = recompute
    seen = {}

    def head(hidden, weight):
        seen["hidden"] = hidden
        return linear_cross_entropy(
            hidden[batch.loss_rows], weight, batch.targets, row_weights=batch.target_weights, chunk_rows=7
        )

    loss = ours(batch, head=head)
    loss.backward()
    hidden = []
    logits = []
    expected = 0.0
    for sample in encoded:
        states, scores = hf_forward(config, sample, theirs)
        hidden.append(states)
        logits.append(scores)
        expected = expected + torch.nn.functional.cross_entropy(
            scores[:-1], sample.labels.long()[1:], ignore_index=-100, reduction="sum"
        )
    expected.backward()
    tolerance = TOLERANCE[dtype]
    assert relative(seen["hidden"], torch.cat(hidden)) < tolerance
    with torch.no_grad():
        assert relative(ours.logits(batch), torch.cat(logits)) < tolerance
    assert abs(loss.item() - expected.item()) <= tolerance * max(1.0, abs(expected.item()))
    theirs_grads = {name: p.grad for name, p in theirs.named_parameters()}
    ours_grads = published_grads(ours)
    for name in ours.state_dict():
        want = theirs_grads[hf_name(name)]
        if want is None:  # no images in this row
            assert name not in ours_grads, name
        elif want.abs().max() < 1e-7 * max(1.0, expected.item()):
            assert ours_grads[name].abs().max() < 1e-6 * max(1.0, expected.item()), name  # k_proj.bias: 0 + rounding
        else:
            assert relative(ours_grads[name], want) < tolerance, name


@settings(max_examples=12, **SLOW)
@given(configs(), st.lists(samples, min_size=1, max_size=3))
def test_float32(config, rows):
    compare(config, rows, torch.float32)


@settings(max_examples=12, **SLOW)
@given(configs(), st.lists(samples, min_size=1, max_size=3))
def test_float64(config, rows):
    compare(config, rows, torch.float64)


@pytest.mark.slow
@settings(max_examples=60, **SLOW)
@given(configs(), st.lists(samples, min_size=1, max_size=4), st.sampled_from([torch.float32, torch.float64]))
def test_many(config, rows, dtype):
    compare(config, rows, dtype)


@pytest.mark.parametrize("policy", ["light", "full"])
def test_parity_under_recompute(policy):
    rows = [[("text", 4), ("image", 5, 9), ("text", 6)], [("text", 9)], [("video", 2, 4, 3, 1.0), ("text", 5)]]
    compare(small_config(), rows, torch.float64, recompute=policy)


def test_packing_order_and_neighbours_do_not_matter():
    """A sample's hidden states are the same alone, first or last in a row."""
    config = small_config()
    ours, _ = make_models(config, torch.float64)
    one = make_sample(config, [("text", 4), ("image", 5, 9), ("text", 6)], seed=1)
    other = make_sample(config, [("video", 2, 3, 5, 1.0), ("text", 11)], seed=2)
    alone = ours(pack([one]))
    first = ours(pack([one, other]))[: len(one)]
    last = ours(pack([other, one]))[len(other) :]
    assert relative(first, alone) < 1e-9 and relative(last, alone) < 1e-9


def test_shared_prompt_equals_repeated_prompt():
    """[prompt | completions ...] with groups gives the loss and gradients of every prompt + completion alone."""
    config = small_config()
    ours, _ = make_models(config, torch.float64)
    whole = [
        make_sample(config, [("text", 3), ("image", 4, 5), ("text", 4), ("text", n)], seed=7, supervised=n)
        for n in (3, 5, 1)
    ]  # one seed: the prompts are equal
    length = len(whole[0]) - 3
    assert all(torch.equal(w.tokens[:length], whole[0].tokens[:length]) for w in whole)
    prompt = dataclasses.replace(cut(whole[0], 0, length), labels=torch.full((length,), -100, dtype=torch.int32))
    completions = [without_images(cut(w, length, len(w))) for w in whole]
    shared = pack([prompt, *completions], groups=[-1, 0, 0, 0])
    repeated = pack(whole)
    shared.validate()
    grads = []
    for batch in (shared, repeated):
        ours.zero_grad()
        loss = ours(batch, head=lambda h, w, b=batch: linear_cross_entropy(h[b.loss_rows], w, b.targets))
        loss.backward()
        grads.append({n: g.clone() for n, g in published_grads(ours).items()} | {"loss": loss.detach()})
    for name, grad in grads[0].items():
        assert relative(grad, grads[1][name]) < 1e-6, name  # k_proj.bias is 0 + float32 rounding


def cut(sample, start, end):
    return dataclasses.replace(
        sample,
        tokens=sample.tokens[start:end],
        labels=sample.labels[start:end],
        positions=sample.positions[:, start:end],
    )


def without_images(sample):
    names = ("patches", "grid", "vision_slots", "window_order", "window_lengths", "image_lengths", "vision_positions")
    return dataclasses.replace(sample, **{n: getattr(sample, n)[:0] for n in names})
