"""Frames of a long video per second of processor time, next to a plain loop of PyAV over the same file."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from bench.table import Result
from fastvst.data.video import FRAMES, VideoConfig, decode_video, select_frames

pytestmark = pytest.mark.needs("av")
SIZE = (640, 480)
COUNT = 900  # frames in the file: 30 seconds
WANTED = 64  # frames that a sample takes


def write_video(path: Path) -> None:
    """Smooth noise that moves, in groups of 250 frames as x264 makes them."""
    import av

    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (SIZE[1] // 16, SIZE[0] // 16 + COUNT, 3), dtype=np.uint8)
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=30, options={"preset": "veryfast"})
        stream.width, stream.height = SIZE
        stream.pix_fmt = "yuv420p"
        for index in range(COUNT):
            part = small[:, index : index + SIZE[0] // 16]
            frame = av.VideoFrame.from_ndarray(np.repeat(np.repeat(part, 16, 0), 16, 1), format="rgb24")
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))


def test_long_video(tmp_path: Path, record: Callable[..., None]) -> None:
    import av

    path = tmp_path / "long.mp4"
    write_video(path)
    config = VideoConfig(min_frames=WANTED, max_frames=WANTED)
    part = {"type": "video", "video": str(path)}
    selection = select_frames(part, config, total_pixels=10**8, factor=28, max_source_pixels=10**7)
    FRAMES.clear()
    begin = time.process_time()
    frames = decode_video(part, selection, time_limit=600.0, max_source_pixels=10**7).frames
    ours = time.process_time() - begin
    begin = time.process_time()
    again = decode_video(part, selection, time_limit=600.0, max_source_pixels=10**7).frames
    repeated = time.process_time() - begin
    wanted = set(selection.indices)
    begin = time.process_time()
    with av.open(str(path)) as container:
        decoded = container.decode(container.streams.video[0])
        plain = [frame.to_image() for index, frame in enumerate(decoded) if index in wanted]
        plain = [image.resize(selection.size, resample=3) for image in plain]
    theirs = time.process_time() - begin
    assert len(frames) == len(again) == len(plain) == WANTED
    record(
        f"{WANTED} frames of a video of {COUNT}, {SIZE[0]} x {SIZE[1]}, H.264",
        Result("frames per CPU second", COUNT / ours, "a PyAV loop", COUNT / theirs),
        decoded_frames_per_cpu_s=COUNT / ours,
        plain_pyav_frames_per_cpu_s=COUNT / theirs,
        again_ms=repeated * 1000,
    )
