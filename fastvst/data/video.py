"""Videos to frames: which frames, at what size, how many seconds apart. Files are decoded by PyAV; or lists of frames.

Sampling follows qwen-vl-utils as VST uses it: `fps` frames per second, an even number between 4 and 768, uniformly
spaced from the first to the last frame, with a pixel budget for the whole video. The header of a video and its first
frame determine its cost. docs/images_and_video.md has every rule.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from fastvst.config import check_at_least, check_order, check_positive
from fastvst.data.image_modes import AS_DISPLAYED, ImageRules
from fastvst.data.images import WORK_PER_SECOND, MediaError, image_header, load_rgb, resize_planar, target_size
from fastvst.data.media_cache import Cache, media_key
from fastvst.data.video_file import VideoHeader, decode_wanted, read_header, work

BUDGET_SLACK = 1.05  # a frame may always have 5 % more pixels than the smallest size, as in qwen-vl-utils
MOST_MISSING = 0.25  # part of the selected frames that may be damaged
NEAR = 2  # frames: a decoded frame this close to a damaged one replaces it without being counted
FRAMES: Cache[DecodedVideo] = Cache(128 << 20)  # bytes of decoded frames that a process keeps


@dataclass(frozen=True)
class VideoConfig:
    """Sampling of videos. Pixels are per frame.

    Attributes:
        fps: frames per second to sample from a file, and the rate of a frame list that does not name its own.
        min_frames, max_frames: least and most sampled frames.
        min_pixels, max_pixels: least and most pixels of one frame.
        time_limit: most work of decoding one file, in nominal seconds of WORK_PER_SECOND pixels.
    """

    fps: float = 2.0
    min_frames: int = 4
    max_frames: int = 768
    min_pixels: int = 128 * 28 * 28
    max_pixels: int = 768 * 28 * 28
    time_limit: float = 60.0

    def __post_init__(self) -> None:
        check_at_least(
            1,
            min_frames=self.min_frames,
            max_frames=self.max_frames,
            min_pixels=self.min_pixels,
            max_pixels=self.max_pixels,
        )
        check_positive(fps=self.fps, time_limit=self.time_limit)
        check_order(min_frames=self.min_frames, max_frames=self.max_frames)
        check_order(min_pixels=self.min_pixels, max_pixels=self.max_pixels)


@dataclass(frozen=True)
class FrameSelection:
    """The frames that are taken from a video.

    Attributes:
        indices: frame numbers, ascending; an even number of them (the last may repeat).
        total: frames of the video.
        size: (width, height) of every sampled frame.
        seconds_per_grid: seconds between temporal grid steps (two frames), for M-RoPE.
        source_size: (width, height) of a frame as displayed, before resizing.
        notes: codes of what was changed.
    """

    indices: tuple[int, ...]
    total: int
    size: tuple[int, int]
    seconds_per_grid: float
    source_size: tuple[int, int] = (0, 0)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class DecodedVideo:
    """One (3, height, width) uint8 array for every selected frame, and the codes of what was changed."""

    frames: list[np.ndarray]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Source:
    """A video before selection: its frames `first`..`last` (both included) are used."""

    total: int
    first: int
    last: int
    rate: Fraction
    size: tuple[int, int]
    seconds: np.ndarray | None = None
    notes: tuple[str, ...] = ()
    header: VideoHeader | None = None

    @property
    def used(self) -> int:
        return self.last - self.first + 1


def total_pixel_budget(max_seq_len: int, factor: int = 28) -> int:
    """Pixels of all images of one sample: 80 % of the sequence as merged patches (VST: 10,276,044 for 16,384)."""
    return int(0.8 * max_seq_len * factor**2)


def frame_count(total: int, rate: Fraction, config: VideoConfig, total_pixels: int) -> int:
    """Number of frames to sample from `total` frames at `rate` per second; even, at least 2."""
    cap = total_pixels * 2 // max(int(BUDGET_SLACK * config.min_pixels), 1)
    most = max(min(config.max_frames, cap, total) // 2 * 2, 2)
    least = -(-config.min_frames // 2) * 2
    wanted = float(total / rate * Fraction(config.fps).limit_denominator(10**6))
    return max(int(min(max(wanted, least), most)) // 2 * 2, 2)


def frame_pixels(frames: int, config: VideoConfig, total_pixels: int) -> int:
    """Most pixels of one frame if `frames` of them share `total_pixels` (two frames make one patch)."""
    share = int(total_pixels / frames * 2)
    return min(config.max_pixels, max(share, int(BUDGET_SLACK * config.min_pixels)))


def select_frames(
    part: dict[str, Any],
    config: VideoConfig,
    *,
    total_pixels: int,
    factor: int,
    max_source_pixels: int,
    rules: ImageRules = AS_DISPLAYED,
) -> FrameSelection:
    """Frames, size and timing of a video part, from headers and the first frame.

    Args:
        part: {"type": "video", "video": path | encoded bytes | list of images}, and optionally the fields of
            qwen-vl-utils: "fps" (the rate to sample from a file, or the rate at which the frames of a list were taken,
            there "sample_fps" too), "nframes", "min_frames", "max_frames", "video_start", "video_end" (seconds),
            "min_pixels", "max_pixels", "total_pixels", "resized_width" and "resized_height". Its limits apply together
            with those of `config` and with the budget: the smaller one counts.
        total_pixels: pixel budget of the whole video, see `total_pixel_budget`.
        rules: how images are shown.

    Raises:
        MediaError: "broken_video", "empty_file", "missing_video", "empty_video", "bad_fps", "bad_field",
            "decode_timeout", or what `image_header` raises.
    """
    config = _config_of_part(part, config)
    total_pixels = int(min(total_pixels, _number(part, "total_pixels", total_pixels)))
    cap = total_pixels * 2 // max(int(BUDGET_SLACK * config.min_pixels), 1)
    if isinstance(part["video"], (list, tuple)):
        video = _measure_list(part["video"], config.fps, max_source_pixels, rules)
        count = min(video.used, max(min(config.max_frames, cap) // 2 * 2, 2))
    else:
        video = _measure_file(part, config, max_source_pixels, rules)
        count = frame_count(video.used, video.rate, config, total_pixels)
    if (asked := _number(part, "nframes", None)) is not None:
        count = max(min(round(asked / 2) * 2, min(config.max_frames, cap, video.used) // 2 * 2), 2)
    indices = _indices(video, count)
    if video.header is not None:
        _check_work(video.header, indices, config.time_limit)
    most = int(min(_number(part, "max_pixels", math.inf), frame_pixels(len(indices), config, total_pixels)))
    size = target_size(
        *video.size,
        factor=factor,
        min_pixels=int(min(_number(part, "min_pixels", config.min_pixels), most)),
        max_pixels=most,
        explicit=explicit_size(part),
    )
    spacing = Fraction(video.used, count) if count < video.used else Fraction(1)  # source frames per sampled frame
    return FrameSelection(
        indices, video.total, size, float(2 * spacing / video.rate), source_size=video.size, notes=video.notes
    )


def _config_of_part(part: dict[str, Any], config: VideoConfig) -> VideoConfig:
    """`config` with the rate and the numbers of frames of a row; a row never raises the most frames."""
    name = "sample_fps" if isinstance(part["video"], (list, tuple)) and part.get("sample_fps") else "fps"
    fps = _number(part, name, config.fps) if part.get(name) else config.fps
    max_frames = max(int(min(_number(part, "max_frames", config.max_frames), config.max_frames)), 1)
    min_frames = max(int(min(_number(part, "min_frames", config.min_frames), max_frames)), 1)
    return dataclasses.replace(config, fps=float(fps), min_frames=min_frames, max_frames=max_frames)


def _number(part: dict[str, Any], name: str, default: Any) -> Any:
    """A positive number of a row, also written as text; `default` where the row has none (None or NaN)."""
    value = part.get(name)
    try:
        number = math.nan if value is None else float(value)
    except (TypeError, ValueError):
        number = -math.inf
    if math.isnan(number):
        return default
    if isinstance(value, bool) or not (0 < number < math.inf or (number == 0 and name == "video_start")):
        reason = "bad_fps" if name in ("fps", "sample_fps") else "bad_field"
        raise MediaError(reason, f"{name} is {value!r}; expected a positive number")
    return number


def _check_work(header: VideoHeader, indices: Sequence[int], time_limit: float) -> None:
    needed = work(header, sorted(set(indices))) / WORK_PER_SECOND
    if needed > time_limit:
        raise MediaError(
            "decode_timeout",
            f"its selected frames need {needed * WORK_PER_SECOND:.3g} decoded pixels, {needed:.0f} s at "
            f"{WORK_PER_SECOND:,} a second; raise video_time_limit from {time_limit:g} to {math.ceil(needed)}",
        )


def _indices(video: _Source, count: int) -> tuple[int, ...]:
    """`count` frame numbers, uniform in time from the first to the last used frame; an odd number repeats its last."""
    first = video.first
    last = video.last
    if video.seconds is not None:
        times = np.linspace(video.seconds[first], video.seconds[last], count)
        # what is shown at that time; a nanosecond of tolerance for the rounding of linspace
        chosen = np.searchsorted(video.seconds, times + 1e-9, side="right") - 1
        indices = tuple(int(i) for i in np.clip(chosen, first, last))
    elif count < video.used:
        indices = tuple(int(i) for i in np.round(np.linspace(first, last, count)))
    else:
        indices = tuple(range(first, last + 1))
    return indices + indices[-1:] * (len(indices) % 2)  # as transformers repeats the last frame


plan_video = select_frames  # the name for callers outside this repository


def explicit_size(part: dict[str, Any]) -> tuple[int, int] | None:
    """(width, height) that the row asks for, or None; VST writes -1 for "unchanged"."""
    if any(part.get(name) in (-1, 0) for name in ("resized_width", "resized_height")):
        return None
    width = _number(part, "resized_width", None)
    height = _number(part, "resized_height", None)
    return None if width is None or height is None else (max(int(width), 1), max(int(height), 1))


def pixel_limits(part: dict[str, Any], min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """(least, most) pixels of an image: the row's own limits, or the given ones. The upper limit wins."""
    most = int(_number(part, "max_pixels", max_pixels))
    return min(int(_number(part, "min_pixels", min_pixels)), most), most


def load_frames(
    part: dict[str, Any],
    selection: FrameSelection,
    *,
    time_limit: float,
    max_source_pixels: int,
    resize: str = "pillow",
    rules: ImageRules = AS_DISPLAYED,
) -> list[np.ndarray]:
    """`decode_video(...).frames`; arguments and errors are the same."""
    return decode_video(
        part, selection, time_limit=time_limit, max_source_pixels=max_source_pixels, resize=resize, rules=rules
    ).frames


def decode_video(
    part: dict[str, Any],
    selection: FrameSelection,
    *,
    time_limit: float,
    max_source_pixels: int,
    resize: str = "pillow",
    rules: ImageRules = AS_DISPLAYED,
) -> DecodedVideo:
    """Decode the selected frames. The arrays are read-only.

    The results of the last videos are kept, up to 128 MiB, so that a video asked about ten times is decoded
    once. A damaged frame is replaced by the one that a player shows in its place.

    Args:
        time_limit: most work in nominal seconds, see `VideoConfig.time_limit`.
        resize: method of `resize_planar`.

    Raises:
        MediaError: "broken_video" (undecodable, or more than a quarter of the selected frames is damaged),
            "decode_timeout", or what `load_rgb` raises.
    """
    content = media_key(part["video"])
    key = None if content is None else (content, selection.indices, selection.size, resize, rules)
    video = FRAMES.get(key)
    if video is not None and time_limit > 0:
        return video
    decode = _decode_list if isinstance(part["video"], (list, tuple)) else _decode_file
    video = decode(part["video"], selection, time_limit, max_source_pixels, resize, rules)
    for frame in video.frames:
        frame.flags.writeable = False
    FRAMES.put(key, video, sum(frame.nbytes for frame in video.frames))
    return video


def _decode_list(
    images: Sequence[Any],
    selection: FrameSelection,
    time_limit: float,
    max_source_pixels: int,
    resize: str,
    rules: ImageRules,
) -> DecodedVideo:
    decoded: dict[int, np.ndarray] = {}
    for index in selection.indices:
        if index not in decoded:
            image = load_rgb(images[index], max_source_pixels=max_source_pixels, time_limit=time_limit, rules=rules)
            decoded[index] = resize_planar(image, selection.size, resize)
    return DecodedVideo([decoded[index] for index in selection.indices])


def _decode_file(
    source: Any,
    selection: FrameSelection,
    time_limit: float,
    max_source_pixels: int,
    resize: str,
    rules: ImageRules,
) -> DecodedVideo:
    header = read_header(source, max_source_pixels=max_source_pixels, orientation=rules.orientation)
    wanted = sorted(set(selection.indices))
    frames, distance = decode_wanted(
        source,
        header,
        wanted,
        lambda image: resize_planar(image, selection.size, resize),
        limit=time_limit * WORK_PER_SECOND,
    )
    far = [index for index in wanted if distance.get(index, NEAR + 1) > NEAR]
    if not frames or len(far) > MOST_MISSING * len(wanted):
        raise MediaError(
            "broken_video", f"{len(far)} of {len(wanted)} selected frames of {selection.total} cannot be decoded"
        )
    first = frames[min(frames)]  # frames before the first decodable one
    notes = ("frames_repeated",) if any(distance.get(index, 1) for index in wanted) else ()
    return DecodedVideo([frames.get(index, first) for index in selection.indices], notes)


def _measure_list(frames: Any, rate: float, max_source_pixels: int, rules: ImageRules) -> _Source:
    if not frames:
        raise MediaError("empty_video", "the frame list has no frames")
    header = image_header(frames[0], max_source_pixels=max_source_pixels, rules=rules)
    last = len(frames) - 1
    return _Source(len(frames), 0, last, Fraction(rate).limit_denominator(10**6), header.size, notes=header.notes)


def _measure_file(part: dict[str, Any], config: VideoConfig, max_source_pixels: int, rules: ImageRules) -> _Source:
    header = read_header(part["video"], max_source_pixels=max_source_pixels, orientation=rules.orientation)
    rate = header.rate or Fraction(config.fps).limit_denominator(10**6)
    first, last = _clip(part, header.total, rate, header.seconds)
    if header.seconds is not None and last > first:  # the rate of the part that is used
        rate = _rate_within(header.seconds, first, last, rate)
    return _Source(header.total, first, last, rate, header.size, header.seconds, header.notes, header)


def _rate_within(seconds: np.ndarray, first: int, last: int, rate: Fraction) -> Fraction:
    whole = first == 0 and last == len(seconds) - 1
    span = float(seconds[last] - seconds[first])
    return rate if whole or span <= 0 else Fraction((last - first) / span).limit_denominator(10**6)


def _clip(part: dict[str, Any], total: int, rate: Fraction, seconds: np.ndarray | None) -> tuple[int, int]:
    """First and last frame between the seconds "video_start" and "video_end" of a row, as in qwen-vl-utils."""
    start = _number(part, "video_start", 0.0)
    end = _number(part, "video_end", math.inf)
    if seconds is None:
        first = math.ceil(start * rate)
        last = total - 1 if end == math.inf else min(math.floor(end * rate), total - 1)
    else:
        first = int(np.searchsorted(seconds, start - 1e-9))
        last = int(np.searchsorted(seconds, end + 1e-9, side="right")) - 1
    if first > last:
        raise MediaError(
            "empty_video", f"no frame from second {start:g} to {end:g}; it has {float(total / rate):.3g} s"
        )
    return first, last
