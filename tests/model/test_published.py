"""Fused and padded parameters: published names and bits outside, zeros that stay zero inside."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastvst.batch import pack
from fastvst.model import ModelConfig, Qwen25VL
from fastvst.model.published import ALIGNED, layout_of, padded, publish
from fastvst.train.optimizer import OptimizerConfig, clip_gradients, make_optimizer
from fastvst_kernels import linear_cross_entropy
from hf_parity import hf_forward, make_models, make_sample, published_grads, relative, small_config

INNER = 20  # of the tower: its rows are no multiple of 16 bytes in bfloat16, as those of the published 3,420


def odd_config(**changes) -> ModelConfig:
    return small_config(vision={"intermediate_size": INNER}, **changes)


def padding(model: Qwen25VL) -> dict[str, torch.Tensor]:
    """By parameter: True where it holds no published value."""
    model = type(model)(model.config)  # a copy, because the test writes into it
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1)
        for tensor in model.state_dict().values():
            tensor.zero_()
    return {name: p.detach().bool() for name, p in model.named_parameters() if p.any()}


def test_widths_in_memory():
    assert padded(3420) == 3456 and padded(18944) == 18944 and padded(20) == 128 and padded(24) == 24
    with torch.device("meta"):
        for preset in ("3b", "7b", "32b", "72b", "tiny"):
            model = Qwen25VL(ModelConfig.preset(preset))
            assert all(p[0].numel() % ALIGNED == 0 for p in model.parameters() if p.dim() > 1), preset
    block = model.visual.blocks[0].mlp
    assert block.gate_up_proj.weight.shape[0] == 2 * padded(model.config.vision.intermediate_size)


def test_the_state_dict_has_the_published_tensors_in_the_order_of_transformers():
    config = odd_config()
    ours, theirs = make_models(config, torch.float32)
    found = {name: tuple(t.shape) for name, t in ours.state_dict().items()}
    wanted = {
        n.replace("model.visual.", "visual.").replace("model.language_model.", "model."): tuple(t.shape)
        for n, t in theirs.state_dict().items()
    }
    assert found == wanted
    attention = [n for n in found if n.startswith("model.layers.0.self_attn")]
    assert [n.split(".", 4)[4] for n in attention] == [
        "q_proj.weight",
        "q_proj.bias",
        "k_proj.weight",
        "k_proj.bias",
        "v_proj.weight",
        "v_proj.bias",
        "o_proj.weight",
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_files_are_equal_bit_for_bit_both_ways(tmp_path, dtype):
    config = odd_config()
    torch.manual_seed(0)
    first = {n: torch.randn(t.shape).to(dtype) for n, t in Qwen25VL(config).state_dict().items()}
    Qwen25VL(config).to(dtype).save_pretrained(tmp_path / "a")  # config.json
    save_file(first, tmp_path / "a" / "model.safetensors")
    model = Qwen25VL.from_pretrained(tmp_path / "a", dtype=dtype)
    assert not any(p[mask].any() for n, p in model.named_parameters() if (mask := padding(model).get(n)) is not None)
    model.save_pretrained(tmp_path / "b")
    again = load_file(tmp_path / "b" / "model.safetensors")
    assert again.keys() == first.keys()
    assert all(torch.equal(again[n].view(torch.uint8), t.view(torch.uint8)) for n, t in first.items())
    other = Qwen25VL(config).to(dtype)
    assert not any(other.load_state_dict(again))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("policy", ["none", "light", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_padding_stays_zero_in_training(policy, dtype):
    """Exactly: through SwiGLU, the gradients, clipping, AdamW with weight decay, and a cast."""
    config = odd_config()
    model, _ = make_models(config, torch.float32)
    model = model.to(dtype)
    model.recompute = policy
    masks = padding(model)
    assert {n.split(".")[-2] for n in masks} == {"gate_up_proj", "down_proj"}
    optimizer = make_optimizer(model, OptimizerConfig(lr=0.1, vision_lr=0.1, weight_decay=0.3))
    batch = pack([make_sample(config, [("text", 3), ("image", 5, 9), ("text", 6)])])
    for _ in range(3):
        loss = model(batch, head=lambda h, w: linear_cross_entropy(h[batch.loss_rows], w, batch.targets))
        loss.backward()
        clip_gradients(model.parameters(), 0.5)
        for name, parameter in model.named_parameters():
            if name in masks:
                assert not parameter.grad[masks[name]].any() and parameter.grad.any(), name
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in model.named_parameters():
        if name in masks:
            values = (parameter, optimizer.state[parameter]["exp_avg"], optimizer.state[parameter]["exp_avg_sq"])
            assert all(not value[masks[name]].any() and value.any() for value in values), name


def test_a_padded_tower_computes_what_transformers_computes():
    config = odd_config()
    ours, theirs = make_models(config, torch.float64)
    sample = make_sample(config, [("text", 3), ("image", 5, 9), ("video", 2, 4, 3, 1.0), ("text", 6)])
    states, logits = hf_forward(config, sample, theirs)
    found = ours.logits(pack([sample]))
    assert relative(found, logits) < 1e-9
    found.square().sum().backward()
    logits.square().sum().backward()
    grads = published_grads(ours)
    for name in ("gate_proj.weight", "gate_proj.bias", "up_proj.bias", "down_proj.weight"):
        want = dict(theirs.named_parameters())[f"model.visual.blocks.1.mlp.{name}"].grad
        assert relative(grads[f"visual.blocks.1.mlp.{name}"], want) < 1e-9, name


def test_writing_into_the_state_dict_changes_the_model():
    model = Qwen25VL(odd_config())
    state = model.state_dict()
    for name in ("model.layers.1.self_attn.k_proj.weight", "visual.blocks.0.mlp.down_proj.weight"):
        state[name].fill_(7)
        assert (model.state_dict()[name] == 7).all()
    assert sum((p == 7).sum() for p in model.parameters()) == sum(
        state[n].numel() for n, t in state.items() if (t == 7).all()
    )


def test_wrong_state_dicts_are_refused_by_published_name():
    model = Qwen25VL(odd_config())
    state = model.state_dict()
    name = "model.layers.0.mlp.up_proj.weight"
    with pytest.raises(RuntimeError, match=rf'Missing key\(s\) in state_dict: "{name}"'):
        model.load_state_dict({n: t for n, t in state.items() if n != name})
    with pytest.raises(RuntimeError, match=rf"{name} has shape \(3, 3\); expected \(48, 64\)"):
        model.load_state_dict({**state, name: torch.zeros(3, 3)})
    with pytest.raises(RuntimeError, match="Unexpected"):
        model.load_state_dict({**state, "model.layers.0.mlp.more.weight": torch.zeros(3, 3)})
    before = model.state_dict()[name].clone()
    found = model.load_state_dict({n: t + 1 for n, t in state.items() if n != name}, strict=False)
    assert found.missing_keys == [name] and torch.equal(model.state_dict()[name], before)


def test_names_in_memory_are_accepted_too():
    config = odd_config()
    one = Qwen25VL(config)
    two = Qwen25VL(config)
    two.load_state_dict({n: p.detach() for n, p in one.named_parameters()})
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert publish(dict(one.named_parameters()), layout_of(one)).keys() == one.state_dict().keys()


def test_a_deep_copy_and_a_copy_with_other_weights_are_independent():
    import copy

    one = Qwen25VL(odd_config())
    two = copy.deepcopy(one)
    two.load_state_dict({n: t + 1 for n, t in one.state_dict().items()})
    name = "model.layers.0.self_attn.v_proj.weight"
    assert torch.equal(two.state_dict()[name], one.state_dict()[name] + 1)


def test_numbers_of_fresh_weights_do_not_depend_on_the_layout():
    """A seed gives a model the same weights as when every published tensor was a parameter of its own."""
    for inner in (INNER, 24):
        config = small_config(vision={"intermediate_size": inner})
        torch.manual_seed(5)
        model = Qwen25VL(config)
        torch.manual_seed(5)
        with torch.random.fork_rng():
            model.init_weights()
            drawn = {n: t.clone() for n, t in model.state_dict().items()}
            torch.manual_seed(5)
            model.init_weights()
        torch.manual_seed(5)
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, drawn[name])
            if tensor.dim() > 1:
                assert torch.equal(tensor, torch.empty(tensor.shape).normal_(0.0, config.initializer_range)), name


def test_published_layers_are_attributes():
    model = Qwen25VL(odd_config())
    attention = model.model.layers[1].self_attn
    mlp = model.visual.blocks[0].mlp
    state = model.state_dict()
    for layer, name in (
        (attention.k_proj, "model.layers.1.self_attn.k_proj"),
        (mlp.up_proj, "visual.blocks.0.mlp.up_proj"),
    ):
        assert torch.equal(layer.weight, state[f"{name}.weight"]) and torch.equal(layer.bias, state[f"{name}.bias"])
    attention.v_proj.weight[0, 0] = 7
    assert state["model.layers.1.self_attn.v_proj.weight"][0, 0] == 7 and attention.v_proj.weight.grad is None
    batch = pack([make_sample(model.config, [("text", 3), ("image", 5, 9)])])
    model(batch).square().sum().backward()
    assert torch.equal(mlp.gate_proj.weight.grad, published_grads(model)["visual.blocks.0.mlp.gate_proj.weight"])
    assert mlp.down_proj.weight.shape == (32, padded(INNER))  # a layer of its own, with its padding
    with pytest.raises(AttributeError, match="'Attention' object has no attribute 'w_proj'"):
        _ = attention.w_proj
