"""ProcessorConfig: how samples become tokens and patches."""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass
from typing import Any

from fastvst.config import check_at_least, check_order, check_positive, not_an_option
from fastvst.data.chat import SUPERVISE
from fastvst.data.image_modes import ImageRules
from fastvst.data.images import CLIP_MEAN, CLIP_STD, RESIZE
from fastvst.data.video import VideoConfig


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
        alpha: transparent pixels of an image: "white" (composed on white, as viewers show them) or "drop" (alpha is
            ignored, as in transformers).
        orientation: apply the EXIF orientation of images, and the display matrix and pixel aspect ratio of videos.
        video_rule: positions of videos: "extent" (as the published weights were trained), "grid" (as transformers since
            5.3), or "" for the rule of the model's config.json.
        max_source_pixels: most pixels of an image file; larger files are rejected as decompression bombs (the default
            is the size at which Pillow warns).
        image_time_limit: most seconds for decoding one image, counted in pixels: 200 million a second, once a scan.
        video_time_limit: most seconds for decoding one video, counted in pixels: 200 million a second.
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
    alpha: str = "white"
    orientation: bool = True
    video_rule: str = ""
    max_source_pixels: int = 89_478_485
    image_time_limit: float = not_an_option(10.0)
    video_time_limit: float = not_an_option(60.0)

    def __post_init__(self) -> None:
        if self.supervise not in SUPERVISE:
            raise ValueError(f"supervise is {self.supervise!r}; expected one of {SUPERVISE}")
        if self.resize not in RESIZE:
            raise ValueError(f"resize is {self.resize!r}; expected one of {RESIZE}")
        if self.video_rule not in ("", "extent", "grid"):
            raise ValueError(f"video_rule is {self.video_rule!r}; expected 'extent', 'grid' or ''")
        _ = self.rules  # checks alpha
        check_at_least(
            1,
            min_pixels=self.min_pixels,
            max_pixels=self.max_pixels,
            max_seq_len=self.max_seq_len,
            fov_base_width=self.fov_base_width,
            min_frames=self.min_frames,
            max_frames=self.max_frames,
            video_min_pixels=self.video_min_pixels,
            video_max_pixels=self.video_max_pixels,
            max_source_pixels=self.max_source_pixels,
        )
        check_positive(fps=self.fps, image_time_limit=self.image_time_limit, video_time_limit=self.video_time_limit)
        check_order(min_pixels=self.min_pixels, max_pixels=self.max_pixels)
        check_order(min_frames=self.min_frames, max_frames=self.max_frames)
        check_order(video_min_pixels=self.video_min_pixels, video_max_pixels=self.video_max_pixels)
        if not all(abs(value) < float("inf") for value in self.image_mean):
            raise ValueError(f"image_mean is {self.image_mean}; expected three finite numbers")
        if not all(0 < value < float("inf") for value in self.image_std):
            raise ValueError(f"image_std is {self.image_std}; expected three numbers above 0")

    @property
    def rules(self) -> ImageRules:
        """How images are shown to the model."""
        return ImageRules(self.alpha, self.orientation)

    @property
    def video(self) -> VideoConfig:
        """The configuration of videos."""
        return VideoConfig(
            fps=self.fps,
            min_frames=self.min_frames,
            max_frames=self.max_frames,
            min_pixels=self.video_min_pixels,
            max_pixels=self.video_max_pixels,
            time_limit=self.video_time_limit,
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
