"""Folders that are no plain checkpoint are named in a few lines, with what to do; adapters are merged."""

import json
import pickle
import re
import resource
import shlex
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastvst import checksum
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


@pytest.mark.parametrize(
    "name, words",
    [
        ("global_step_10/actor/model_world_size_8_rank_0.pt", "verl.*global_step_10/actor"),
        ("model_world_size_8_rank_0.pt", "verl"),
        ("mp_rank_00_model_states.pt", "DeepSpeed"),
        ("pytorch_model_fsdp_0/.metadata", "FSDP.*pytorch_model_fsdp_0"),
        ("iter_0000100/mp_rank_00/model.pt", "Megatron"),
        ("model-q4_k_m.gguf", "llama.cpp"),
        (
            "model-00001-of-00004.safetensors",
            "1 shards such as model-00001-of-00004.safetensors, but no",
        ),
        ("checkpoint-90/adapter_config.json", "did you mean .*checkpoint-90"),
        ("hf/config.json", "did you mean .*/hf"),
    ],
)
@pytest.mark.parametrize("config", [True, False])
def test_more_folders_of_trainers(folder, name, words, config):
    (folder / "model.safetensors").unlink()
    if not config:
        (folder / "config.json").unlink()
    (folder / name).parent.mkdir(exist_ok=True, parents=True)
    (folder / name).write_text("{}")
    text = refusal(folder, FileNotFoundError)
    assert re.search(words, text.replace("\n", " ")) and len(text.splitlines()) <= 3


def test_a_run_folder_and_a_cache_folder_say_what_to_pass(folder, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text('{"model": {"preset": "tiny"}}')
    folder.rename(run / "hf")
    assert f"did you mean {run}/hf" in refusal(run)
    cache = tmp_path / "models--Qwen--x"
    (cache / "refs").mkdir(parents=True)
    (cache / "snapshots" / "abc").mkdir(parents=True)
    shutil.copy(run / "hf" / "config.json", cache / "snapshots" / "abc")
    assert f"cache folder of the Hugging Face Hub; pass {cache}/snapshots/abc" in refusal(cache, FileNotFoundError)


@pytest.mark.parametrize("name", ["qweight", "weight_scale_inv", "absmax", "SCB"])
def test_quantised_tensors_without_a_word_in_the_config(folder, name):
    path = folder / "model.safetensors"
    state = load_file(path)
    state[f"model.layers.0.self_attn.q_proj.{name}"] = torch.ones(4, dtype=torch.int8)
    del state["model.layers.0.self_attn.q_proj.weight"]
    save_file(state, path)
    text = refusal(folder, WeightsError)
    assert f"quantised (model.layers.0.self_attn.q_proj.{name} is I8)" in text and len(text.splitlines()) == 2


def test_float8_weights(folder):
    path = folder / "model.safetensors"
    state = load_file(path)
    key = "model.layers.0.self_attn.q_proj.weight"
    save_file(state | {key: state[key].to(torch.float8_e4m3fn)}, path)
    assert f"quantised ({key} is F8_E4M3)" in refusal(folder, WeightsError)


def test_names_of_wrapped_modules(folder):
    path = folder / "model.safetensors"
    save_file({n.replace("self_attn.", "_orig_mod.self_attn."): t for n, t in load_file(path).items()}, path)
    assert "_orig_mod.self_attn" in refusal(folder, WeightsError) and "wrapped module" in refusal(folder, WeightsError)


@pytest.mark.parametrize(
    "fields",
    [
        {"architectures": ["Qwen2VLForConditionalGeneration"], "model_type": "qwen2_vl"},
        {"architectures": ["Qwen3VLForConditionalGeneration"], "model_type": "qwen3_vl"},
        {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"},
        {"architectures": None, "model_type": "llava"},
        {"architectures": ["Qwen2_5_VLForSequenceClassification"]},
    ],
)
def test_foreign_architectures(folder, fields):
    set_config(folder, **fields)
    text = refusal(folder)
    assert str(fields.get("model_type") or fields["architectures"]) in text and len(text.splitlines()) == 1


def test_a_shard_that_the_index_does_not_list_is_named(folder):
    Qwen25VL.from_pretrained(folder).save_pretrained(folder, max_shard_bytes=100_000)
    extra = "model-00001-of-00099.safetensors"
    save_file({"model.norm.weight": torch.zeros(64)}, folder / extra)
    with pytest.warns(UserWarning, match=f"index.json does not list {extra}"):
        Qwen25VL.from_pretrained(folder)


# ------------------------------------------------------------------------------------ sizes before memory, nothing runs


@pytest.fixture
def little_memory():
    """Fail with MemoryError long before the machine does."""
    used = int(re.search(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


ABSURD = ["num_hidden_layers", "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads"]


@pytest.mark.parametrize("value", [10**9, 10**18, 10**100])
@pytest.mark.parametrize("name", ABSURD)
def test_absurd_counts_of_the_decoder(folder, little_memory, name, value):
    content = json.loads((folder / "config.json").read_text())
    content["text_config"][name] = value
    (folder / "config.json").write_text(json.dumps(content))
    assert name in refusal(folder)


@pytest.mark.parametrize(
    "name", ["depth", "hidden_size", "patch_size", "window_size", "spatial_merge_size", "in_channels"]
)
def test_absurd_counts_of_the_tower(folder, little_memory, name):
    content = json.loads((folder / "config.json").read_text())
    content["vision_config"][name] = 10**9
    (folder / "config.json").write_text(json.dumps(content))
    assert "10,000" in refusal(folder) or name in refusal(folder)


def test_counts_within_bounds_are_compared_with_the_headers_before_memory_is_taken(folder, little_memory):
    content = json.loads((folder / "config.json").read_text())
    content["text_config"] |= {"vocab_size": 9_000_000, "intermediate_size": 9_000_000, "num_hidden_layers": 900}
    (folder / "config.json").write_text(json.dumps(content))  # 10 TB in float32
    assert "expected (9000000, 64)" in refusal(folder, WeightsError)


def header(content: bytes, data: bytes = b"\0" * 64) -> bytes:
    return struct.pack("<Q", len(content)) + content + data


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 8,
        struct.pack("<Q", 2**63) + b"{}",
        header(b"[" * 100_000),
        header(b'{"a": 1}'),
        header(b"[]"),
        header(b'{"a": {"dtype": "F32", "shape": [1099511627776], "data_offsets": [0, 64]}}'),
        header(b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 64]}}'),
        header(b'{"a": {"dtype": "F32", "shape": [16], "data_offsets": [64, 0]}}'),
        header(b'{"a": {"dtype": "F32", "shape": [16], "data_offsets": [0]}}'),
        header(b'{"a": {"dtype": "F32", "shape": ["x"], "data_offsets": [0, 64]}}'),
        header(b'{"a": {"dtype": 7, "shape": [16], "data_offsets": [0, 64]}}'),
        header(b'{"a": {"dtype": "F32", "shape": [16], "data_offsets": [0, 999999999999]}}'),
    ],
)
def test_hostile_headers_are_refused(folder, little_memory, content):
    (folder / "model.safetensors").write_bytes(content)
    assert "model.safetensors" in refusal(folder, WeightsError)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors.index.json"])
def test_deep_and_huge_json(folder, little_memory, name):
    if name.startswith("model"):
        (folder / "model.safetensors").unlink()
    (folder / name).write_text("[" * 1_000_000)
    assert name in refusal(folder)
    with open(folder / name, "wb") as file:
        file.truncate(2**33)
    assert f"{name} has 8,589,934,592 bytes" in refusal(folder)


def test_weights_inside_a_checkpoint_of_a_run_are_compared_with_its_marker(folder):
    outer = folder.parent
    names = [str(path.relative_to(outer)) for path in folder.iterdir()]
    checksum.write_marker(outer, checksum.measure(outer, names))
    (folder / "README.md").write_text("a note")
    Qwen25VL.from_pretrained(folder)
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    assert "m/model.safetensors was changed after it was written" in refusal(folder)
    (outer / "COMPLETE").write_text("")
    assert "COMPLETE is damaged" in refusal(folder)
    (outer / "COMPLETE").unlink()
    Qwen25VL.from_pretrained(folder)


def test_nothing_of_a_checkpoint_runs(folder, tmp_path):
    """auto_map, modules of its own and pickles; Processor: tests/data/test_processor_files.py."""
    marker = tmp_path / "ran"
    code = f"open({str(marker)!r}, 'w').close()\n"
    for name in ("configuration_own.py", "modeling_own.py", "__init__.py", "conftest.py"):
        (folder / name).write_text(code)
    own = {"AutoConfig": "configuration_own.Own", "AutoModelForCausalLM": "modeling_own.Own"}
    set_config(folder, auto_map=own, trust_remote_code=True, custom_pipelines={"x": {"impl": "modeling_own.Own"}})

    class Runs:
        def __reduce__(self):
            return (exec, (code,))

    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "rng_state.pth"):
        (folder / name).write_bytes(pickle.dumps(Runs()))
    model = Qwen25VL.from_pretrained(folder)
    model.save_pretrained(tmp_path / "again")
    (folder / "model.safetensors").unlink()
    assert "pickles" in refusal(folder, FileNotFoundError)
    assert not marker.exists()
    assert json.loads((tmp_path / "again" / "config.json").read_text())["auto_map"] == own
