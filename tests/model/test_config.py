"""config.json in both forms, and the presets against published parameter counts."""

import dataclasses
import json
import warnings

import pytest
import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from fastvst.model import ModelConfig, Qwen25VL, VisionConfig, config_json
from hf_parity import small_config

FLAT = {  # the fields of the published 7B config.json (transformers 4.41 wrote it)
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "max_position_embeddings": 128000,
    "model_type": "qwen2_5_vl",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "use_sliding_window": False,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.41.2",
    "vision_config": {
        "depth": 32,
        "hidden_act": "silu",
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "in_chans": 3,
        "out_hidden_size": 3584,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "tokens_per_second": 2,
        "temporal_patch_size": 2,
    },
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "vocab_size": 152064,
}


@pytest.mark.parametrize(
    "name, billions", [("tiny", 0.002661), ("3b", 3.755), ("7b", 8.292), ("32b", 33.45), ("72b", 73.41)]
)
def test_presets_have_the_published_size(name, billions):
    """The nominal sizes on the model cards are 3.75, 8.29, 33.5 and 73.4 B; transformers counts the same tensors."""
    config = ModelConfig.preset(name)
    with torch.device("meta"):
        ours = Qwen25VL(config)
        theirs = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**json.loads(config.to_json())))
    count = sum(tensor.numel() for tensor in ours.state_dict().values())
    assert count / 1e9 == pytest.approx(billions, rel=1e-3)
    assert count == sum(p.numel() for p in theirs.parameters())


def test_published_flat_file_equals_the_preset():
    read = ModelConfig.from_dict(FLAT)
    assert read == dataclasses.replace(ModelConfig.preset("7b"), eos_token_ids=(151645,))


def test_absent_fields_mean_what_transformers_means():
    """Every default, so that a new version of transformers that moves one is noticed."""
    for defaults, theirs in (
        (config_json.TEXT_DEFAULTS, Qwen2_5_VLConfig().text_config),
        (config_json.VISION_DEFAULTS, Qwen2_5_VLConfig().vision_config),
        (config_json.TOKEN_DEFAULTS | {"tie_word_embeddings": False}, Qwen2_5_VLConfig()),
    ):
        for name, value in defaults.items():
            found = getattr(theirs, name)
            assert (tuple(found) if isinstance(found, list) else found) == value, name
    assert Qwen2_5_VLConfig().text_config.rope_parameters["rope_theta"] == config_json.ROPE_THETA
    read = {*config_json.SIZES, *config_json.TEXT_DEFAULTS, *config_json.VISION_DEFAULTS, "mrope_section"}
    read |= {"eos_token_ids", "rope_theta", "tie_word_embeddings", "video_rule", *config_json.TOKEN_DEFAULTS}
    fields = {f.name for c in (ModelConfig, VisionConfig) for f in dataclasses.fields(c)}
    assert fields - read == {"vision", "stored"}  # every field has its default above or is required


@pytest.mark.parametrize("name", ["rms_norm_eps", "bos_token_id", "eos_token_id", "max_position_embeddings"])
@pytest.mark.parametrize("nested", [False, True])
def test_one_absent_field_of_the_decoder(name, nested):
    data = json.loads(json.dumps(ModelConfig.preset("7b").config_content() if nested else FLAT))
    (data["text_config"] if nested else data).pop(name)
    data["hidden_size"] = 4096 if nested else data["hidden_size"]  # transformers reads text_config alone
    ours = ModelConfig.from_dict(data)
    theirs = Qwen2_5_VLConfig(**json.loads(json.dumps(data))).text_config
    expected = getattr(theirs, name)
    assert (ours.eos_token_ids == (expected,)) if name == "eos_token_id" else (getattr(ours, name) == expected)
    assert ours.hidden_size == theirs.hidden_size == 3584


@pytest.mark.parametrize("here, there", [(True, False), (False, True), (True, None), (None, True), (False, None)])
def test_a_tie_here_and_not_there(tmp_path, here, there):
    data = ModelConfig.preset("tiny").config_content()
    for place, value in ((data, here), (data["text_config"], there)):
        place.pop("tie_word_embeddings")
        place |= {} if value is None else {"tie_word_embeddings": value}
    (tmp_path / "config.json").write_text(json.dumps(data))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        ours = ModelConfig.from_pretrained(tmp_path).tie_word_embeddings
    assert ours == Qwen2_5_VLConfig.from_pretrained(tmp_path).tie_word_embeddings
    expected = f"tie_word_embeddings is {here} and in text_config {there}; the embeddings are tied, as in transformers"
    told = [str(w.message) for w in said if "config.json" in str(w.message)]
    assert len(told) == (None not in (here, there)) and all(text.endswith(expected) for text in told)


def test_two_values_in_one_file_are_named_once(tmp_path):
    data = ModelConfig.preset("tiny").config_content() | {"hidden_size": 2048, "rms_norm_eps": 1e-3}
    data["text_config"]["rope_parameters"] = data["text_config"]["rope_parameters"] | {"rope_theta": 5.0}
    data["text_config"]["rope_scaling"]["rope_theta"] = 7.0
    (tmp_path / "config.json").write_text(json.dumps(data))
    with pytest.warns(UserWarning) as said:
        ours = ModelConfig.from_pretrained(tmp_path)
    theirs = Qwen2_5_VLConfig.from_pretrained(tmp_path).text_config
    assert (
        (ours.hidden_size, ours.rope_theta) == (theirs.hidden_size, theirs.rope_parameters["rope_theta"]) == (192, 7.0)
    )
    (text,) = [str(w.message) for w in said if "config.json" in str(w.message)]
    for words in (
        "hidden_size is 2048 and in text_config 192; text_config counts",
        "rms_norm_eps is 0.001",
        "rope_theta is 7.0 in rope_scaling and 5.0 in rope_parameters; rope_scaling counts",
    ):
        assert words in text


def test_absent_kv_heads_are_eight():
    data = ModelConfig.preset("32b").config_content()
    del data["text_config"]["num_key_value_heads"]
    assert ModelConfig.from_dict(data).num_key_value_heads == 8


def test_null_fields_and_fields_of_the_tower():
    data = FLAT | {"num_key_value_heads": None, "pad_token_id": None, "eos_token_id": None, "text_config": None}
    data["vision_config"] = {"hidden_size": 1280, "out_hidden_size": 3584, "in_chans": 3, "depth": None}
    ours = ModelConfig.from_dict(data)
    assert ours.num_key_value_heads == 28 and ours.pad_token_id is None and ours.eos_token_ids == ()
    assert ours.vision == VisionConfig(tokens_per_second=4)
    assert ModelConfig.from_dict(FLAT | {"vision_config": None}).vision.hidden_size == 3584


def test_rope_scaling_wins_over_rope_parameters_as_in_transformers():
    data = FLAT | {"rope_parameters": {"rope_type": "default", "mrope_section": [8, 28, 28], "rope_theta": 5e5}}
    ours = ModelConfig.from_dict(data)
    theirs = Qwen2_5_VLConfig(**json.loads(json.dumps(data))).text_config.rope_parameters
    assert ours.mrope_section == tuple(theirs["mrope_section"]) == (16, 24, 24)
    assert ours.rope_theta == theirs["rope_theta"] == 1e6


def test_a_file_keeps_its_form_and_its_other_fields(tmp_path):
    extra = {"name_or_path": "x", "auto_map": {"AutoModel": "m.M"}, "torch_dtype": "bfloat16", "max_window_layers": 28}
    generation = {"do_sample": True, "temperature": 0.1, "top_k": 1, "eos_token_id": [151645, 151643]}
    (tmp_path / "config.json").write_text(json.dumps(FLAT | extra))
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    read = ModelConfig.from_pretrained(tmp_path)
    assert json.loads(read.to_json()) == FLAT | extra and json.loads(read.generation_json()) == generation
    grown = dataclasses.replace(
        read,
        vocab_size=152100,
        eos_token_ids=(151643,),
        rope_theta=5e5,
        video_rule="grid",
        vision=dataclasses.replace(read.vision, tokens_per_second=4),
    )
    changed = json.loads(grown.to_json())
    expected = FLAT | extra | {"vocab_size": 152100, "eos_token_id": 151643, "rope_theta": 5e5}
    expected |= {"fastvst_video_rule": "grid", "vision_config": FLAT["vision_config"] | {"tokens_per_second": 4}}
    assert changed == expected and json.loads(grown.generation_json()) == generation | {"eos_token_id": [151643]}
    assert ModelConfig.from_dict(changed) == grown


def test_files_of_transformers_are_read(tmp_path):
    """Flat file -> transformers 5 -> its nested file -> ours."""
    Qwen2_5_VLConfig(**json.loads(json.dumps(FLAT))).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert "text_config" in saved and "hidden_size" not in saved
    assert ModelConfig.from_pretrained(tmp_path) == ModelConfig.from_dict(FLAT)


@pytest.mark.parametrize("config", [ModelConfig.preset("tiny"), ModelConfig.preset("3b"), small_config()])
def test_both_read_our_files(config):
    data = json.loads(config.to_json())
    ours = ModelConfig.from_dict(data)
    assert dataclasses.replace(ours, eos_token_ids=config.eos_token_ids) == config
    theirs = Qwen2_5_VLConfig(**data)
    text = theirs.text_config
    vision = theirs.vision_config
    assert theirs.tie_word_embeddings == config.tie_word_embeddings
    assert text.rope_parameters["rope_theta"] == config.rope_theta
    assert tuple(text.rope_parameters["mrope_section"]) == config.mrope_section
    for name in ("hidden_size", "num_key_value_heads", "rms_norm_eps", "vocab_size", "eos_token_id", "pad_token_id"):
        assert getattr(text, name) == data["text_config"][name]
    for field in dataclasses.fields(config.vision):
        value = getattr(vision, field.name)
        assert (tuple(value) if isinstance(value, list) else value) == getattr(config.vision, field.name)


def test_video_rule_does_not_depend_on_who_saved_the_file(caplog):
    for version in ("4.49.0", "5.2.0"):
        assert ModelConfig.from_dict(FLAT | {"transformers_version": version}).video_rule == "extent"
    assert not caplog.records
    for _ in range(2):
        assert ModelConfig.from_dict(FLAT | {"transformers_version": "5.3.0.dev1"}).video_rule == "extent"
    (record,) = caplog.records  # named once
    assert "transformers 5.3.0.dev1" in record.getMessage() and "video_rule" in record.getMessage()
    own = {"transformers_version": "5.17.0", "fastvst_video_rule": "grid"}
    assert ModelConfig.from_dict(FLAT | own).video_rule == "grid"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "llama"}, "model_type is 'llama'; expected 'qwen2_5_vl'"),
        ({"rope_scaling": {"type": "yarn", "mrope_section": [16, 24, 24]}}, "rope type .'yarn'. is not known"),
        ({"rope_scaling": None}, "expected a dict with 'mrope_section'"),
        ({"layer_types": ["sliding_attention"] * 28}, "sliding windows in the decoder are not supported"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [8, 24, 24]}}, "mrope_section must sum to head_dim / 2"),
        ({"hidden_act": "gelu"}, "text hidden_act is 'gelu'"),
        ({"use_sliding_window": True}, "sliding windows in the decoder are not supported"),
        ({"hidden_size": 3000}, "hidden_size must be a multiple of num_attention_heads"),
    ],
)
def test_unsupported_configs_raise(change, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(FLAT | change))
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_pretrained(tmp_path)


def test_missing_fields_and_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json is missing"):
        ModelConfig.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in FLAT.items() if k != "vocab_size"}))
    with pytest.raises(ValueError, match=r"config.json: the fields \['vocab_size'\] are missing"):
        ModelConfig.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json"):
        ModelConfig.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="unknown preset '8b'"):
        ModelConfig.preset("8b")
