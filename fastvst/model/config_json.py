"""config.json and generation_config.json: fields and defaults as in transformers, and files that keep their form."""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Mapping
from typing import Any

from fastvst.model.json_values import (
    checked,
    count,
    flag,
    mapping,
    number,
    one_or_equal,
    several,
    text,
    token_ids,
)

logger = logging.getLogger(__name__)
WRITTEN_FOR = "5.17.0"  # the transformers version whose form of config.json `fresh` writes, and of the defaults below

# What a field means that a file leaves out (Qwen2_5_VLConfig, Qwen2_5_VLTextConfig and Qwen2_5_VLVisionConfig of
# transformers; tests/model/test_config.py compares every value). The published tower is not the default one.
TOKEN_DEFAULTS: dict[str, Any] = {
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
}
TEXT_DEFAULTS: dict[str, Any] = {
    "num_key_value_heads": 8,  # null means num_attention_heads
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 32_768,
    "initializer_range": 0.02,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "pad_token_id": None,
    "hidden_act": "silu",
    "use_sliding_window": False,
}
VISION_DEFAULTS: dict[str, Any] = {
    "depth": 32,
    "hidden_size": 3584,
    "hidden_act": "silu",
    "intermediate_size": 3420,
    "num_heads": 16,
    "in_channels": 3,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "tokens_per_second": 4,
    "window_size": 112,
    "out_hidden_size": 3584,
    "fullatt_block_indexes": (7, 15, 23, 31),
}
ROPE_THETA = 1_000_000.0
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
MAY_BE_NULL = ("bos_token_id", "eos_token_id", "pad_token_id", "num_key_value_heads")
DTYPE_KEYS = ("dtype", "torch_dtype")
# How the fields of a config.json are read.
ROPE_READERS = {"mrope_section": several(count(0), 3), "rope_theta": number(0, above=True)}
TOP_READERS = {name: count(0) for name in TOKEN_DEFAULTS} | {
    "text_config": mapping,
    "vision_config": mapping,
    "tie_word_embeddings": flag,
    "fastvst_video_rule": text,
    "transformers_version": text,
}
TEXT_READERS = {name: count() for name in (*SIZES, "num_key_value_heads", "max_position_embeddings")} | {
    "rms_norm_eps": number(0),
    "initializer_range": number(0),
    "rope_theta": number(0, above=True),
    "bos_token_id": count(0),
    "eos_token_id": token_ids,
    "pad_token_id": count(-1),
    "hidden_act": text,
    "use_sliding_window": flag,
    "tie_word_embeddings": flag,
    "layer_types": several(text),
    "rope_scaling": mapping,
    "rope_parameters": mapping,
}
VISION_READERS = {name: one_or_equal(count()) for name in VISION_DEFAULTS} | {
    "hidden_act": text,
    "fullatt_block_indexes": several(count(0)),
}
GENERATION_READERS = {"eos_token_id": token_ids}


def parse(data: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields of ModelConfig (without `vision`) and of VisionConfig in the content of a config.json.

    The file is flat (transformers 4.x) or nested (`text_config`, since 4.52). As in transformers, a nested file gives
    the decoder's fields in `text_config` alone.

    Raises:
        ValueError: another architecture, an unknown rope type or activation, a missing size.
    """
    if data.get("model_type") != "qwen2_5_vl":
        raise ValueError(f"model_type is {data.get('model_type')!r}; expected 'qwen2_5_vl'")
    data = checked(data, TOP_READERS)
    null = [name for name in TOKEN_DEFAULTS if data.get(name, 0) is None]
    if null:
        raise ValueError(f"{null[0]} is null; expected a token id")
    nested = data.get("text_config") is not None
    text = {**TEXT_DEFAULTS, **_present(data["text_config"] if nested else data)}
    text = checked(text, TEXT_READERS, "text_config." if nested else "")
    for name in ("rope_scaling", "rope_parameters"):
        if text.get(name):
            text[name] = checked(text[name], ROPE_READERS, f"{name}.")
    vision = {**VISION_DEFAULTS, **_present(data.get("vision_config") or {})}
    vision = checked(vision, VISION_READERS, "vision_config.")
    _check_supported(text, vision)
    missing = [name for name in SIZES if name not in text]
    if missing:
        raise ValueError(f"the fields {missing} are missing")
    theta, section = _rope(text)
    fields = {name: text[name] for name in SIZES}
    fields |= {name: text[name] for name in TEXT_DEFAULTS if name not in ("hidden_act", "use_sliding_window")}
    fields |= {name: data.get(name, default) for name, default in TOKEN_DEFAULTS.items()}
    fields["num_key_value_heads"] = fields["num_key_value_heads"] or text["num_attention_heads"]
    fields["eos_token_ids"] = tuple(fields.pop("eos_token_id") or ())
    fields["tie_word_embeddings"] = bool(data.get("tie_word_embeddings") or text.get("tie_word_embeddings"))
    fields |= {"rope_theta": theta, "mrope_section": section}
    version = data.get("transformers_version") or "4"
    rule = data.get("fastvst_video_rule")
    if rule not in (None, "", "extent", "grid"):
        raise ValueError(f"fastvst_video_rule is {rule!r}; expected 'extent' or 'grid'")
    fields["video_rule"] = rule or _video_rule(version)
    tower = {name: vision[name] for name in VISION_DEFAULTS if name != "hidden_act"}
    tower["fullatt_block_indexes"] = tuple(tower["fullatt_block_indexes"])
    return fields, tower


def contradictions(data: Mapping[str, Any]) -> list[str]:
    """Fields that a config.json has in two places with different values, each with the one that counts."""
    text = data.get("text_config")
    found = []
    if isinstance(text, dict):
        here = data.get("tie_word_embeddings")
        there = text.get("tie_word_embeddings")
        if None not in (here, there) and bool(here) != bool(there):
            found.append(f"tie_word_embeddings is {here} and in text_config {there}; the embeddings are tied")
        both = [n for n in (*SIZES, *TEXT_DEFAULTS) if None not in (data.get(n), text.get(n)) and data[n] != text[n]]
        found += [f"{name} is {data[name]} and in text_config {text[name]}; text_config counts" for name in both]
    else:
        text = data
    ropes = [text.get("rope_scaling"), text.get("rope_parameters")]
    for name in ("mrope_section", "rope_theta"):
        values = [rope.get(name) for rope in ropes if isinstance(rope, dict)]
        if len(values) == 2 and None not in values and values[0] != values[1]:
            first, second = values
            found.append(f"{name} is {first} in rope_scaling and {second} in rope_parameters; rope_scaling counts")
    return found


def generation_eos(data: Mapping[str, Any]) -> tuple[int, ...] | None:
    """The EOS tokens of a generation_config.json; None if it names none. Raises ValueError as `checked`."""
    found = checked(data, GENERATION_READERS).get("eos_token_id")
    return None if found is None else tuple(found)


def fresh(config: Any) -> dict[str, Any]:
    """config.json of a ModelConfig in the nested form of transformers 5.x, which transformers 4.5x opens too."""
    vision = {n: getattr(config.vision, n) for n in VISION_DEFAULTS if n != "hidden_act"}
    vision |= {"fullatt_block_indexes": list(config.vision.fullatt_block_indexes)}
    vision |= {"model_type": "qwen2_5_vl_vision", "hidden_act": "silu", "in_chans": config.vision.in_channels}
    vision |= {"initializer_range": config.initializer_range}
    rope = {"rope_type": "default", "type": "mrope", "mrope_section": list(config.mrope_section)}
    names = [*SIZES, "num_key_value_heads", "rms_norm_eps", "max_position_embeddings", "initializer_range"]
    names += ["bos_token_id", "pad_token_id", "tie_word_embeddings"]
    text = {n: getattr(config, n) for n in names} | {
        "model_type": "qwen2_5_vl_text",
        "hidden_act": "silu",
        "use_sliding_window": False,
        "eos_token_id": config.eos_token_ids[0] if config.eos_token_ids else None,
        "rope_theta": config.rope_theta,
        "rope_scaling": rope,
        "rope_parameters": rope | {"rope_theta": config.rope_theta},
    }
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        **{n: getattr(config, n) for n in TOKEN_DEFAULTS},
        "tie_word_embeddings": config.tie_word_embeddings,
        "fastvst_video_rule": config.video_rule,
        "transformers_version": WRITTEN_FOR,
        "text_config": text,
        "vision_config": vision,
    }


def fresh_generation(config: Any) -> dict[str, Any]:
    """generation_config.json of a ModelConfig: greedy by default, ends at any of `eos_token_ids`."""
    ids = {"bos_token_id": config.bos_token_id, "pad_token_id": config.pad_token_id}
    return {
        **{name: value for name, value in ids.items() if value is not None},
        "eos_token_id": list(config.eos_token_ids),
        "do_sample": False,
        "transformers_version": WRITTEN_FOR,
    }


def updated(stored: Mapping[str, Any], changes: Mapping[str, Any], tower: Mapping[str, Any]) -> dict[str, Any]:
    """A stored config.json with other values in the fields that changed, each in the place where the file has it.

    Args:
        changes: field of ModelConfig -> new value.
        tower: field of VisionConfig -> new value.
    """
    data = copy.deepcopy(dict(stored))
    text = data["text_config"] if isinstance(data.get("text_config"), dict) else data
    for name, value in changes.items():
        if name in TOKEN_DEFAULTS:
            data[name] = value
        elif name == "video_rule":
            data["fastvst_video_rule"] = value
        elif name == "tie_word_embeddings":
            data[name] = text[name] = value
        elif name == "eos_token_ids":
            text["eos_token_id"] = value[0] if value else None
        elif name in ("rope_theta", "mrope_section"):
            _set_rope(text, name, list(value) if name == "mrope_section" else value)
        else:
            text[name] = value
    if tower:
        vision = data["vision_config"] = data.get("vision_config") or {}
        vision.update({n: list(v) if isinstance(v, tuple) else v for n, v in tower.items()})
        if "in_chans" in vision and "in_channels" in tower:
            vision["in_chans"] = tower["in_channels"]
    return data


def updated_generation(stored: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A stored generation_config.json with other token ids where they changed; arguments as in `updated`."""
    data = copy.deepcopy(dict(stored))
    data |= {name: changes[name] for name in ("bos_token_id", "pad_token_id") if name in changes}
    if "eos_token_ids" in changes:
        data["eos_token_id"] = list(changes["eos_token_ids"])
    return data


def set_dtype(data: dict[str, Any], dtype: str) -> str | None:
    """Write the name of a dtype, e.g. "bfloat16", wherever a config.json has one; returns the first other name."""
    before = None
    for part in (data, data.get("text_config"), data.get("vision_config")):
        for key in DTYPE_KEYS:
            if isinstance(part, dict) and part.get(key) is not None and part[key] != dtype:
                before = before or str(part[key])
                part[key] = dtype
    return before


def _present(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that have a value; null is a value only where transformers distinguishes it from an absent field."""
    return {name: value for name, value in fields.items() if value is not None or name in MAY_BE_NULL}


def _check_supported(text: Mapping[str, Any], vision: Mapping[str, Any]) -> None:
    for name, tower in (("text", text), ("vision", vision)):
        if tower["hidden_act"] != "silu":
            raise ValueError(f"{name} hidden_act is {tower['hidden_act']!r}; only 'silu' is known")
    if text["use_sliding_window"] or "sliding_attention" in (text.get("layer_types") or ()):
        raise ValueError("use_sliding_window is true; sliding windows in the decoder are not supported")


def _rope(text: Mapping[str, Any]) -> tuple[float, tuple[int, int, int]]:
    """(theta, mrope_section) from `rope_scaling` and `rope_theta` (4.x), else from `rope_parameters` (5.x)."""
    rope = text.get("rope_scaling") or text.get("rope_parameters")
    if not rope or rope.get("mrope_section") is None:
        raise ValueError(f"rope_scaling / rope_parameters is {rope!r}; expected a dict with 'mrope_section'")
    for key in ("rope_type", "type"):
        if rope.get(key) not in (None, "default", "mrope"):
            raise ValueError(
                f"rope type [{rope[key]!r:.80}] is not known ({key}); expected 'mrope', or 'default' with mrope_section"
            )
    return float(rope.get("rope_theta") or text.get("rope_theta") or ROPE_THETA), tuple(rope["mrope_section"])


def _set_rope(text: dict[str, Any], name: str, value: Any) -> None:
    """Write rope_theta or mrope_section wherever the file has it."""
    places = [text[key] for key in ("rope_scaling", "rope_parameters") if text.get(key)]
    holders = [place for place in [*places, text] if name in place]
    for holder in holders or [text]:
        holder[name] = value


@functools.cache
def _video_rule(version: str) -> str:
    """ "extent", whichever version of transformers saved the file: the weights were trained with it, and saving changes
    no weight. transformers >= 5.3 itself computes the positions of "grid"; such a file is named in the log once."""
    numbers = [int(p) if p.isdigit() else 0 for p in version.split(".")[:2]]
    if numbers >= [5, 3]:
        logger.warning(
            "config.json was written by transformers %s, whose rule for videos is 'grid'; fastvst uses 'extent', "
            "as the published weights were trained. The processor option video_rule = 'grid' chooses the other",
            version,
        )
    return "extent"
