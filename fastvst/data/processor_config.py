"""ProcessorConfig, and the processor's files in a model directory."""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from fastvst.config import not_an_option
from fastvst.data.chat import JINJA_TEMPLATE, SUPERVISE
from fastvst.data.images import CLIP_MEAN, CLIP_STD, RESIZE, PatchGeometry
from fastvst.data.video import VideoConfig
from fastvst.model import checkpoint_files
from fastvst.model.checkpoint_files import json_text, read_json
from fastvst.model.config import ModelConfig

OWN_FILE = "fastvst_processor.json"
# Fields of the preprocessor_config.json of Qwen2.5-VL; resample 3 is bicubic.
PIXEL_STEPS: dict[str, Any] = {
    "do_convert_rgb": True,
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "rescale_factor": 1 / 255,
    "resample": 3,
}


@dataclass(frozen=True)
class ProcessorConfig:
    r"""How samples become tokens and patches.

    Attributes:
        min_pixels: least pixels of an image after resizing; an image's own "min_pixels" overrides it.
        max_pixels: most pixels of an image after resizing; an image's own "max_pixels" overrides it.
        resize: resize filter: "pillow" (bit for bit as in VST) or "torch" (three times as fast; pixels mostly within 2
            of 255 levels).
        image_mean: mean of the three colour channels on the 0..1 scale.
        image_std: standard deviation of the three colour channels on the 0..1 scale.
        max_seq_len: most tokens of a sample; longer samples are rejected, never truncated.
        supervise: tokens that the loss covers: "message" (header, content and `<|im_end|>\n` of every assistant
            message, as in VST) or "content" (content and `<|im_end|>`).
        share_pixels: limit the images of a multi-image sample to a common 80 % of max_seq_len, as in VST.
        enable_fov: rewrite samples of kind "bbox_3d" for one virtual camera (FoV unification, as in VST).
        fov_base_width: image width of that virtual camera, in pixels.
        fps: frames per second that are sampled from a video.
        min_frames: least frames that are sampled from a video.
        max_frames: most frames that are sampled from a video.
        video_min_pixels: least pixels of a video frame after resizing.
        video_max_pixels: most pixels of a video frame after resizing.
        max_source_pixels: most pixels of an image file; larger files are rejected as decompression bombs (the default
            is the size at which Pillow warns).
        image_time_limit: most seconds for decoding one image.
        video_time_limit: most seconds for decoding one video.
    """

    min_pixels: int = 56 * 56
    max_pixels: int = 16384 * 28 * 28
    resize: str = "pillow"
    image_mean: tuple[float, float, float] = not_an_option(CLIP_MEAN)
    image_std: tuple[float, float, float] = not_an_option(CLIP_STD)
    max_seq_len: int = 16384
    supervise: str = not_an_option("message")
    share_pixels: bool = not_an_option(True)
    enable_fov: bool = True
    fov_base_width: int = 960
    fps: float = 2.0
    min_frames: int = 4
    max_frames: int = 768
    video_min_pixels: int = 128 * 28 * 28
    video_max_pixels: int = 768 * 28 * 28
    max_source_pixels: int = 89_478_485
    image_time_limit: float = not_an_option(10.0)
    video_time_limit: float = not_an_option(60.0)

    def __post_init__(self) -> None:
        if self.supervise not in SUPERVISE:
            raise ValueError(f"supervise is {self.supervise!r}; expected one of {SUPERVISE}")
        if self.resize not in RESIZE:
            raise ValueError(f"resize is {self.resize!r}; expected one of {RESIZE}")
        if not 0 < self.min_pixels <= self.max_pixels:
            raise ValueError(f"need 0 < min_pixels <= max_pixels; got {self.min_pixels} and {self.max_pixels}")
        if not 0 < self.video_min_pixels <= self.video_max_pixels:
            raise ValueError(
                f"need 0 < video_min_pixels <= video_max_pixels; got {self.video_min_pixels}, {self.video_max_pixels}"
            )
        if self.max_seq_len < 1 or not 0 < self.min_frames <= self.max_frames or not self.fps > 0:
            raise ValueError(
                "need max_seq_len >= 1, 0 < min_frames <= max_frames and fps > 0; got "
                f"{self.max_seq_len}, {self.min_frames}, {self.max_frames}, {self.fps}"
            )

    @property
    def video(self) -> VideoConfig:
        """The configuration of videos."""
        return VideoConfig(
            fps=self.fps,
            min_frames=self.min_frames,
            max_frames=self.max_frames,
            min_pixels=self.video_min_pixels,
            max_pixels=self.video_max_pixels,
        )


def make_config(options: dict[str, Any]) -> ProcessorConfig:
    """ProcessorConfig from keyword options.

    Raises:
        ValueError: an unknown option (the message has the nearest valid name), a wrong type, or a value out of range.
    """
    fields = {field.name: field.default for field in dataclasses.fields(ProcessorConfig)}
    clean: dict[str, Any] = {}
    for name, value in options.items():
        if name not in fields:
            near = difflib.get_close_matches(name, fields, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"valid options: {', '.join(fields)}"
            raise ValueError(f"unknown processor option {name!r}; {hint}")
        wanted: type = type(fields[name])
        if wanted is tuple and isinstance(value, (list, tuple)) and len(value) == 3:
            value = tuple(float(v) for v in value)
        elif wanted is float and type(value) is int:
            value = float(value)
        if type(value) is not wanted:
            raise ValueError(f"processor option {name} is {value!r}; expected {wanted.__name__}, e.g. {fields[name]}")
        clean[name] = value
    return ProcessorConfig(**clean)


def read_preprocessor(directory: Path, model_config: ModelConfig) -> dict[str, Any]:
    """The fields of ProcessorConfig that a model directory sets.

    Pixel limits and normalisation come from `preprocessor_config.json` (or transformers 5's `processor_config.json`),
    everything else from `fastvst_processor.json`, where the directory was written by fastvst.

    Raises:
        FileNotFoundError: neither of the first two exists.
        ValueError: invalid JSON, a patch size that is not the model's, or other pixel steps than Qwen2.5-VL's.
    """
    path = directory / "preprocessor_config.json"
    if path.is_file():
        values = read_json(path)
    elif (directory / "processor_config.json").is_file():
        path = directory / "processor_config.json"
        values = read_json(path).get("image_processor", {})
    else:
        raise FileNotFoundError(
            f"{directory} has no preprocessor_config.json; copy it from the published checkpoint, or write the files "
            "with Processor.save_pretrained"
        )
    vision = model_config.vision
    for name, expected in (
        ("patch_size", vision.patch_size),
        ("temporal_patch_size", vision.temporal_patch_size),
        ("merge_size", vision.spatial_merge_size),
    ):
        if values.get(name, expected) != expected:
            raise ValueError(f"{path} says {name} = {values[name]}, config.json says {expected}")
    for name, published in PIXEL_STEPS.items():
        if values.get(name, published) != published:
            raise ValueError(f"{path} says {name} = {values[name]}; only {published} is supported")
    size = values.get("size") or {}
    found = {
        "min_pixels": values.get("min_pixels") or size.get("shortest_edge") or size.get("min_pixels"),
        "max_pixels": values.get("max_pixels") or size.get("longest_edge") or size.get("max_pixels"),
        "image_mean": tuple(values.get("image_mean") or ()) or None,
        "image_std": tuple(values.get("image_std") or ()) or None,
    }
    own = directory / OWN_FILE
    saved = read_json(own) if own.is_file() else {}
    return saved | {name: value for name, value in found.items() if value is not None}


def write_files(directory: Path, tokenizer: Tokenizer, geometry: PatchGeometry, config: ProcessorConfig) -> None:
    """Write tokenizer.json, tokenizer_config.json, preprocessor_config.json, chat_template.json and .jinja, and
    fastvst_processor.json, which holds the options that have no place in the Hugging Face files."""
    added = tokenizer.get_added_tokens_decoder()
    fields = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    extra = [t.content for t in added.values() if t.special and t.content != "<|endoftext|>"]
    tokenizer_config = {
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(i): {name: getattr(token, name) for name in fields} for i, token in sorted(added.items())
        },
        "additional_special_tokens": extra,
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
    preprocessor_config = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
        **PIXEL_STEPS,
        "size": {"shortest_edge": config.min_pixels, "longest_edge": config.max_pixels},
        "min_pixels": config.min_pixels,
        "max_pixels": config.max_pixels,
        "patch_size": geometry.patch_size,
        "temporal_patch_size": geometry.temporal_patch_size,
        "merge_size": geometry.merge_size,
        "image_mean": list(geometry.mean),
        "image_std": list(geometry.std),
    }
    own = {k: v for k, v in dataclasses.asdict(config).items() if k not in preprocessor_config}
    with checkpoint_files.update(directory) as partial:
        tokenizer.save(str(partial / "tokenizer.json"), pretty=False)
        for name, content in (
            ("tokenizer_config.json", tokenizer_config),
            ("preprocessor_config.json", preprocessor_config),
            ("chat_template.json", {"chat_template": JINJA_TEMPLATE}),
            (OWN_FILE, own),
        ):
            (partial / name).write_text(json_text(content), encoding="utf-8")
        (partial / "chat_template.jinja").write_text(JINJA_TEMPLATE, encoding="utf-8")
