"""Folders that are no plain checkpoint are named in a few lines, with what to do; adapters are merged."""

import json
import shlex
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastvst.model import Qwen25VL
from fastvst.model.weights import WeightsError
from hf_parity import hf_name, small_config


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
