"""Videos to frames: which frames, at what size, how many seconds apart. Files are decoded by PyAV; or lists of frames.

Sampling follows qwen-vl-utils as VST uses it: `fps` frames per second, an even number between 4 and 768, uniformly
spaced from the first to the last frame, with a pixel budget for the whole video. The header of a video determines its
cost; no frame is decoded for it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastvst.data.images import MediaError, image_size, load_rgb, resize_planar, target_size

BUDGET_SLACK = 1.05  # a frame may always have 5 % more pixels than the smallest size, as in qwen-vl-utils


@dataclass(frozen=True)
class VideoConfig:
    """Sampling of videos. Pixels are per frame.

    Attributes:
        fps: frames per second to sample from a file, and the rate of a frame list that does not name its own.
        min_frames, max_frames: least and most sampled frames.
        min_pixels, max_pixels: least and most pixels of one frame.
    """

    fps: float = 2.0
    min_frames: int = 4
    max_frames: int = 768
    min_pixels: int = 128 * 28 * 28
    max_pixels: int = 768 * 28 * 28


@dataclass(frozen=True)
class FrameSelection:
    """The frames that are taken from a video.

    Attributes:
        indices: frame numbers, ascending; an even number of them (the last may repeat).
        total: frames of the video.
        size: (width, height) of every sampled frame.
        seconds_per_grid: seconds between temporal grid steps (two frames), for M-RoPE.
    """

    indices: tuple[int, ...]
    total: int
    size: tuple[int, int]
    seconds_per_grid: float


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
    return max(min(config.max_pixels, share), int(BUDGET_SLACK * config.min_pixels))


def select_frames(
    part: dict[str, Any], config: VideoConfig, *, total_pixels: int, factor: int, max_source_pixels: int
) -> FrameSelection:
    """Frames, size and timing of a video part, from headers only.

    Args:
        part: {"type": "video", "video": path | encoded bytes | list of images}, and optionally "fps" (the rate at which
            the frames of a list were taken, or the rate to sample from a file), "min_pixels", "max_pixels",
            "resized_width" and "resized_height".
        total_pixels: pixel budget of the whole sample, see `total_pixel_budget`.

    Raises:
        MediaError: "broken_video", "empty_file", "missing_video", "empty_video", or what `image_size` raises.
    """
    source = part["video"]
    asked = float(part["fps"]) if part.get("fps") else config.fps
    if not 0 < asked < float("inf"):
        raise MediaError("bad_fps", f"fps is {part['fps']!r}; expected a positive number")
    if isinstance(source, (list, tuple)):
        total, rate, (width, height) = _measure_list(source, asked, max_source_pixels)
        cap = total_pixels * 2 // max(int(BUDGET_SLACK * config.min_pixels), 1)
        count = min(total, max(min(config.max_frames, cap) // 2 * 2, 2))
    else:
        total, rate, (width, height) = _measure_file(source, max_source_pixels)
        count = frame_count(total, rate, dataclasses.replace(config, fps=asked), total_pixels)
    if count < total:
        indices = tuple(int(i) for i in np.round(np.linspace(0, total - 1, count)))
    else:
        indices = tuple(range(total))
    indices += indices[-1:] * (len(indices) % 2)  # repeat the last frame of an odd number, as transformers does
    size = target_size(
        width,
        height,
        factor=factor,
        min_pixels=part.get("min_pixels") or config.min_pixels,
        max_pixels=part.get("max_pixels") or frame_pixels(len(indices), config, total_pixels),
        explicit=explicit_size(part),
    )
    spacing = Fraction(total, count) if count < total else Fraction(1)  # source frames per sampled frame
    return FrameSelection(indices, total, size, float(2 * spacing / rate))


plan_video = select_frames  # the name for callers outside this repository


def explicit_size(part: dict[str, Any]) -> tuple[int, int] | None:
    """(width, height) that the row asks for, or None; VST writes -1 for "unchanged"."""
    width = part.get("resized_width")
    height = part.get("resized_height")
    if width is None or height is None or width < 1 or height < 1:
        return None
    return int(width), int(height)


def load_frames(
    part: dict[str, Any],
    selection: FrameSelection,
    *,
    time_limit: float,
    max_source_pixels: int,
    resize: str = "pillow",
) -> list[np.ndarray]:
    """Decode the selected frames: one (3, height, width) uint8 array for every entry of `selection.indices`.

    Up to 2 frames that are missing at the end are replaced by the last frame.

    Args:
        time_limit: seconds for the whole video.
        resize: method of `resize_planar`.

    Raises:
        MediaError: "broken_video" (undecodable, or more than 2 frames shorter than its header says), "decode_timeout",
            or what `load_rgb` raises.
    """
    source = part["video"]
    deadline = time.monotonic() + time_limit
    wanted = set(selection.indices)
    decoded = {}
    last = -1
    latest = None
    for index, load in _frames(source, wanted, deadline, max_source_pixels):
        last = index
        latest = load
        if index in wanted:
            decoded[index] = resize_planar(load(), selection.size, resize)
        if time.monotonic() > deadline:
            raise MediaError(
                "decode_timeout", f"decoding took over {time_limit} s, at frame {index} of {selection.total}"
            )
        if index == selection.indices[-1]:
            break
    if latest is None or last < selection.indices[-1] - 2:
        raise MediaError("broken_video", f"it ends after {last + 1} frames; its header promises {selection.total}")
    for index in wanted - set(decoded):
        decoded[index] = resize_planar(latest(), selection.size, resize)
    return [decoded[index] for index in selection.indices]


def _measure_list(frames: Any, rate: float, max_source_pixels: int) -> tuple[int, Fraction, tuple[int, int]]:
    if not frames:
        raise MediaError("empty_video", "the frame list has no frames")
    return (
        len(frames),
        Fraction(rate).limit_denominator(10**6),
        image_size(frames[0], max_source_pixels=max_source_pixels),
    )


def _measure_file(source: Any, max_source_pixels: int) -> tuple[int, Fraction, tuple[int, int]]:
    with _open_video(source) as container:
        stream = container.streams.video[0]
        width = stream.codec_context.width
        height = stream.codec_context.height
        rate = stream.average_rate or stream.guessed_rate
        total = stream.frames
        if not total:  # a container without a frame count: count its packets, without decoding them
            total = sum(1 for packet in container.demux(stream) if packet.size)
    if not total or not rate or not width or not height:
        raise MediaError("broken_video", f"{total} frames of {width} x {height} at {rate} per second")
    if width * height > max_source_pixels:
        raise MediaError("decompression_bomb", f"frames of {width} x {height}; at most {max_source_pixels} pixels")
    return int(total), Fraction(rate), (int(width), int(height))


def _frames(
    source: Any, wanted: set[int], deadline: float, max_source_pixels: int
) -> Iterator[tuple[int, Callable[..., Image.Image]]]:
    """(index, function that returns the RGB image) of every frame in display order."""
    if isinstance(source, (list, tuple)):
        for index in sorted(wanted):
            left = max(deadline - time.monotonic(), 0.0)
            image = load_rgb(source[index], max_source_pixels=max_source_pixels, time_limit=left)
            yield index, lambda image=image: image
        return
    with _open_video(source) as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"  # the loader has many workers already
        for index, frame in enumerate(container.decode(stream)):
            yield index, frame.to_image


@contextlib.contextmanager
def _open_video(source: Any) -> Iterator[Any]:
    """An open PyAV container; PyAV errors inside the block become MediaErrors."""
    try:
        import av
    except ImportError as error:
        raise ImportError('decoding video files needs PyAV: pip install "fastvst[video]"') from error
    handle: Any
    if isinstance(source, (str, Path)):
        path = Path(source)
        if not path.is_file():
            raise MediaError("missing_video", f"no such file: {path}")
        empty = path.stat().st_size == 0
        handle = str(path)
    elif isinstance(source, (bytes, bytearray, memoryview)):
        empty = len(source) == 0
        handle = io.BytesIO(bytes(source))
    else:
        raise MediaError("bad_video_type", f"got {type(source).__name__}; expected a path, bytes or a list of images")
    if empty:
        raise MediaError("empty_file", "the video has 0 bytes")
    try:
        with av.open(handle) as container:
            if not container.streams.video:
                raise MediaError("broken_video", "the file has no video stream")
            yield container
    except (av.FFmpegError, OSError) as error:
        raise MediaError("broken_video", f"{type(error).__name__}: {error}") from error
