"""Video files as they are in the world, against a plain decoding of the whole file by PyAV."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastvst.data import Processor, Sample
from fastvst.data import video as video_module
from fastvst.data.image_modes import ImageRules
from fastvst.data.images import MediaError
from fastvst.data.ledger import SampleError
from fastvst.data.video import FRAMES, VideoConfig, decode_video, frame_pixels, select_frames
from fastvst.data.video_file import BYTES_OF_A_DECODE, HEADERS, decode_frames, decode_wanted, read_header, work

av = pytest.importorskip("av")
SIZE = (64, 48)
SELECT = {"total_pixels": 10**7, "factor": 28, "max_source_pixels": 10**7}
LOAD = {"time_limit": 60.0, "max_source_pixels": 10**7}
SMALL = VideoConfig(min_pixels=784, max_pixels=56 * 84)
FILES = {  # codec, container, options of the encoder
    "h264 with B-frames, mp4": ("libx264", "mp4", {"bf": "3", "g": "20"}),
    "h264 with B-frames, mkv": ("libx264", "matroska", {"bf": "3", "g": "20"}),
    "h264 with B-frames, ts": ("libx264", "mpegts", {"bf": "2", "g": "20"}),
    "h264 with B-frames, avi": ("libx264", "avi", {"bf": "2", "g": "20"}),
    "h264 with open groups": ("libx264", "mp4", {"bf": "3", "g": "20", "x264-params": "open-gop=1"}),
    "h264 stream": ("libx264", "h264", {"bf": "2"}),
    "mpeg4, avi": ("mpeg4", "avi", {}),
    "fragmented mp4": ("libx264", "mp4", {"g": "20", "movflags": "frag_keyframe+empty_moov"}),
    "vp8": ("libvpx", "webm", {}),
    "vp9 with hidden frames": ("libvpx-vp9", "webm", {"auto-alt-ref": "1", "lag-in-frames": "20"}),
    "gif": ("gif", "gif", {}),
}


def image_of(k: int) -> np.ndarray:
    """A frame with a bar that moves; every frame differs from every other one."""
    frame = np.full((SIZE[1], SIZE[0], 3), (3 * k % 256, 255 - 2 * k % 256, 60), np.uint8)
    frame[:, k % SIZE[0]] = 255
    return frame


def write(
    path: Path | io.BytesIO,
    codec: str = "libx264",
    container: str = "mp4",
    options: dict[str, str] | None = None,
    *,
    count: int = 90,
    times: list[int] | None = None,
    aspect: Fraction | None = None,
) -> None:
    """`count` frames at 30 per second, or at `times` in milliseconds."""
    options = dict(options or {})
    muxer = {name: options.pop(name) for name in ("movflags",) if name in options}
    with av.open(path if isinstance(path, io.BytesIO) else str(path), "w", format=container, options=muxer) as out:
        stream = out.add_stream(codec, rate=30, options=options)
        stream.width, stream.height = SIZE
        stream.pix_fmt = "rgb8" if codec == "gif" else "yuv420p"
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for k in range(count):
            frame = av.VideoFrame.from_ndarray(image_of(k), format="rgb24")
            if times is not None:
                frame.pts = times[k]
                frame.time_base = Fraction(1, 1000)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))


def trim(source: Path, path: Path, seconds: float) -> None:
    """The packets from the key frame before `seconds` on; earlier times are negative, so the muxer hides them."""
    with av.open(str(source)) as inp, av.open(str(path), "w") as out:
        stream = inp.streams.video[0]
        copy = out.add_stream_from_template(stream)
        shift = int(seconds / stream.time_base)
        for packet in inp.demux(stream):
            if packet.dts is not None:
                packet.pts -= shift
                packet.dts -= shift
                packet.stream = copy
                out.mux(packet)


def plain(source: Path | bytes) -> list[np.ndarray]:
    """Every frame that PyAV shows, by decoding the whole file."""
    with av.open(str(source) if isinstance(source, Path) else io.BytesIO(source)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def decoded(source: Path | bytes, wanted: list[int]) -> dict[int, np.ndarray]:
    header = read_header(source, max_source_pixels=10**7)
    frames, distance = decode_wanted(source, header, wanted, np.asarray, limit=1e12)
    assert not any(distance.values())
    return frames


def reason(action) -> str:
    with pytest.raises(MediaError) as caught:
        action()
    return caught.value.reason


def select(source: object, config: VideoConfig = SMALL, **fields: object):
    return select_frames({"type": "video", "video": source, **fields}, config, **SELECT)


@pytest.mark.parametrize("name", list(FILES))
def test_wanted_frames_are_those_of_a_plain_decoding(name: str, tmp_path: Path) -> None:
    path = tmp_path / "video"
    write(path, *FILES[name])
    expected = plain(path)
    header = read_header(path, max_source_pixels=10**7)
    assert header.total == len(expected) and header.seconds is None
    for wanted in ([0, 30, 60, 89], [85], [41, 42], list(range(90))):
        found = decoded(path, wanted)
        assert set(found) >= set(wanted)
        for index in wanted:
            np.testing.assert_array_equal(found[index], expected[index], err_msg=f"{name}, frame {index}")


def test_decoding_starts_at_a_key_frame(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "long.mp4"
    write(path, options={"g": "30", "bf": "0", "x264-params": "scenecut=0"}, count=600)
    header = read_header(path, max_source_pixels=10**7)
    count = []
    monkeypatch.setattr(
        "fastvst.data.video_file.decode_frames",
        lambda *a: (count.append(1) or frame for frame in decode_frames(*a)),
    )
    found, _ = decode_wanted(path, header, [0, 300, 599], np.asarray, limit=1e12)
    assert len(count) <= 1 + 2 * 60 < 600 and work(header, [0, 300, 599]) >= len(count) * SIZE[0] * SIZE[1]
    expected = plain(path)
    assert all(np.array_equal(found[k], expected[k]) for k in (0, 300, 599))


def test_a_trimmed_clip_shows_what_players_show(tmp_path: Path) -> None:
    write(tmp_path / "in.mp4", options={"g": "90", "bf": "2", "x264-params": "scenecut=0"})
    trim(tmp_path / "in.mp4", tmp_path / "cut.mp4", 2.0)
    expected = plain(tmp_path / "cut.mp4")
    with av.open(str(tmp_path / "cut.mp4")) as container:
        assert container.streams.video[0].frames > len(expected)
    selection = select(tmp_path / "cut.mp4")
    assert selection.total == len(expected)
    found = decoded(tmp_path / "cut.mp4", list(range(len(expected))))
    assert all(np.array_equal(found[k], frame) for k, frame in enumerate(expected))


def test_hidden_frames_of_vp8_are_not_counted(tmp_path: Path) -> None:
    write(tmp_path / "v.webm", "libvpx", "webm", count=30)
    data = (tmp_path / "v.webm").read_bytes()
    with av.open(io.BytesIO(data)) as container:
        packet = bytes([p for p in container.demux(video=0) if p.size][7])
    hidden = data.replace(packet, bytes([packet[0] & ~0x10]) + packet[1:])  # show_frame of RFC 6386
    expected = plain(hidden)
    assert read_header(hidden, max_source_pixels=10**7).total == len(expected) == 29
    found = decoded(hidden, list(range(29)))
    assert all(np.array_equal(found[k], frame) for k, frame in enumerate(expected))


def test_uneven_frame_rate_is_sampled_in_time(tmp_path: Path) -> None:
    times = [0, 100, 200, 300, 400, 500, 600, 700, 800, 4000, 8000]  # nine frames in a second, then slides
    write(tmp_path / "v.mkv", container="matroska", options={"bf": "0"}, count=len(times), times=times)
    selection = select(tmp_path / "v.mkv", VideoConfig(fps=1.0, min_pixels=784, max_pixels=56 * 84))
    shown = [max(k for k, t in enumerate(times) if t <= at) for at in np.linspace(0, 8000, len(selection.indices))]
    assert list(selection.indices) == shown and shown[-3:] != [8, 9, 10]
    assert selection.notes == ("uneven_frame_rate",)
    with av.open(str(tmp_path / "v.mkv")) as container:
        length = float(container.duration / av.time_base)
    assert selection.seconds_per_grid == pytest.approx(2 * length / len(selection.indices), rel=0.1)


def with_matrix(path: Path, matrix: tuple[int, int, int, int]) -> bytes:
    """The file with another display matrix in the header of its track (ISO 14496-12 §8.3.2)."""
    data = bytearray(path.read_bytes())
    at = data.find(b"tkhd") + 4 + 4 + 4 * 5 + 8 + 8
    one = 1 << 16
    a, b, c, d = (one * v for v in matrix)
    data[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    return bytes(data)


@pytest.mark.parametrize(
    ("matrix", "turned"),
    [
        ((1, 0, 0, 1), lambda f: f),
        ((0, 1, -1, 0), lambda f: np.rot90(f, -1)),
        ((-1, 0, 0, -1), lambda f: np.rot90(f, 2)),
        ((0, -1, 1, 0), lambda f: np.rot90(f, 1)),
        ((-1, 0, 0, 1), np.fliplr),
        ((1, 0, 0, -1), np.flipud),
    ],
)
def test_display_matrix(matrix: tuple[int, int, int, int], turned, tmp_path: Path) -> None:
    write(tmp_path / "v.mp4", count=4)
    data = with_matrix(tmp_path / "v.mp4", matrix)
    with av.open(io.BytesIO(data)) as container:
        frame = next(container.decode(video=0))
        stored = frame.to_ndarray(format="rgb24")
        if matrix[0] * matrix[3] - matrix[1] * matrix[2] > 0:  # PyAV names turns, not flips
            np.testing.assert_array_equal(turned(stored), np.rot90(stored, frame.rotation // 90))
    header = read_header(data, max_source_pixels=10**7)
    np.testing.assert_array_equal(decoded(data, [0])[0], turned(stored))
    assert header.size == turned(stored).shape[1::-1]
    assert header.notes == (("display_matrix_applied",) if matrix != (1, 0, 0, 1) else ())
    off = read_header(data, max_source_pixels=10**7, orientation=False)
    assert off.size == SIZE and off.turn is None


def test_pixels_that_are_not_square_are_shown_square(tmp_path: Path) -> None:
    write(tmp_path / "v.mp4", count=4, aspect=Fraction(2, 1))
    header = read_header(tmp_path / "v.mp4", max_source_pixels=10**7)
    assert header.size == (2 * SIZE[0], SIZE[1]) and header.notes == ("pixel_aspect_applied",)
    rules = ImageRules(orientation=False)
    assert select_frames({"video": tmp_path / "v.mp4"}, SMALL, **SELECT, rules=rules).source_size == SIZE


def test_a_damaged_tail_is_shown_as_players_show_it(tmp_path: Path) -> None:
    write(tmp_path / "v.mkv", container="matroska", options={"g": "15", "bf": "0"})
    data = (tmp_path / "v.mkv").read_bytes()
    cut = data[: len(data) * 9 // 10]
    selection = select(cut)
    assert selection.total == len(plain(cut)) < 90
    assert len(decode_video({"video": cut}, selection, **LOAD).frames) == len(selection.indices)

    write(tmp_path / "v.mp4", options={"g": "15", "bf": "0"}, count=90)
    with av.open(str(tmp_path / "v.mp4")) as container:
        entries = container.streams.video[0].index_entries
        begin = entries[84].pos
        end = entries[89].pos + entries[89].size
    whole = (tmp_path / "v.mp4").read_bytes()
    damaged = whole[:begin] + b"\xff" * (end - begin) + whole[end:]
    selection = select(damaged, VideoConfig(fps=30.0, min_pixels=784, max_pixels=56 * 84))
    assert len(selection.indices) == 90
    video = decode_video({"video": damaged}, selection, **LOAD)
    assert video.notes == ("frames_repeated",) and np.array_equal(video.frames[89], video.frames[83])
    ruined = whole[: whole.find(b"mdat") + 600] + b"\xff" * (end - whole.find(b"mdat") - 600) + whole[end:]
    assert reason(lambda: decode_video({"video": ruined}, select(ruined), **LOAD)) == "broken_video"


def test_one_frame_audio_and_covers(tmp_path: Path) -> None:
    write(tmp_path / "one.mp4", count=1)
    selection = select(tmp_path / "one.mp4")
    assert selection.indices == (0, 0) and selection.total == 1
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="wav") as out:
        stream = out.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        out.mux(stream.encode(frame))
    with pytest.raises(MediaError, match="no video stream"):
        select(buffer.getvalue())


def test_lists_of_other_files_are_not_opened() -> None:
    playlist = b"#EXTM3U\n#EXTINF:1,\nfile:///etc/hostname\n#EXT-X-ENDLIST\n"
    session = b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5998 RTP/AVP 96\n"
    for data in (playlist, session):
        assert reason(lambda data=data: select(data)) == "broken_video"


def test_limits_reduce_and_never_enlarge() -> None:
    config = VideoConfig(min_pixels=100_000, max_pixels=100_000)
    assert frame_pixels(4, config, 10**7) == 100_000, "5 % of slack must not pass the limit of a frame"
    stills = [Image.new("RGB", (560, 560), (k, k, k)) for k in range(8)]

    def area(**fields: object) -> int:
        width, height = select(stills, VideoConfig(), **fields).size
        return width * height

    assert area(max_pixels=50_000) <= 50_000 < area(), "also below the least pixels of a frame"
    assert area(max_pixels=10**9) == area(), "a row cannot pass the limit of the configuration"
    assert area(total_pixels=8 * 120_000 // 2) <= 120_000
    assert len(select(stills, max_frames=100).indices) == 8 and len(select(stills, max_frames=4).indices) == 4
    assert len(select(stills, nframes=100).indices) == 8 and len(select(stills, nframes="6").indices) == 6
    assert reason(lambda: select(stills, max_frames="many")) == "bad_field"


def test_a_row_may_name_a_clip(tmp_path: Path) -> None:
    write(tmp_path / "v.mp4")  # three seconds
    selection = select(tmp_path / "v.mp4", video_start=1.0, video_end=2.0)
    assert selection.indices[0] == 30 and selection.indices[-1] == 60
    assert reason(lambda: select(tmp_path / "v.mp4", video_start=5.0)) == "empty_video"


def test_work_is_limited_not_time(tmp_path: Path) -> None:
    write(tmp_path / "v.avi", "mpeg4", "avi")
    pixels = 90 * SIZE[0] * SIZE[1]
    enough = VideoConfig(time_limit=2 * pixels / video_module.WORK_PER_SECOND)
    little = VideoConfig(time_limit=pixels / 2 / video_module.WORK_PER_SECOND)
    assert select(tmp_path / "v.avi", enough).total == 90
    with pytest.raises(MediaError, match=r"decode_timeout.*raise video_time_limit from"):
        select(tmp_path / "v.avi", little)


def test_a_video_asked_about_ten_times_is_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "v.mp4")
    FRAMES.clear()
    HEADERS.clear()
    opened = []
    real = av.open
    monkeypatch.setattr(av, "open", lambda *a, **k: opened.append(1) or real(*a, **k))
    processor = Processor.preset("tiny", video_min_pixels=784)

    def ask(k: int):
        part = {"type": "video", "video": str(tmp_path / "v.mp4")}
        content = [part, {"type": "text", "text": f"Question {k}?"}]
        return processor.encode(Sample.from_messages([{"role": "user", "content": content}]))

    first = ask(0)
    count = len(opened)
    assert all(np.array_equal(ask(k).patches, first.patches) for k in range(1, 10)) and len(opened) == count
    write(tmp_path / "v.mp4", count=60)  # another content of the same file
    assert len(ask(0).tokens) > 0 and len(opened) > count
    assert FRAMES.size <= FRAMES.limit == 128 << 20


def test_a_long_row_names_the_options_that_admit_it() -> None:
    video = [Image.new("RGB", (280, 280), (k, k, k)) for k in range(16)]
    content = [{"type": "video", "video": video}, {"type": "text", "text": "word " * 200}]
    row = Sample.from_messages([{"role": "user", "content": content}])
    options = {"max_seq_len": 600, "video_min_pixels": 784}
    with pytest.raises(SampleError, match="too_long") as caught:
        Processor.preset("tiny", **options).encode(row)
    advice = caught.value.detail.split("To admit it, ")[1]
    assert "max_seq_len" in advice and "video_max_pixels" in advice
    for option in advice.split(", or "):
        _, name, _, value = option.split()
        assert len(Processor.preset("tiny", **options | {name: int(value)}).encode(row)) > 0


MEMORY = """
import sys
from pathlib import Path
from fastvst.data.video import VideoConfig, load_frames, select_frames
limits = {"max_source_pixels": 10**8}
for name in sys.argv[1:]:
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    status = lambda key: int(Path("/proc/self/status").read_text().split(key + ":")[1].split()[0]) << 10
    before = status("VmRSS")
    part = {"type": "video", "video": name}
    plan = select_frames(part, VideoConfig(max_frames=8), total_pixels=10**7, factor=28, **limits)
    kept = sum(frame.nbytes for frame in load_frames(part, plan, time_limit=60, **limits))
    print(status("VmHWM") - before - kept)
"""


def test_the_memory_of_a_decode_is_bounded(tmp_path: Path) -> None:
    """Many reference frames, reordered far, in one group from begin to end; and a long video of small frames."""
    side = (960, 720)
    noise = np.random.default_rng(0).integers(0, 256, (side[1] + 40, side[0], 3), dtype=np.uint8)
    options = {"preset": "ultrafast", "x264-params": "ref=16:bframes=16:keyint=1000:b-adapt=0"}
    for name, kind in (("a.mkv", "yuv444p10le"), ("b.mp4", "yuv420p")):
        with av.open(str(tmp_path / name), "w") as container:
            stream = container.add_stream("libx264", rate=10, options=options)
            stream.width, stream.height = side
            stream.pix_fmt = kind
            for k in range(36):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(noise[k : k + side[1]], format="rgb24")))
            container.mux(stream.encode())
    write(tmp_path / "c.mp4", "mpeg4", options={"g": "600"}, count=3000)
    pixels = {"a.mkv": side[0] * side[1], "b.mp4": side[0] * side[1], "c.mp4": SIZE[0] * SIZE[1]}
    run = subprocess.run(
        [sys.executable, "-c", MEMORY, *(str(tmp_path / name) for name in pixels)],
        capture_output=True,
        text=True,
        check=True,
    )
    for (name, count), line in zip(pixels.items(), run.stdout.split(), strict=True):
        most = BYTES_OF_A_DECODE * count
        assert int(line) < most + (24 << 20), name  # 13 MB are libraries, which the first video loads
    assert int(run.stdout.split()[0]) > 0.4 * BYTES_OF_A_DECODE * pixels["a.mkv"]  # the measurement sees the frames
