"""`fastvst merge --adapter`: adapters of PEFT, compared with PEFT where it is installed and with the formulas."""

import json

import pytest
import torch
from safetensors.torch import save_file

from fastvst.cli import main
from fastvst.model import Qwen25VL
from fastvst.model.adapter import AdapterError, merge
from hf_parity import hf_name, make_models, small_config

Q = "model.language_model.layers.0.self_attn.q_proj"
UP = "model.language_model.layers.1.mlp.up_proj"
EMBEDDING = "model.language_model.embed_tokens"


@pytest.fixture
def base(tmp_path):
    ours, _ = make_models(small_config(), torch.float32)
    ours.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def write(folder, tensors, **config):
    folder.mkdir(exist_ok=True)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, **config}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(
        {f"base_model.model.{n}": t.contiguous() for n, t in tensors.items()}, folder / "adapter_model.safetensors"
    )
    return folder


def low_rank(name, rows, rank=4, columns=64):
    return {f"{name}.lora_A.weight": torch.randn(rank, columns), f"{name}.lora_B.weight": torch.randn(rows, rank)}


def product(tensors, name):
    return tensors[f"{name}.lora_B.weight"].double() @ tensors[f"{name}.lora_A.weight"].double()


def test_merge_adds_the_product_of_the_two_matrices(base, tmp_path, capsys):
    tensors = low_rank(Q, 64) | low_rank(UP, 48, rank=2) | {"lm_head.weight": torch.randn(101, 64)}
    options = {"rank_pattern": {"up_proj": 2}, "alpha_pattern": {"up_proj": 3}, "base_model_name_or_path": str(base)}
    adapter = write(tmp_path / "adapter", tensors, **options)
    before = Qwen25VL.from_pretrained(base).state_dict()
    assert main(["merge", "--adapter", str(adapter), "--out", str(tmp_path / "out")]) == 0
    assert "3 changed tensors" in capsys.readouterr().out
    after = Qwen25VL.from_pretrained(tmp_path / "out").state_dict()
    changes = {"model.layers.0.self_attn.q_proj.weight": product(tensors, Q) * 2}
    changes |= {"model.layers.1.mlp.up_proj.weight": product(tensors, UP) * 1.5}
    for name, tensor in after.items():
        wanted = tensors["lm_head.weight"] if name == "lm_head.weight" else before[name] + changes.get(name, 0)
        torch.testing.assert_close(tensor, wanted.float())


def test_formulas_of_dora_rank_stabilised_adapters_embeddings_and_biases(base, tmp_path):
    state = Qwen25VL.from_pretrained(base).state_dict()
    magnitude = torch.rand(64) + 0.5
    a = torch.randn(4, 101)
    b = torch.randn(64, 4)
    bias = torch.randn(64)
    tensors = low_rank(Q, 64) | {f"{Q}.lora_magnitude_vector": magnitude, f"{Q}.base_layer.bias": bias}
    tensors |= {f"{EMBEDDING}.lora_embedding_A": a, f"{EMBEDDING}.lora_embedding_B": b}
    adapter = write(tmp_path / "adapter", tensors, use_dora=True, use_rslora=True, fan_in_fan_out=True)
    weight = state["model.layers.0.self_attn.q_proj.weight"].double() + product(tensors, Q) * 4  # 8 / sqrt(4)
    rows = state["model.embed_tokens.weight"].double() + (b.double() @ a.double()).T * 4
    assert merge(state, adapter, tied=False) == 3
    expected = magnitude.double()[:, None] * weight / weight.norm(dim=1, keepdim=True)
    torch.testing.assert_close(state["model.layers.0.self_attn.q_proj.weight"], expected.float())
    torch.testing.assert_close(state["model.embed_tokens.weight"], rows.float())
    assert torch.equal(state["model.layers.0.self_attn.q_proj.bias"], bias)


@pytest.mark.parametrize(
    "config, tensors, words",
    [
        ({"peft_type": "IA3"}, {}, "IA3 adapter; only LORA"),
        ({"init_lora_weights": "pissa_niter_4"}, {}, "init_lora_weights = 'pissa_niter_4'"),
        ({"layer_replication": [[0, 1]], "lora_bias": True}, {}, "layer_replication, lora_bias"),
        ({}, {"model.nowhere.lora_A.weight": torch.ones(2, 2)}, "nowhere"),
        ({}, {f"{Q}.lora_A.weight": torch.ones(4, 64)}, r"only the parts \['A'\]"),
        ({}, low_rank(Q, 63), r"\(63, 4\) x \(4, 64\), the base has \(64, 64\)"),
        ({}, {"lm_head.weight": torch.ones(5, 64)}, r"shape \(5, 64\), the base has \(101, 64\)"),
        ({}, {f"{Q}.lora_A.weight": torch.full((4, 64), float("nan"))}, "contains NaN"),
        ({}, low_rank("model.visual.patch_embed.proj", 64), "only linear layers and embeddings"),
        ({}, {f"{EMBEDDING}.token_adapter.trainable_tokens_delta": torch.ones(1, 64)}, "no counterpart"),
    ],
)
def test_other_adapters_are_refused_by_name(base, tmp_path, config, tensors, words):
    adapter = write(tmp_path / "adapter", tensors, **config)
    with pytest.raises(AdapterError, match=words) as caught:
        merge(Qwen25VL.from_pretrained(base).state_dict(), adapter, tied=False)
    assert "adapter" in str(caught.value) and len(str(caught.value).splitlines()) <= 3


def test_pickled_and_cut_adapters_are_refused(base, tmp_path):
    adapter = write(tmp_path / "adapter", low_rank(Q, 64))
    path = adapter / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(AdapterError, match="truncated"):
        merge({}, adapter, tied=False)
    path.rename(adapter / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match="never loaded"):
        merge({}, adapter, tied=False)


OPTIONS = {
    "rank and alpha patterns": {"rank_pattern": {"up_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    "rank-stabilised": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "regular expressions": {"alpha_pattern": {r"layers\.1\.self_attn\.(q|v)_proj": 5}, "layers_to_transform": [1]},
    "biases": {"bias": "all"},
    "saved modules": {"modules_to_save": ["lm_head", "norm"]},
    "transposed": {"fan_in_fan_out": True},
    "everything linear": {"target_modules": "all-linear"},
    "embeddings": {"target_modules": ["embed_tokens", "o_proj"]},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.filterwarnings("ignore")
def test_merge_equals_peft(base, tmp_path, name):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    _, theirs = make_models(small_config(), torch.float32)
    options = {"target_modules": ["q_proj", "v_proj", "up_proj", "qkv"], **OPTIONS[name]}
    if "layers_to_transform" in options:
        options["layers_pattern"] = "layers"
    model = peft.get_peft_model(theirs, peft.LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, **options))
    with torch.no_grad():
        for parameter in [p for p in model.parameters() if p.requires_grad]:
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(tmp_path / "adapter")
    out = tmp_path / "out"
    assert main(["merge", "--adapter", str(tmp_path / "adapter"), "--base", str(base), "--out", str(out)]) == 0
    before = Qwen25VL.from_pretrained(base).state_dict()
    state = model.merge_and_unload().state_dict()
    changed = 0
    for key, tensor in Qwen25VL.from_pretrained(out).state_dict().items():
        torch.testing.assert_close(tensor, state[hf_name(key)], rtol=1e-5, atol=1e-5)
        changed += not torch.equal(tensor, before[key])
    assert changed >= 2
