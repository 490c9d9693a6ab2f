"""The layouts of docs/checkpoints.md at small sizes: read as transformers reads them, and written back as they were."""

import copy
import json
import warnings
from pathlib import Path

import pytest
import torch
from transformers import Qwen2_5_VLConfig

from fastvst.data import Processor
from fastvst.model import ModelConfig, Qwen25VL
from published_files import PREPROCESSOR

TOWER = {
    "depth": 2,
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_heads": 2,
    "in_chans": 3,
    "out_hidden_size": 192,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "spatial_patch_size": 14,
    "window_size": 112,
    "fullatt_block_indexes": [1],
    "tokens_per_second": 2,
    "temporal_patch_size": 2,
}
SIZES = {
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_attention_heads": 6,
    "num_hidden_layers": 1,
    "num_key_value_heads": 2,
    "vocab_size": 4096,
}
COMMON = {
    "attention_dropout": 0.0,
    "bos_token_id": 4074,
    "eos_token_id": 4076,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 128000,
    "max_window_layers": 28,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "use_cache": True,
    "use_sliding_window": False,
}
IDS = {"vision_start_token_id": 4083, "vision_end_token_id": 4084, "image_token_id": 4086, "video_token_id": 4087}
ROOT = {"architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl", **IDS}
MROPE = {"type": "mrope", "mrope_section": [4, 6, 6]}
DEFAULT_ROPE = {"mrope_section": [4, 6, 6], "rope_type": "default", "type": "default"}


def flat(version: str, **fields):
    return ROOT | SIZES | COMMON | {"transformers_version": version, "torch_dtype": "float32"} | fields


def nested(version: str, dtype: str, **fields):
    text = SIZES | COMMON | {"model_type": "qwen2_5_vl_text", dtype: "float32"}
    text |= {"rope_scaling": DEFAULT_ROPE, "layer_types": ["full_attention"]}
    tower = TOWER | {"model_type": "qwen2_5_vl", dtype: "float32"}
    return (
        ROOT | {dtype: "float32", "text_config": text, "vision_config": tower, "transformers_version": version} | fields
    )


def version5():
    data = nested("5.17.0", "dtype", tie_word_embeddings=True)
    for name in ("rope_scaling", "rope_theta"):
        del data["text_config"][name]
    data["text_config"]["rope_parameters"] = DEFAULT_ROPE | {"rope_theta": 1e6}
    return data


SHORT = {"hidden_size": 64, "num_heads": 2, "depth": 2, "intermediate_size": 192, "out_hidden_size": 192, "in_chans": 3}
FAST = PREPROCESSOR | {"image_processor_type": "Qwen2VLImageProcessorFast", "crop_size": None, "do_center_crop": None}
LIMITS_IN_SIZE = {k: v for k, v in PREPROCESSOR.items() if "_pixels" not in k}
VIDEO = {"video_processor_type": "Qwen2VLVideoProcessor", "size": {"longest_edge": 602112, "shortest_edge": 100352}}
VIDEO |= {"do_sample_frames": False, "fps": None, "min_frames": 4, "max_frames": 768, "return_metadata": False}
LAYOUTS = {
    "4.41, 3B": (flat("4.41.2", rope_scaling=MROPE, vision_config=TOWER, tie_word_embeddings=True), PREPROCESSOR),
    "4.41, 7B, 72B": (flat("4.41.2", rope_scaling=MROPE, vision_config=TOWER, tie_word_embeddings=False), PREPROCESSOR),
    "4.49, 32B": (flat("4.49.0", rope_scaling=DEFAULT_ROPE, vision_config=TOWER), PREPROCESSOR),
    "4.50, shortened vision_config": (
        flat("4.50.3", rope_scaling=DEFAULT_ROPE, vision_config=SHORT | {"fullatt_block_indexes": [1]}),
        PREPROCESSOR | {"size": {"longest_edge": 12845056, "shortest_edge": 3136}},
    ),
    "4.52": (nested("4.52.4", "torch_dtype"), PREPROCESSOR | {"size": {"max_pixels": 12845056, "min_pixels": 3136}}),
    "4.53, fields in both places (olmOCR)": (nested("4.53.1", "torch_dtype", **SIZES, **COMMON), PREPROCESSOR),
    "4.55, Fast processor with nulls": (nested("4.55.0", "torch_dtype"), FAST | {"max_pixels": None, "size": None}),
    "4.57": (
        nested("4.57.1", "dtype"),
        LIMITS_IN_SIZE | {"size": {"longest_edge": 12845056, "shortest_edge": 3136}},
    ),
    "5.x": (
        version5(),
        {"image_processor": FAST, "video_processor": VIDEO, "processor_class": "Qwen2_5_VLProcessor"},
    ),
}


@pytest.fixture(params=LAYOUTS)
def folder(request, tmp_path) -> Path:
    config, preprocessor = copy.deepcopy(LAYOUTS[request.param])
    path = tmp_path / "a"
    path.mkdir()
    tokenizer = Processor.preset("tiny").tokenizer
    tokenizer.save(str(path / "tokenizer.json"))
    files = {
        "config.json": config,
        "generation_config.json": {"do_sample": True, "repetition_penalty": 1.05, "eos_token_id": [4076, 4074]},
        "tokenizer_config.json": {"model_max_length": 131072, "pad_token": "<|endoftext|>", "mine": {"a": 1}},
        "special_tokens_map.json": {"eos_token": {"content": "<|im_end|>", "lstrip": False}},
        "video_preprocessor_config.json": {"size": {"longest_edge": 602112, "shortest_edge": 100352}},
        ("processor_config.json" if "image_processor" in preprocessor else "preprocessor_config.json"): preprocessor,
    }
    for name, content in files.items():
        (path / name).write_text(json.dumps(content))
    Qwen25VL(ModelConfig.from_pretrained(path)).save_pretrained(tmp_path / "weights")
    (tmp_path / "weights" / "model.safetensors").rename(path / "model.safetensors")
    return path


def test_the_config_is_read_as_transformers_reads_it(folder):
    ours = ModelConfig.from_pretrained(folder)
    theirs = Qwen2_5_VLConfig.from_pretrained(folder)
    for name in (*SIZES, "rms_norm_eps", "bos_token_id", "pad_token_id", "max_position_embeddings"):
        assert getattr(ours, name) == getattr(theirs.text_config, name), name
    assert ours.rope_theta == theirs.text_config.rope_parameters["rope_theta"]
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings
    assert ours.vision.tokens_per_second == theirs.vision_config.tokens_per_second


def test_load_and_save_give_equal_files(folder, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing has changed, so nothing is said
        model = Qwen25VL.from_pretrained(folder)
        model.save_pretrained(tmp_path / "b", processor=Processor.from_pretrained(folder))
    for path in folder.glob("*.json"):
        assert json.loads((tmp_path / "b" / path.name).read_text()) == json.loads(path.read_text()), path.name
    added = {p.name for p in (tmp_path / "b").iterdir()} - {p.name for p in folder.iterdir()}
    assert added == {"fastvst_processor.json"}
    again = Qwen25VL.from_pretrained(tmp_path / "b").state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())


def test_the_table_has_every_layout():
    page = (Path(__file__).parents[2] / "docs" / "checkpoints.md").read_text()
    assert [name for name in LAYOUTS if f"| {name} |" not in page] == []
