"""Folders that are no plain checkpoint are named in a few lines, with what to do; adapters are merged."""

import json
import shlex
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastvst.cli import main
from fastvst.model import Qwen25VL
from fastvst.model.weights import WeightsError
from hf_parity import hf_name, make_models, small_config


@pytest.fixture
def folder(tmp_path):
    Qwen25VL(small_config()).save_pretrained(tmp_path / "m")
    return tmp_path / "m"


def refusal(path, error=ValueError):
    with pytest.raises(error) as caught:
        Qwen25VL.from_pretrained(path)
    assert len(str(caught.value).splitlines()) <= 7
    return str(caught.value)


def set_config(folder, **fields):
    content = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps(content))


@pytest.mark.parametrize("method", ["awq", "gptq", "fp8", "bitsandbytes", "compressed-tensors"])
def test_quantised_checkpoints(folder, method):
    set_config(folder, quantization_config={"quant_method": method, "bits": 4})
    assert f"quantised: config.json says quant_method {method}, 4 bits" in refusal(folder)


def test_another_architecture(folder):
    set_config(folder, architectures=["ColQwen2_5"])
    assert "architectures = ['ColQwen2_5']" in refusal(folder)


@pytest.mark.parametrize("beside", [True, False])
def test_adapters(folder, beside):
    if not beside:
        for path in folder.iterdir():
            path.unlink()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "q/b"}))
    assert "LoRA adapter (adapter_config.json) of q/b" in refusal(folder) and "fastvst merge" in refusal(folder)


@pytest.mark.parametrize(
    "name, words",
    [
        ("zero_to_fp32.py", "DeepSpeed"),
        ("global_step10/x", "DeepSpeed"),
        ("__0_0.distcp", "FSDP"),
        ("actor/model_world_size_8_rank_0.pt", "verl"),
        ("checkpoint-90/config.json", "did you mean"),
    ],
)
@pytest.mark.parametrize("config", [True, False])
def test_folders_of_trainers(folder, name, words, config):
    (folder / "model.safetensors").unlink()
    if not config:
        (folder / "config.json").unlink()
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("{}")
    assert words in refusal(folder, FileNotFoundError)


def test_pointers_and_damaged_json(folder):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_text(pointer)
    assert "Git LFS pointer" in refusal(folder) and "git lfs pull" in refusal(folder)
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "config.json").write_text(pointer)
    assert "Git LFS pointer" in refusal(folder)
    (folder / "config.json").write_text('{\n"a": 1,,\n}')
    assert "config.json" in refusal(folder) and "line 2" in refusal(folder)


def test_prefixes_nan_and_a_thousand_problems(folder):
    path = folder / "model.safetensors"
    state = load_file(path)
    save_file({"module." + n: t for n, t in state.items()}, path)
    assert "begin with 'module.'" in refusal(folder, WeightsError)
    save_file({"x." + n[::-1]: t for n, t in state.items()}, path)
    text = refusal(folder, WeightsError)
    assert len(text.splitlines()) == 7 and f"... and {2 * len(state) - 5} more" in text
    state["model.norm.weight"][3] = float("nan")
    save_file(state, path)
    assert "model.norm.weight contains NaN" in refusal(folder, WeightsError)


def test_one_file_wins_over_a_stale_index(folder):
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.warns(UserWarning, match="model.safetensors is used, as in transformers"):
        Qwen25VL.from_pretrained(folder)


@pytest.mark.slow
def test_the_printed_advice_for_pickles_works(folder):
    state = {hf_name(n): t for n, t in load_file(folder / "model.safetensors").items()}
    torch.save(state, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    command = refusal(folder, FileNotFoundError).splitlines()[-1]
    subprocess.run([sys.executable, *shlex.split(command)[1:]], check=True)
    Qwen25VL.from_pretrained(folder.with_name("m-safetensors"))


def test_merge_adds_the_product_of_the_two_matrices(tmp_path, capsys):
    ours, _ = make_models(small_config(), torch.float32)
    base = tmp_path / "base"
    ours.save_pretrained(base)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    config = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 8,
        "rank_pattern": {"up_proj": 2},
        "alpha_pattern": {"up_proj": 3},
    }
    config["base_model_name_or_path"] = str(base)
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    names = ["model.language_model.layers.0.self_attn.q_proj", "model.language_model.layers.1.mlp.up_proj"]
    tensors = {}
    deltas = []
    for name, rank, scale in zip(names, (4, 2), (2.0, 1.5)):
        rows = 64 if rank == 4 else 48
        a = torch.randn(rank, 64)
        b = torch.randn(rows, rank)
        tensors |= {f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": b}
        deltas.append(b @ a * scale)
    head = torch.randn(101, 64)
    save_file(tensors | {"base_model.model.lm_head.weight": head}, adapter / "adapter_model.safetensors")
    assert main(["merge", "--adapter", str(adapter), "--out", str(tmp_path / "out")]) == 0
    assert "3 changed tensors" in capsys.readouterr().out
    before = ours.state_dict()
    after = Qwen25VL.from_pretrained(tmp_path / "out").state_dict()
    expected = dict(zip(["model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight"], deltas))
    for name, tensor in after.items():
        wanted = head if name == "lm_head.weight" else before[name] + expected.get(name, 0)
        torch.testing.assert_close(tensor, wanted)


def test_merge_equals_peft(tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    ours, theirs = make_models(small_config(), torch.float32)
    base = tmp_path / "base"
    ours.save_pretrained(base)
    options = {"rank_pattern": {"up_proj": 2}, "alpha_pattern": {"v_proj": 3}, "use_rslora": True}
    config = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "v_proj", "up_proj", "qkv"],
        modules_to_save=["lm_head"],
        init_lora_weights=False,
        **options,
    )
    model = peft.get_peft_model(theirs, config)
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.normal_()
    model.save_pretrained(tmp_path / "adapter")
    out = tmp_path / "out"
    assert main(["merge", "--adapter", str(tmp_path / "adapter"), "--base", str(base), "--out", str(out)]) == 0
    state = model.merge_and_unload().state_dict()
    for name, tensor in Qwen25VL.from_pretrained(out).state_dict().items():
        torch.testing.assert_close(tensor, state[hf_name(name)])
