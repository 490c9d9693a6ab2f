"""Recompute policies: equal gradients bit for bit, fewer bytes kept; frozen parts; packs without images."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvst.batch import pack
from fastvst.model import ModelConfig, recompute
from fastvst.model.kept_bytes import decoder_bytes_per_token, vision_bytes_per_patch
from fastvst_kernels import linear_cross_entropy
from hf_parity import make_models, make_sample, small_config

ROWS = [[("text", 4), ("image", 5, 9), ("text", 6)], [("text", 9)], [("video", 2, 4, 3, 1.0), ("text", 5)]]


@pytest.fixture(scope="module")
def setup():
    config = small_config(num_hidden_layers=3)
    model, _ = make_models(config, torch.float32)
    return model, pack([make_sample(config, parts, seed=i) for i, parts in enumerate(ROWS)])


def run(model, batch, policy):
    """(loss, gradients, bytes of the storages kept for backward, without parameters and inputs)."""
    model.recompute = policy
    model.zero_grad()
    known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *vars(batch).values()) if torch.is_tensor(t)}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # the reference keeps the address unique
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        hidden = model(batch)
    size = sum(n for n, _ in kept.values())
    loss = linear_cross_entropy(hidden[batch.loss_rows], model.head_weight, batch.targets)
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, size


def test_gradients_are_equal_bit_for_bit_and_bytes_fall(setup):
    loss, grads, size = run(*setup, "none")
    sizes = [size]
    for policy in ("light", "full"):
        again, other, size = run(*setup, policy)
        sizes.append(size)
        assert torch.equal(loss, again)
        for name, grad in grads.items():
            assert torch.equal(grad, other[name]), (policy, name)
    assert sizes[1] < 0.75 * sizes[0] and sizes[2] < 0.4 * sizes[1], sizes


POLICY = st.sampled_from(("none", "light", "full"))
TOWER = st.one_of(
    POLICY, st.builds("{}:{},{}".format, POLICY, st.integers(0, 2), POLICY), st.just("none:1,light:1,full")
)


@settings(max_examples=25, deadline=None)
@given(vision=TOWER, decoder=TOWER)
def test_mixed_policies_have_the_same_gradients_bit_for_bit(setup, vision, decoder):
    loss, grads, size = run(*setup, "none")
    again, other, fewer = run(*setup, {"vision": vision, "decoder": decoder})
    assert torch.equal(loss, again) and grads.keys() == other.keys()
    for name, grad in grads.items():
        assert torch.equal(grad, other[name]), (vision, decoder, name)
    assert fewer <= size


def test_a_policy_may_change_with_depth(setup):
    """The bytes of a mixed policy are between those of its parts, and each tower follows its own."""
    sizes = {
        name: run(*setup, policy)[2]
        for name, policy in {
            "none": "none",
            "vision": {"vision": "full", "decoder": "none"},
            "decoder": {"vision": "none", "decoder": "full"},
            "two": {"vision": "none", "decoder": "none:2,full"},
            "one": {"vision": "none", "decoder": "none:1,full"},
            "full": "full",
        }.items()
    }
    assert sizes["none"] > sizes["two"] > sizes["one"] > sizes["decoder"] > sizes["full"]
    assert sizes["none"] > sizes["vision"] > sizes["full"]
    assert recompute.of_blocks("none:1,light:2,full", 5) == ("none", "light", "light", "full", "full")
    assert recompute.of_blocks("light:0,full", 1) == ("full",)
    assert recompute.describe({"vision": "full", "decoder": "light:1,full"}) == "vision full, decoder light:1,full"
    assert recompute.describe({"vision": "full", "decoder": "full"}) == "full"


@pytest.mark.parametrize(
    "policy",
    ["", "some", "light:2", "light:x,full", "light:-1,full", "light:²,full", "light,full", "full:9,light", "AUTO"],
)
def test_a_text_that_is_no_policy_is_refused(policy):
    with pytest.raises(ValueError, match=re.escape(f"recompute is {policy!r}")):
        recompute.of_blocks(policy, 3)


def test_a_tower_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match=r"recompute names \['audio'\]; the towers are \['vision', 'decoder'\]"):
        recompute.check({"audio": "full", "vision": "light"})
    recompute.check({"vision": "light"})
    recompute.check("auto")
    with pytest.raises(ValueError, match="recompute is 'lite'"):
        recompute.check({"decoder": "lite"})


def test_light_keeps_what_its_definition_says():
    """For each decoder token and layer: the input, q, k, v, attention output and logsumexp, gate and up."""
    config = small_config(num_hidden_layers=4)
    model, _ = make_models(config, torch.float32)
    sizes = {}
    for tokens in (40, 140):
        batch = pack([make_sample(config, [("text", tokens)])])
        sizes[tokens] = run(model, batch, "light")[2]
    q = config.hidden_size
    kv = config.num_key_value_heads * config.head_dim
    layer = config.hidden_size + (q + 2 * kv) + q + config.num_attention_heads + 2 * config.intermediate_size
    final_norm = config.hidden_size + 1
    inverse = 1  # of the first norm; it is computed again, not kept
    per_token = (sizes[140] - sizes[40]) / 100 / 4
    assert config.num_hidden_layers * layer <= per_token <= config.num_hidden_layers * (layer + inverse) + final_norm


@pytest.mark.parametrize(("preset", "limit"), [("7b", 2.8e6), ("3b", 2.1e6)])
def test_light_in_bfloat16_stays_below_its_limit_at_the_published_sizes(preset, limit):
    config = ModelConfig.preset(preset)
    kept = {policy: decoder_bytes_per_token(config, policy, torch.bfloat16) for policy in ("none", "light", "full")}
    q = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    row = 2 * (config.hidden_size + q + 2 * kv + q + 2 * config.intermediate_size) + 4 * config.num_attention_heads
    assert kept["light"] == config.num_hidden_layers * row <= limit
    assert kept["full"] == config.num_hidden_layers * 2 * config.hidden_size
    assert kept["none"] > 1.5 * kept["light"]
    tower = {policy: vision_bytes_per_patch(config, policy, torch.bfloat16) for policy in ("none", "light", "full")}
    v = config.vision
    logsumexp = 4 * v.num_heads
    assert tower["light"] == v.depth * (2 * (v.hidden_size + 3 * v.hidden_size + v.hidden_size) + logsumexp) <= 0.45e6
    assert tower["none"] > 2 * tower["light"] and tower["full"] == v.depth * 2 * v.hidden_size


@pytest.mark.parametrize("policy", ["none", "light", "full"])
def test_the_count_of_fake_tensors_is_what_a_real_run_keeps(policy):
    config = small_config(num_hidden_layers=3)
    model, _ = make_models(config, torch.float32)
    sizes = [run(model, pack([make_sample(config, [("text", n)])]), policy)[2] for n in (40, 140)]
    final_norm = 4 * (config.hidden_size + 1)  # its input and one number for each row
    counted = decoder_bytes_per_token(config, policy, torch.float32)
    assert (sizes[1] - sizes[0]) / 100 == pytest.approx(counted + final_norm, rel=0.02)


def test_unknown_policy_is_refused(setup):
    model, batch = setup
    model.recompute = "some"
    with pytest.raises(ValueError, match="recompute is 'some'; expected one of"):
        model(batch)
    model.recompute = "none"


@pytest.mark.parametrize("policy", ["none", "light", "full"])
@pytest.mark.parametrize("frozen", ["visual.", "model.", "visual.blocks.0", "model.layers.1.mlp", "model.layers.1.inp"])
def test_frozen_parts_get_no_gradient_and_the_others_keep_theirs(setup, policy, frozen):
    model, batch = setup
    _, grads, _ = run(model, batch, "none")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen))
    model.recompute = policy
    model.zero_grad()
    linear_cross_entropy(model(batch)[batch.loss_rows], model.head_weight, batch.targets).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == name.startswith(frozen), name
        if parameter.grad is not None:
            assert torch.equal(parameter.grad, grads[name]), name
        parameter.requires_grad_(True)


def test_a_pack_without_images_runs_the_tower_only_if_asked():
    config = small_config()
    model, _ = make_models(config, torch.float32)
    batch = pack([make_sample(config, [("text", 9)])])
    hidden = model(batch)
    hidden.sum().backward()
    assert all(p.grad is None for p in model.visual.parameters())
    model.vision_on_every_rank = True
    again = model(batch)
    assert torch.equal(again, hidden)
    again.sum().backward()
    for name, parameter in model.visual.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name


def test_fresh_weights_are_drawn_as_transformers_draws_them():
    from fastvst.model import Qwen25VL

    torch.manual_seed(0)
    model = Qwen25VL(ModelConfig.preset("tiny"))
    spread = model.config.initializer_range
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert (parameter == (0 if name.endswith("bias") else 1)).all(), name
        else:
            assert abs(parameter.std().item() / spread - 1) < 0.1 and abs(parameter.mean().item()) < 0.1 * spread, name


def test_head_sees_the_whole_weight(setup):
    model, batch = setup
    with torch.no_grad():
        hidden, weight = model(batch, head=lambda h, w: (h, w))
        assert weight is model.head_weight and weight.shape == (model.config.vocab_size, model.config.hidden_size)
        assert torch.equal(model.logits(batch), hidden @ weight.T)
