"""The processor's files in a model directory: read in the order of transformers, and written back as they were."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from fastvst import jsonl
from fastvst.data.chat import JINJA_TEMPLATE
from fastvst.data.chat_template import ChatTemplate, find_template, is_stock, is_stock_without_images
from fastvst.data.images import CLIP_MEAN, CLIP_STD, PatchGeometry
from fastvst.data.processor_config import ProcessorConfig, make_config
from fastvst.model import checkpoint_files
from fastvst.model.checkpoint_files import json_text, read_json
from fastvst.model.config import ModelConfig
from fastvst.model.json_values import checked, count, flag, mapping, number, one_or_equal, several, text

OWN_FILE = "fastvst_processor.json"
NESTED = "processor_config.json"
FLAT = "preprocessor_config.json"
VIDEO = "video_preprocessor_config.json"
KEPT = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    FLAT,
    NESTED,
    VIDEO,
    "chat_template.json",
    "chat_template.jinja",
)
# Fields of the preprocessor_config.json of Qwen2.5-VL; resample 3 is bicubic.
PIXEL_STEPS: dict[str, Any] = {
    "do_convert_rgb": True,
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "rescale_factor": 1 / 255,
    "resample": 3,
}
# What an absent field means in transformers (Qwen2VLImageProcessor).
DEFAULTS: dict[str, Any] = {
    "min_pixels": 56 * 56,
    "max_pixels": 28 * 28 * 1280,
    "image_mean": CLIP_MEAN,
    "image_std": CLIP_STD,
}
MAX_TEMPLATE = 2**20  # bytes of one chat template
LIMITS = {"min_pixels": "shortest_edge", "max_pixels": "longest_edge"}
# The same for videos (Qwen2VLVideoProcessor, pixels of a frame). transformers 4.52 had other limits.
VIDEO_DEFAULTS = {"min_pixels": 128 * 28 * 28, "max_pixels": 768 * 28 * 28, "min_frames": 4, "max_frames": 768}
VIDEO_LIMITS_4_52 = {"min_pixels": 56 * 56, "max_pixels": 28 * 28 * 1280}
VIDEO_FIELDS = {
    "min_pixels": "video_min_pixels",
    "max_pixels": "video_max_pixels",
    "min_frames": "min_frames",
    "max_frames": "max_frames",
    "fps": "fps",
}
# How the fields of the image and video processors' files are read.
COUNTS = (*LIMITS, *LIMITS.values(), "min_frames", "max_frames", "num_frames")
READERS = {name: count() for name in COUNTS} | {
    "patch_size": one_or_equal(count()),
    "temporal_patch_size": one_or_equal(count()),
    "merge_size": one_or_equal(count()),
    "fps": number(0, above=True),
    "image_mean": several(number(), 3),
    "image_std": several(number(0, above=True), 3),
    "size": mapping,
    "image_processor_type": text,
    "do_center_crop": flag,
    "do_sample_frames": flag,
}


@dataclass(frozen=True)
class ProcessorFiles:
    """The files that a processor was read from.

    Attributes:
        contents: file name -> bytes.
        template: the model's own chat template, or None for the stock one.
        pixels: the fields of ProcessorConfig that the image processor's file gave.
        video: the fields of ProcessorConfig that the video processor's file gave.
        tokens: tokens of the tokenizer when it was loaded.
    """

    contents: Mapping[str, bytes] = field(default_factory=dict)
    template: ChatTemplate | None = None
    pixels: Mapping[str, Any] = field(default_factory=dict)
    video: Mapping[str, Any] = field(default_factory=dict)
    tokens: int = 0

    def json(self, name: str) -> dict[str, Any]:
        return jsonl.loads(self.contents[name]) if name in self.contents else {}


def read_files(
    directory: Path, model_config: ModelConfig, tokenizer: Tokenizer
) -> tuple[ProcessorFiles, dict[str, Any]]:
    """The files of a model directory, and the fields of ProcessorConfig that they set.

    Pixel limits and normalisation come from transformers 5's `processor_config.json`, else from
    `preprocessor_config.json`; limits of videos from the same file, else from `video_preprocessor_config.json`;
    everything else from `fastvst_processor.json`, where fastvst wrote the directory.

    Raises:
        FileNotFoundError: neither of the first two describes an image processor.
        ValueError: invalid JSON, a patch size that is not the model's, or other pixel steps than Qwen2.5-VL's.
    """
    extra = sorted((directory / "additional_chat_templates").glob("*.jinja"))
    paths = [directory / name for name in KEPT] + extra
    for one in [path for path in paths if path.is_file() and path.name != "tokenizer.json"]:
        checkpoint_files.check_pointer(one)
        checkpoint_files.check_size(one, MAX_TEMPLATE if one.suffix == ".jinja" else checkpoint_files.MAX_JSON)
    contents = {str(path.relative_to(directory)): path.read_bytes() for path in paths if path.is_file()}
    for name in contents:
        if name.endswith(".json") and name != "tokenizer.json":
            read_json(directory / name)
    found = find_template(
        lambda name: contents[name].decode("utf-8-sig") if name in contents else None,
        {path.stem: path.read_text(encoding="utf-8") for path in extra},
    )
    template = None if found is None or is_stock(found[1]) else ChatTemplate(f"{directory / found[0]}", found[1])
    if template is not None and is_stock_without_images(template):
        template = None
    own, pixels, video = _options(directory, model_config)
    files = ProcessorFiles(contents, template, pixels, video, tokenizer.get_vocab_size())
    return files, own | pixels | video


def read_options(directory: Path, model_config: ModelConfig) -> dict[str, Any]:
    """The fields of ProcessorConfig that the files of a model directory set. Raises as `read_files`."""
    own, pixels, video = _options(directory, model_config)
    return own | pixels | video


def _options(directory: Path, model_config: ModelConfig) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The fields of fastvst_processor.json, of the image processor's file and of the video processor's file."""
    name, values = _image_processor(directory)
    pixels = _pixels(directory / name, values, model_config)
    video = _video(directory, model_config, pixels)
    own = read_json(directory / OWN_FILE) if (directory / OWN_FILE).is_file() else {}
    try:
        make_config(own)
    except ValueError as error:
        raise ValueError(f"{directory / OWN_FILE}: {error}") from error
    try:
        make_config(own | pixels | video)
    except ValueError as error:
        raise ValueError(f"{directory}: {name} and {VIDEO}: {error}") from error
    others = sorted(n for n, value in video.items() if n in own and own[n] != value)
    if others:
        warnings.warn(f"{directory}: {OWN_FILE} has other values of {', '.join(others)}; {VIDEO} is used", stacklevel=5)
    return own, pixels, video


def _fields(path: Path, key: str = "") -> dict[str, Any] | None:
    """The fields of an image or video processor's file, or of the object `key` in it; None without one.

    Raises:
        ValueError: a value of another type than the field has, with file and field.
    """
    if not path.is_file():
        return None
    found: Any = read_json(path)
    where = f"{path}: "
    if key:
        found = checked(found, {key: mapping}, where).get(key)
        where += f"{key}."
    if found is None:
        return None
    found = checked(found, READERS, where)
    return found | {"size": checked(found["size"], READERS, f"{where}size.")} if found.get("size") else found


def _image_processor(directory: Path) -> tuple[str, dict[str, Any]]:
    """(file, fields) of the image processor, in transformers' order."""
    nested = _fields(directory / NESTED, "image_processor")
    flat = _fields(directory / FLAT)
    if nested is not None:
        if flat is not None and _limits(flat) != _limits(nested):
            warnings.warn(
                f"{directory}: the pixel limits of {NESTED} are used, as in transformers; {FLAT} has others",
                stacklevel=5,
            )
        return NESTED, nested
    if flat is not None:
        return FLAT, flat
    raise FileNotFoundError(
        f"{directory} has no preprocessor_config.json; copy it from the published checkpoint, or write the files "
        "with Processor.save_pretrained"
    )


def _video(directory: Path, model_config: ModelConfig, pixels: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of ProcessorConfig in the video processor's file; empty without one.

    transformers reads preprocessor_config.json then. It expects frames that qwen-vl-utils has resized within its own
    limits, which are the defaults of ProcessorConfig.
    """
    nested = _fields(directory / NESTED, "video_processor")
    flat = _fields(directory / VIDEO)
    values = nested if nested is not None else flat
    if values is None:
        return {}
    path = directory / (NESTED if nested is not None else VIDEO)
    version = str(model_config.stored.get("config.json", {}).get("transformers_version") or "")
    defaults = VIDEO_DEFAULTS | (VIDEO_LIMITS_4_52 if version.startswith("4.52.") else {})
    found = _video_fields(values, defaults)
    if nested is not None and flat is not None and _video_fields(flat, defaults) != found:
        warnings.warn(
            f"{directory}: the video limits of {NESTED} are used, as in transformers; {VIDEO} has others", stacklevel=5
        )
    _check_steps(path, values, model_config)
    scales = _scales(values)
    if any(pixels[name] != scale for name, scale in scales.items()):
        raise ValueError(f"{path} normalises videos with {scales}, images are normalised with other values")
    return found


def _video_fields(values: Mapping[str, Any], defaults: Mapping[str, int]) -> dict[str, Any]:
    size = values.get("size") or {}
    found: dict[str, Any] = {}
    for name, field_name in VIDEO_FIELDS.items():
        edge = LIMITS.get(name, name)
        value = values.get(name) or size.get(edge) or size.get(name) or defaults.get(name)
        if value is not None:
            found[field_name] = float(value) if name == "fps" and isinstance(value, int) else value
    if values.get("do_sample_frames") and values.get("num_frames"):  # transformers: this many, whatever the rate
        found |= {"min_frames": values["num_frames"], "max_frames": values["num_frames"]}
    return found


def _limits(values: Mapping[str, Any]) -> dict[str, int]:
    size = values.get("size") or {}
    found = {name: values.get(name) or size.get(edge) or size.get(name) for name, edge in LIMITS.items()}
    return {name: value or DEFAULTS[name] for name, value in found.items()}


def _pixels(path: Path, values: Mapping[str, Any], model_config: ModelConfig) -> dict[str, Any]:
    """The fields of ProcessorConfig in an image processor's file; null means absent."""
    kind = values.get("image_processor_type") or "Qwen2VLImageProcessor"
    size = values.get("size") or {}
    if not kind.startswith(("Qwen2VL", "Qwen2_5_VL")) or "height" in size or values.get("do_center_crop"):
        raise ValueError(
            f"{path} describes image_processor_type {kind} with size {size}: images of a fixed size. Qwen2.5-VL needs "
            "the Qwen2VLImageProcessor of its published checkpoint, with pixel limits"
        )
    _check_steps(path, values, model_config)
    return _limits(values) | _scales(values)


def _scales(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(values.get(name) or DEFAULTS[name]) for name in ("image_mean", "image_std")}


def _check_steps(path: Path, values: Mapping[str, Any], model_config: ModelConfig) -> None:
    """Raise ValueError for another patch size than the model's, or another processing of pixels."""
    vision = model_config.vision
    for name, expected in (
        ("patch_size", vision.patch_size),
        ("temporal_patch_size", vision.temporal_patch_size),
        ("merge_size", vision.spatial_merge_size),
    ):
        if values.get(name) not in (None, expected):
            raise ValueError(f"{path} says {name} = {values[name]}, config.json says {expected}")
    for name, published in PIXEL_STEPS.items():
        if values.get(name) not in (None, published):
            raise ValueError(f"{path} says {name} = {values[name]}; only {published} is supported")


def write_files(
    directory: Path, tokenizer: Tokenizer, geometry: PatchGeometry, config: ProcessorConfig, files: ProcessorFiles
) -> None:
    """Write the files that were read, changed only where the processor has changed since, and the missing ones.

    fastvst_processor.json holds the options that have no place in the files of transformers.
    """
    contents = dict(files.contents)
    changed = tokenizer.get_vocab_size() != files.tokens
    if changed:
        contents.pop("tokenizer.json", None)
    if "tokenizer_config.json" not in contents:
        contents["tokenizer_config.json"] = json_text(_tokenizer_config(tokenizer)).encode()
    elif changed:
        fields = files.json("tokenizer_config.json")
        fields["added_tokens_decoder"] = _added_tokens(tokenizer)
        contents["tokenizer_config.json"] = json_text(fields).encode()
    if not files.contents:
        contents["chat_template.json"] = json_text({"chat_template": JINJA_TEMPLATE}).encode()
        contents["chat_template.jinja"] = JINJA_TEMPLATE.encode()
    contents |= _pixel_files(geometry, config, files)
    own = {k: v for k, v in dataclasses.asdict(config).items() if k not in DEFAULTS}
    contents[OWN_FILE] = json_text(own).encode()
    with checkpoint_files.update(directory) as partial:
        if "tokenizer.json" not in contents:
            tokenizer.save(str(partial / "tokenizer.json"), pretty=False)
        for name, content in contents.items():
            (partial / name).parent.mkdir(exist_ok=True)
            (partial / name).write_bytes(content)


def _pixel_files(geometry: PatchGeometry, config: ProcessorConfig, files: ProcessorFiles) -> dict[str, bytes]:
    """The files of the image and the video processor where there were none, or where a limit has changed."""
    if not files.pixels:
        return _fresh_pixel_files(geometry, config)
    written: dict[str, Any] = {}
    fields = {name: name for name in files.pixels}
    for part, names, read, flat in (
        ("image_processor", fields, files.pixels, FLAT),
        ("video_processor", VIDEO_FIELDS, files.video, VIDEO),
    ):
        name = NESTED if files.json(NESTED).get(part) is not None else flat
        whole = written.get(name) or files.json(name)
        for key, own in names.items():
            value = getattr(config, own)
            if own in read and read[own] != value:
                _set(whole[part] if name == NESTED else whole, key, list(value) if isinstance(value, tuple) else value)
                written[name] = whole
    return {name: json_text(whole).encode() for name, whole in written.items()}


def _fresh_pixel_files(geometry: PatchGeometry, config: ProcessorConfig) -> dict[str, bytes]:
    common = {
        "processor_class": "Qwen2_5_VLProcessor",
        **PIXEL_STEPS,
        "patch_size": geometry.patch_size,
        "temporal_patch_size": geometry.temporal_patch_size,
        "merge_size": geometry.merge_size,
        "image_mean": list(geometry.mean),
        "image_std": list(geometry.std),
    }
    image = {
        "image_processor_type": "Qwen2VLImageProcessor",
        **common,
        "size": {"shortest_edge": config.min_pixels, "longest_edge": config.max_pixels},
        "min_pixels": config.min_pixels,
        "max_pixels": config.max_pixels,
    }
    video = {
        "video_processor_type": "Qwen2VLVideoProcessor",
        **common,
        "size": {"shortest_edge": config.video_min_pixels, "longest_edge": config.video_max_pixels},
        "min_frames": config.min_frames,
        "max_frames": config.max_frames,
        "fps": config.fps,
    }
    return {FLAT: json_text(image).encode(), VIDEO: json_text(video).encode()}


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    """Write a field in every place where the file has it; pixel limits may be in `size` under another name."""
    size = values.get("size") or {}
    places = [(size, name) for name in (LIMITS.get(key), key) if name in size]
    places += [(values, key)] if values.get(key) is not None or not places else []
    for place, name in places:
        place[name] = value


def _added_tokens(tokenizer: Tokenizer) -> dict[str, dict[str, Any]]:
    names = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    added = tokenizer.get_added_tokens_decoder()
    return {str(i): {name: getattr(token, name) for name in names} for i, token in sorted(added.items())}


def _tokenizer_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """tokenizer_config.json with the stock template."""
    special = [t.content for t in tokenizer.get_added_tokens_decoder().values() if t.special]
    return {
        "add_prefix_space": False,
        "added_tokens_decoder": _added_tokens(tokenizer),
        "additional_special_tokens": [name for name in special if name != "<|endoftext|>"],
        "bos_token": None,
        "chat_template": JINJA_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 131072,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
