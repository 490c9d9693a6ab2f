"""Directories in the published layout: round trips, transformers opens them, errors name every defect."""

import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

from fastvst.batch import pack
from fastvst.data import Processor
from fastvst.model import ModelConfig, Qwen25VL
from fastvst.model.weights import WeightsError
from hf_parity import hf_name, make_models, make_sample, small_config

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def model(request):
    return make_models(small_config(tie_word_embeddings=request.param), torch.float32, seed=1)[0]


def equal(a, b):
    x = a.state_dict()
    y = b.state_dict()
    return x.keys() == y.keys() and all(torch.equal(x[n], y[n]) for n in x)


@pytest.mark.parametrize("shard", [10**9, 20_000], ids=["single", "sharded"])
def test_round_trip_is_bit_exact(model, tmp_path, shard):
    model.save_pretrained(tmp_path / "m", max_shard_bytes=shard)
    files = sorted(p.name for p in (tmp_path / "m").glob("*.safetensors"))
    assert (len(files) > 3) == (shard == 20_000) and ((tmp_path / "m" / INDEX).exists()) == (len(files) > 1)
    loaded = Qwen25VL.from_pretrained(tmp_path / "m")
    assert equal(model, loaded) and loaded.config == model.config
    assert [p.name for p in tmp_path.iterdir()] == ["m"]  # nothing partial is left


@pytest.mark.parametrize("shard", [10**9, 20_000], ids=["single", "sharded"])
def test_transformers_opens_it_without_missing_or_unexpected_keys(model, tmp_path, shard):
    model.save_pretrained(tmp_path, max_shard_bytes=shard)
    theirs, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    state = theirs.state_dict()
    assert all(torch.equal(p, state[hf_name(n)]) for n, p in model.state_dict().items())
    assert theirs.generation_config.eos_token_id == list(model.config.eos_token_ids)


def test_tokenizer_processor_and_template_are_saved(tmp_path):
    tiny = Qwen25VL(ModelConfig.preset("tiny"))
    tiny.save_pretrained(tmp_path / "m", processor=Processor.preset("tiny"))
    _, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "m", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "m")
    assert tokenizer.convert_tokens_to_ids("<|image_pad|>") == tiny.config.image_token_id
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False).startswith("<|im_start|>")
    assert Processor.from_pretrained(tmp_path / "m").token_id("<|im_end|>") == tiny.config.eos_token_ids[0]


@pytest.mark.parametrize("shard", ["10GB", "20KB"])
def test_directories_of_transformers_open(model, tmp_path, shard):
    model.save_pretrained(tmp_path / "a")
    theirs = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "a")
    theirs.save_pretrained(tmp_path / "b", max_shard_size=shard)
    assert equal(model, Qwen25VL.from_pretrained(tmp_path / "b"))


def test_in_memory_names_of_transformers_5_open(model, tmp_path):
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state = {hf_name(n): t for n, t in state.items()}
    state["lm_head.weight"] = model.head_weight.detach().clone()  # tied files may repeat it
    state["model.language_model.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(state, tmp_path / "model.safetensors")
    assert equal(model, Qwen25VL.from_pretrained(tmp_path))
    if model.config.tie_word_embeddings:
        state["lm_head.weight"] += 1
        save_file(state, tmp_path / "model.safetensors")
        with pytest.raises(WeightsError, match="ties the embeddings, but model.safetensors holds"):
            Qwen25VL.from_pretrained(tmp_path)


def test_dtype(model, tmp_path):
    model.save_pretrained(tmp_path)
    half = Qwen25VL.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert all(p.dtype == torch.bfloat16 for p in half.parameters())
    half.save_pretrained(tmp_path)  # over the old one, in its own dtype
    assert {t.dtype for t in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    wide = Qwen25VL.from_pretrained(tmp_path)
    assert torch.equal(wide.head_weight, model.head_weight.bfloat16().float())


def test_what_differs_from_the_files_is_said_and_nothing_else_changes(model, tmp_path):
    model.save_pretrained(tmp_path / "a")
    config = json.loads((tmp_path / "a" / "config.json").read_text()) | {"torch_dtype": "bfloat16", "mine": [1]}
    config["text_config"] |= {"dtype": "bfloat16", "attention_dropout": 0.0}
    generation = {"do_sample": True, "repetition_penalty": 1.05, "eos_token_id": [95, 94]}
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    (tmp_path / "a" / "generation_config.json").write_text(json.dumps(generation))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Qwen25VL.from_pretrained(tmp_path / "a", dtype=torch.bfloat16).save_pretrained(tmp_path / "b")
    assert json.loads((tmp_path / "b" / "config.json").read_text()) == config
    assert json.loads((tmp_path / "b" / "generation_config.json").read_text()) == generation
    with pytest.warns(UserWarning, match="config.json differs .* the dtype is float32, it was bfloat16"):
        Qwen25VL.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    config["torch_dtype"] = config["text_config"]["dtype"] = "float32"
    assert json.loads((tmp_path / "b" / "config.json").read_text()) == config


def test_loaded_model_trains(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = Qwen25VL.from_pretrained(tmp_path)
    batch = pack([make_sample(model.config, [("text", 3), ("image", 3, 2), ("text", 4)])])
    loaded(batch).sum().backward()
    assert all(p.requires_grad and p.is_leaf for p in loaded.parameters())
    assert torch.equal(loaded(batch), model(batch))


def test_every_wrong_tensor_is_named(model, tmp_path):
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["visual.merger.mlp.2.bias"], state["model.norm.weight"]
    state["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(3, 3)
    state["model.embed_tokens.weight"] = state["model.embed_tokens.weight"].int()
    state["model.layers.7.extra"] = torch.zeros(2)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError) as error:
        Qwen25VL.from_pretrained(tmp_path)
    text = str(error.value)
    for part in (
        "missing: visual.merger.mlp.2.bias (64,)",
        "missing: model.norm.weight (64,)",
        "wrong shape: model.layers.0.self_attn.q_proj.weight is (3, 3) in model.safetensors, expected (64, 64)",
        "wrong dtype: model.embed_tokens.weight is I32",
        "unexpected: model.layers.7.extra (2,)",
    ):
        assert part in text, text


def test_truncated_and_missing_files_are_named(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_bytes=20_000)
    files = sorted(tmp_path.glob("*.safetensors"))
    last = max(json.loads((tmp_path / INDEX).read_text())["weight_map"].items(), key=lambda kv: kv[1])[1]
    path = tmp_path / last
    path.write_bytes(path.read_bytes()[:-1000])
    files[0].write_bytes(b"garbage that is no header")
    files[1].unlink()
    with pytest.raises(WeightsError) as error:
        Qwen25VL.from_pretrained(tmp_path)
    text = str(error.value)
    assert f"{last}: truncated at " in text and "cut off: " in text
    assert f"{files[0].name}: truncated or not safetensors" in text
    assert f"{files[1].name}: the file is missing" in text


def test_pickles_are_refused(model, tmp_path):
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="pytorch_model.bin.*pickles.*never"):
        Qwen25VL.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="is not a directory"):
        Qwen25VL.from_pretrained(tmp_path / "nowhere")


def test_an_index_cannot_point_outside(model, tmp_path):
    model.save_pretrained(tmp_path / "m", max_shard_bytes=20_000)
    index = tmp_path / "m" / INDEX
    data = json.loads(index.read_text())
    data["weight_map"]["model.norm.weight"] = "../other.safetensors"
    index.write_text(json.dumps(data))
    with pytest.raises(WeightsError, match="outside its directory"):
        Qwen25VL.from_pretrained(tmp_path / "m")


def test_a_failed_save_leaves_the_old_directory(model, tmp_path):
    class Processor:
        def save_pretrained(self, directory):
            (Path(directory) / "tokenizer.json").write_text("{}")
            raise OSError(28, "No space left on device")

    target = tmp_path / "m"
    model.save_pretrained(target)
    before = {p.name: p.read_bytes() for p in target.iterdir()}
    with pytest.raises(OSError, match="No space left"):
        model.save_pretrained(target, processor=Processor())
    assert {p.name: p.read_bytes() for p in target.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_a_rename_that_fails_puts_the_old_directory_back(model, tmp_path, monkeypatch):
    target = tmp_path / "m"
    rename = os.rename
    model.save_pretrained(target)
    before = {p.name: p.read_bytes() for p in target.iterdir()}

    def refuse(source, destination):
        if ".partial-" in str(source):
            raise PermissionError(13, "Permission denied")
        rename(source, destination)

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(PermissionError):
        model.save_pretrained(target)
    assert {p.name: p.read_bytes() for p in target.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_a_save_replaces_only_its_own_files(model, tmp_path):
    tiny = Qwen25VL(ModelConfig.preset("tiny"))
    processor = Processor.preset("tiny")
    foreign = ["notes.txt", "checkpoint-1/optimizer.pt", "adapter_model.safetensors", "vocab.json", "README.md"]
    for name in foreign:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    processor.save_pretrained(tmp_path)
    tiny.save_pretrained(tmp_path, max_shard_bytes=1_000_000)
    assert (tmp_path / INDEX).exists()
    tiny.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert [p.name for p in tmp_path.glob("model*")] == ["model.safetensors"]  # no old shard, no old index
    assert all((tmp_path / name).read_text() == "mine" for name in foreign)
    assert equal(tiny, Qwen25VL.from_pretrained(tmp_path))
    assert Processor.from_pretrained(tmp_path).config == processor.config
    assert not [p.name for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_a_save_removes_files_that_would_override_it(tmp_path):
    """transformers prefers processor_config.json to preprocessor_config.json."""
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": {"max_pixels": 50_000}}))
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("{{ messages }}")
    Qwen25VL(ModelConfig.preset("tiny")).save_pretrained(tmp_path, processor=Processor.preset("tiny"))
    assert not (tmp_path / "processor_config.json").exists()
    assert isinstance(AutoTokenizer.from_pretrained(tmp_path).chat_template, str)


PROBE = """
import sys, threading, time, torch
from pathlib import Path
from fastvst.model import Qwen25VL
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
Qwen25VL.from_pretrained(sys.argv[2])  # loads code and libraries before the measurement
start, peak, done = resident(), 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, resident()); time.sleep(0.001)
thread = threading.Thread(target=watch); thread.start()
model = Qwen25VL.from_pretrained(sys.argv[1])
done = True; thread.join()
size = sum(p.numel() * 4 for p in model.parameters())
print(size, max(peak, resident()) - start)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from /proc")
def test_host_memory_is_the_model_and_one_file(tmp_path):
    big = small_config(vocab_size=40_000, hidden_size=256, num_attention_heads=16, intermediate_size=4096)
    Qwen25VL(big).save_pretrained(tmp_path / "big", max_shard_bytes=25_000_000)
    Qwen25VL(small_config()).save_pretrained(tmp_path / "small")
    largest = max(p.stat().st_size for p in (tmp_path / "big").glob("*.safetensors"))
    total = sum(p.stat().st_size for p in (tmp_path / "big").glob("*.safetensors"))
    output = subprocess.run(
        [sys.executable, "-c", PROBE, str(tmp_path / "big"), str(tmp_path / "small")],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    size, peak = map(int, output.split())
    assert total > 1.5 * largest  # else the bound below would prove nothing
    assert size <= peak + 2**22 and peak < size + largest + 8_000_000, (size, peak, largest)
    shutil.rmtree(tmp_path / "big")
