"""One frame of a video file as an image, found by its time: the cameras of LeRobot data sets are such files.

Times are the presentation times of the file, as LeRobot reads them. Decoding starts at the key frame before the wanted
frame. LeRobot writes a key frame every second frame, so that few others are decoded.
"""

from __future__ import annotations

from typing import Any

from PIL import Image

from fastvst.data.file_range import VideoFrame
from fastvst.data.media_files import MediaError
from fastvst.data.video_file import decode_frames, open_video, read_header


def frame_size(frame: VideoFrame, *, max_source_pixels: int, orientation: bool = True) -> tuple[int, int]:
    """(width, height) as displayed. Raises MediaError as `read_header`."""
    return read_header(frame.path, max_source_pixels=max_source_pixels, orientation=orientation).size


def decode_frame(frame: VideoFrame, *, max_source_pixels: int, limit: float, orientation: bool = True) -> Image.Image:
    """The frame nearest to `frame.seconds`, in RGB.

    Args:
        limit: most pixels to decode.
        orientation: apply the display matrix.

    Raises:
        MediaError: as `read_header`; "broken_video" if no undamaged frame is within `frame.tolerance`;
            "decode_timeout" above the limit.
    """
    header = read_header(frame.path, max_source_pixels=max_source_pixels, orientation=orientation)
    found, nearest, limit = _search(frame, limit, seek=True)
    if found is None:  # the index of the file may be wrong
        found, nearest, limit = _search(frame, limit, seek=False)
    if found is None:
        near = "it has no frame that can be decoded" if nearest is None else f"the nearest one is at {nearest:.6g} s"
        raise MediaError(
            "broken_video",
            f"{frame.path} has no frame within {frame.tolerance:.3g} s of {frame.seconds:.6g} s; {near}",
        )
    if found.is_corrupt:
        raise MediaError("broken_video", f"{frame.path}: the frame at {frame.seconds:.6g} s is damaged")
    image: Image.Image = found.to_image()
    return image if header.turn is None else image.transpose(header.turn)


def _search(frame: VideoFrame, limit: float, *, seek: bool) -> tuple[Any, float | None, float]:
    """(the frame within the tolerance or None, time of the nearest one that was decoded, pixels that are left)."""
    best = None
    nearest: float | None = None
    with open_video(frame.path) as (container, stream):
        unit = stream.time_base
        if seek:
            start = max(0.0, frame.seconds - frame.tolerance)
            container.seek(int(start / unit), stream=stream, backward=True)
        for one in decode_frames(container, stream):
            limit -= one.width * one.height
            if limit < 0:
                raise MediaError("decode_timeout", f"{frame.path}: more work than image_time_limit allows")
            if one.pts is None:
                continue
            time = float(one.pts * unit)
            if nearest is None or abs(time - frame.seconds) < abs(nearest - frame.seconds):
                best = one
                nearest = time
            if time >= frame.seconds:
                break
    if nearest is None or abs(nearest - frame.seconds) > frame.tolerance:
        best = None
    return best, nearest, limit
