"""The frames of a video, their size and spacing, and their patches."""

from __future__ import annotations

import io
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fastvst.data.images import CLIP_MEAN, CLIP_STD, MediaError, PatchGeometry, patchify, resize_planar
from fastvst.data.video import (
    VideoConfig,
    frame_count,
    frame_pixels,
    load_frames,
    select_frames,
    total_pixel_budget,
)

av = pytest.importorskip("av")
SMALL = VideoConfig(min_pixels=784, max_pixels=56 * 84)
LIMITS = {"factor": 28, "max_source_pixels": 10**7}
BUDGET = total_pixel_budget(16384)


def movie(frames: int, rate: int = 30, size: tuple[int, int] = (64, 48), container: str = "mp4") -> bytes:
    """An MPEG-4 file whose frame k is filled with the grey value 4 k + 16 (readable after lossy coding)."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as out:
        stream = out.add_stream("mpeg4", rate=rate)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        stream.bit_rate = 4_000_000
        for k in range(frames):
            image = Image.new("RGB", size, (4 * k + 16,) * 3)
            for packet in stream.encode(av.VideoFrame.from_image(image)):
                out.mux(packet)
        for packet in stream.encode():
            out.mux(packet)
    return buffer.getvalue()


def number_of(frame: np.ndarray) -> int:
    return round((float(frame.mean()) - 16) / 4)


def test_budgets_are_those_of_vst() -> None:
    assert total_pixel_budget(16384) == 10_276_044
    # 195 at most for 16K, and an even number of them
    assert frame_count(10**6, Fraction(30), VideoConfig(), BUDGET) == 194
    assert frame_pixels(194, VideoConfig(), BUDGET) == int(BUDGET / 194 * 2)
    assert frame_pixels(400, VideoConfig(), BUDGET) == int(1.05 * 128 * 784) == 105_369
    assert frame_pixels(4, VideoConfig(), BUDGET) == 768 * 784
    assert frame_pixels(40, VideoConfig(), BUDGET) == int(BUDGET / 40 * 2)


@given(
    total=st.integers(1, 5000),
    rate=st.sampled_from(
        [Fraction(30), Fraction(30000, 1001), Fraction(25), Fraction(1), Fraction(60), Fraction(7, 2)]
    ),
    fps=st.sampled_from([0.5, 1.0, 2.0, 4.0]),
    most=st.sampled_from([8, 64, 768]),
)
@settings(max_examples=200, deadline=None)
def test_number_of_frames_follows_the_formula(total, rate, fps, most) -> None:
    count = frame_count(total, rate, VideoConfig(fps=fps, max_frames=most), 10**12)
    assert count % 2 == 0 and count >= 2
    wanted = total / float(rate) * fps
    upper = min(most, total)
    expected = int(min(max(wanted, 4), upper)) // 2 * 2
    assert count == max(expected, 2)


def test_frames_of_a_file_are_uniform_and_spacing_is_known() -> None:
    data = movie(60, rate=30)  # two seconds at 2 per second: 4 frames
    selection = select_frames({"video": data}, SMALL, total_pixels=BUDGET, **LIMITS)
    assert selection.total == 60 and selection.indices == (0, 20, 39, 59)
    assert selection.seconds_per_grid == 1.0  # exactly: floor(t * seconds * 2) would lose a step at 0.9999
    frames = load_frames({"video": data}, selection, time_limit=30, max_source_pixels=10**7)
    assert [number_of(f) for f in frames] == [0, 20, 39, 59]
    assert all(f.shape == (3, selection.size[1], selection.size[0]) and f.dtype == np.uint8 for f in frames)


def test_the_rate_of_the_row_overrides_the_default_and_changes_the_spacing() -> None:
    selection = select_frames({"video": movie(40, rate=20), "fps": 5}, SMALL, total_pixels=BUDGET, **LIMITS)
    assert len(selection.indices) == 10 and selection.seconds_per_grid == pytest.approx(2 / 5)


def test_short_videos_give_at_least_two_frames() -> None:
    for frames, expected in ((1, (0, 0)), (2, (0, 1)), (3, (0, 2)), (5, (0, 1, 3, 4))):
        data = movie(frames)
        selection = select_frames({"video": data}, SMALL, total_pixels=BUDGET, **LIMITS)
        assert selection.indices == expected
        assert len(load_frames({"video": data}, selection, time_limit=30, max_source_pixels=10**7)) == len(expected)


def test_container_without_a_frame_count() -> None:
    data = movie(24, container="avi")
    raw = movie(24, container="m4v")  # an elementary stream, whose header lacks the number of frames
    for source in (data, raw):
        selection = select_frames({"video": source}, SMALL, total_pixels=BUDGET, **LIMITS)
        assert selection.total == 24


def test_path_and_bytes_are_the_same(tmp_path) -> None:
    data = movie(20)
    (tmp_path / "v.mp4").write_bytes(data)
    assert select_frames({"video": data}, SMALL, total_pixels=BUDGET, **LIMITS) == select_frames(
        {"video": str(tmp_path / "v.mp4")}, SMALL, total_pixels=BUDGET, **LIMITS
    )


def stills(count: int, size: tuple[int, int] = (84, 56)) -> list[Image.Image]:
    rng = np.random.default_rng(1)
    return [Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)) for _ in range(count)]


def test_frame_lists_are_taken_whole_and_an_odd_one_repeats_its_last() -> None:
    images = stills(5)
    selection = select_frames({"video": images, "fps": 4}, SMALL, total_pixels=BUDGET, **LIMITS)
    assert selection.indices == (0, 1, 2, 3, 4, 4) and selection.seconds_per_grid == 0.5 and selection.size == (84, 56)
    frames = load_frames({"video": images}, selection, time_limit=9, max_source_pixels=10**7)
    for index, frame in zip(selection.indices, frames, strict=True):
        np.testing.assert_array_equal(frame, np.asarray(images[index]).transpose(2, 0, 1))


def test_a_long_frame_list_is_thinned_and_the_spacing_follows() -> None:
    selection = select_frames(
        {"video": stills(20)}, VideoConfig(max_frames=8, min_pixels=784), total_pixels=BUDGET, **LIMITS
    )
    assert selection.indices == tuple(np.round(np.linspace(0, 19, 8)).astype(int).tolist())
    assert selection.seconds_per_grid == pytest.approx(2 / (2.0 * 8 / 20))


def test_patches_of_a_video_by_the_index_formula() -> None:
    rng = np.random.default_rng(2)
    video = rng.integers(0, 256, (4, 3, 56, 84), dtype=np.uint8)
    values = patchify(list(video), PatchGeometry())
    assert values.shape == (2 * 4 * 6, 1176)
    mean, std = (np.array(v, np.float64)[:, None, None] for v in (CLIP_MEAN, CLIP_STD))
    exact = (video / 255 - mean) / std
    row = 0
    for t in range(2):
        for block_y in range(2):
            for block_x in range(3):
                for y in range(2):
                    for x in range(2):
                        top = (block_y * 2 + y) * 14
                        left = (block_x * 2 + x) * 14
                        cube = exact[2 * t : 2 * t + 2, :, top : top + 14, left : left + 14]  # (time, channel, y, x)
                        expected = cube.transpose(1, 0, 2, 3).reshape(-1)
                        np.testing.assert_allclose(values[row], expected, rtol=0, atol=1e-6)
                        row += 1


def test_two_equal_frames_give_the_patches_of_an_image() -> None:
    frame = resize_planar(stills(1)[0], (84, 56))
    np.testing.assert_array_equal(patchify([frame, frame], PatchGeometry()), patchify([frame], PatchGeometry()))


def reason(action) -> str:
    with pytest.raises(MediaError) as caught:
        action()
    return caught.value.reason


def test_bad_videos_have_reason_codes(tmp_path) -> None:
    def select(part: dict, **limits: int) -> object:
        return select_frames(part, SMALL, total_pixels=BUDGET, **{**LIMITS, **limits})

    assert reason(lambda: select({"video": b""})) == "empty_file"
    assert reason(lambda: select({"video": b"\0\1nonsense" * 50})) == "broken_video"
    assert reason(lambda: select({"video": tmp_path / "no.mp4"})) == "missing_video"
    assert reason(lambda: select({"video": []})) == "empty_video"
    assert reason(lambda: select({"video": 3})) == "bad_video_type"
    assert reason(lambda: select({"video": stills(2), "fps": -1})) == "bad_fps"
    assert reason(lambda: select({"video": movie(4)}, max_source_pixels=100)) == "decompression_bomb"
    assert reason(lambda: select({"video": [b"xx", b"xx"]})) == "broken_image"


def test_a_cut_file_and_a_slow_file_are_refused() -> None:
    data = movie(60, container="avi")
    selection = select_frames({"video": data}, SMALL, total_pixels=BUDGET, **LIMITS)
    cut = {"video": data[: len(data) // 3]}
    assert reason(lambda: load_frames(cut, selection, time_limit=30, max_source_pixels=10**7)) == "broken_video"
    shorter = {"video": movie(20)}  # as if its header promised 60 frames
    assert reason(lambda: load_frames(shorter, selection, time_limit=30, max_source_pixels=10**7)) == "broken_video"
    nearly = load_frames({"video": movie(58)}, selection, time_limit=30, max_source_pixels=10**7)
    assert [number_of(f) for f in nearly] == [0, 20, 39, 57]  # two frames short: the last one is repeated
    assert (
        reason(lambda: load_frames({"video": data}, selection, time_limit=-1, max_source_pixels=10**7))
        == "decode_timeout"
    )
