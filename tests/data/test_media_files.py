"""Files of strangers: what is not a plain image or video of a known format is refused, and opens nothing else."""

from __future__ import annotations

import ctypes
import io
import os
import socket
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastvst.data import Processor, Sample, SampleError
from fastvst.data.images import image_header, load_rgb
from fastvst.data.media_files import IMAGE_FORMATS, MOST_READS, MediaError, open_file
from fastvst.data.video import VideoConfig, select_frames

PROCESSOR = Processor.preset("tiny")
PIXELS = 10**7
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n%%EndComments\nshowpage\n%%EOF\n"
IN_OPEN = 0x20  # linux/inotify.h


def reason_of_image(source: object) -> str:
    """The same reason from the header and from decoding."""
    found = []
    for read in (
        lambda: image_header(source, max_source_pixels=PIXELS),
        lambda: load_rgb(source, max_source_pixels=PIXELS, time_limit=10),
    ):
        with pytest.raises(MediaError) as caught:
            read()
        found.append(caught.value.reason)
    assert found[0] == found[1]
    return found[0]


def reason_of_video(source: object) -> str:
    part = {"type": "video", "video": source}
    with pytest.raises(MediaError) as caught:
        select_frames(part, VideoConfig(), total_pixels=10**7, factor=28, max_source_pixels=PIXELS)
    return caught.value.reason


def encoded(kind: str, mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    Image.new(mode, (32, 24)).save(file, kind)
    return file.getvalue()


def test_only_formats_of_training_data_are_decoded() -> None:
    Image.init()
    refused = 0
    for kind in sorted(set(Image.ID) & set(Image.SAVE) | {"PDF"}):
        try:
            data = encoded(kind)
        except (OSError, ValueError, KeyError, TypeError):  # Pillow has no encoder for RGB
            continue
        if kind in IMAGE_FORMATS:
            assert load_rgb(data, max_source_pixels=PIXELS, time_limit=10).size == (32, 24)
        elif Image.registered_extensions() and kind not in ("DIB",):
            assert reason_of_image(data) == "broken_image", kind
            refused += 1
    assert refused > 8


def test_postscript_starts_no_program(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "gs").write_text(f"#!/bin/sh\necho $@ >> {tmp_path}/ran\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (tmp_path / "a.png").write_bytes(EPS)
    assert reason_of_image(EPS) == reason_of_image(tmp_path / "a.png") == "broken_image"
    assert reason_of_image(Image.open(io.BytesIO(EPS))) == "bad_image_format"  # an image that a program has opened
    content = [{"type": "image", "image": Image.open(io.BytesIO(EPS))}, {"type": "text", "text": "?"}]
    with pytest.raises(SampleError, match="format EPS"):
        PROCESSOR.encode(Sample.from_messages([{"role": "user", "content": content}]))
    assert not (tmp_path / "ran").exists()


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    (tmp_path / "loop.png").symlink_to("loop.png")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "socket.png"))
    begin = time.monotonic()
    for name in ("fifo.png", "folder.png", "zero.png", "socket.png"):
        assert reason_of_image(tmp_path / name) == reason_of_video(tmp_path / name) == "not_a_file", name
    assert reason_of_image("/dev/stdin") == reason_of_video("/dev/tty") == "not_a_file"
    assert reason_of_image(tmp_path / "loop.png") == reason_of_video(str(tmp_path / "loop.png")) == "unreadable_file"
    assert reason_of_image("x" * 5000) == reason_of_image("a\0b") == "unreadable_file"
    assert reason_of_image(tmp_path / "none.png") == "missing_image" and reason_of_video("none") == "missing_video"
    assert reason_of_image(tmp_path / "socket.png" / "x") == "missing_image"
    assert time.monotonic() - begin < 10
    listener.close()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_without_permission(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded("PNG"))
    (tmp_path / "a.png").chmod(0)
    assert reason_of_image(tmp_path / "a.png") == "unreadable_file"


def test_the_size_of_a_file_is_checked_before_it_is_read(tmp_path: Path) -> None:
    for name, kind in (("a.png", "image"), ("a.mp4", "video")):
        with open(tmp_path / name, "wb") as file:
            file.truncate(1 << 40)  # a sparse file: no byte is on the disk
        begin = time.monotonic()
        reason = reason_of_image if kind == "image" else reason_of_video
        assert reason(tmp_path / name) == "file_too_large" and time.monotonic() - begin < 5
    assert reason_of_image(bytes(9 * PIXELS)) == "file_too_large"
    with open_file(tmp_path / "a.png", "image", 1 << 40) as file:
        assert file.read(3) == bytes(3)


def test_an_image_of_a_million_pieces_is_refused() -> None:
    piece = struct.pack(">I", 0) + b"teSt" + struct.pack(">I", zlib.crc32(b"teSt"))
    data = encoded("PNG")
    flood = data[:33] + piece * (MOST_READS // 2) + data[33:]
    assert load_rgb(data[:33] + piece * 100 + data[33:], max_source_pixels=PIXELS, time_limit=10).size == (32, 24)
    assert reason_of_image(flood) == "decode_timeout"


def watch_opens(path: Path) -> int:
    """A descriptor that can be read if `path` is opened from now on (inotify(7))."""
    libc = ctypes.CDLL(None)
    watcher = libc.inotify_init1(os.O_NONBLOCK)
    assert watcher >= 0 and libc.inotify_add_watch(watcher, str(path).encode(), IN_OPEN) >= 0
    return watcher


def opened(watcher: int) -> bool:
    try:
        return bool(os.read(watcher, 4096))
    except BlockingIOError:
        return False


def movie() -> bytes:
    av = pytest.importorskip("av")
    file = io.BytesIO()
    with av.open(file, "w", format="mpegts") as out:
        stream = out.add_stream("mpeg2video", rate=25)
        stream.width = 64
        stream.height = 48
        stream.pix_fmt = "yuv420p"
        for k in range(8):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((48, 64, 3), 20 * k, np.uint8), format="rgb24")))
        out.mux(stream.encode(None))
    return file.getvalue()


def playlists(target: str) -> dict[str, bytes]:
    """Files that name `target`, a path or an address, as something to open."""
    text = {
        "hls": f"#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{target}\n#EXT-X-ENDLIST\n",
        "hls key": f'#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXT-X-KEY:METHOD=AES-128,URI="{target}"\n'
        f"#EXTINF:1,\n{target}\n",
        "hls map": f'#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXT-X-MAP:URI="{target}"\n#EXTINF:1,\n{target}\n',
        "concat": f"ffconcat version 1.0\nfile '{target}'\n",
        "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5998 RTP/AVP 96\n"
        "a=rtpmap:96 H264/90000\n",
        "dash": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" profiles='
        f'"urn:mpeg:dash:profile:isoff-main:2011"><Period><AdaptationSet mimeType="video/mp4"><Representation id="1" '
        f'bandwidth="1"><BaseURL>{target}</BaseURL></Representation></AdaptationSet></Period></MPD>',
        "imf": f'<CompositionPlaylist xmlns="x"><Asset><Path>{target}</Path></Asset></CompositionPlaylist>',
        "wpl": f"[playlist]\nFile1={target}\nNumberOfEntries=1\n",
        "asx": f'<asx version="3.0"><entry><ref href="{target}"/></entry></asx>',
        "ram": f"{target}\n",
        "smil": f'<smil><body><video src="{target}"/></body></smil>',
    }
    return {name: content.encode() for name, content in text.items()}


@pytest.mark.parametrize("place", ["address", "path"])
def test_a_playlist_opens_no_socket_and_no_file(tmp_path: Path, place: str) -> None:
    target = tmp_path / "target.ts"
    target.write_bytes(movie())
    watcher = watch_opens(target)
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        address = f"http://127.0.0.1:{server.getsockname()[1]}/target.ts"
        for name, data in playlists(address if place == "address" else str(target)).items():
            before = len(list(Path("/proc/self/fd").iterdir())), sockets()
            for suffix in ("mp4", "m3u8", "sdp", "mpd", "ts"):
                path = tmp_path / f"list.{suffix}"
                path.write_bytes(data)
                assert reason_of_video(data) == reason_of_video(path) == "broken_video", name
            assert (len(list(Path("/proc/self/fd").iterdir())), sockets()) == before
        with pytest.raises(BlockingIOError):
            server.accept()
    assert not opened(watcher)
    target.read_bytes()
    assert opened(watcher)  # the watch works
    os.close(watcher)


def sockets() -> int:
    """Number of UDP sockets of the machine's network namespace on the port that the session description names."""
    return sum(f":{5998:04X} " in line for line in Path("/proc/net/udp").read_text().splitlines())


@pytest.mark.parametrize(
    "name", ["concat:a.ts|b.ts", "http:x.ts", "subfile,,start,0,end,9,,:a.ts", "pipe:0", "-", "file:a"]
)
def test_the_name_of_a_file_is_never_an_address(tmp_path: Path, monkeypatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    assert reason_of_video(name) == "missing_video"
    Path(name).write_bytes(movie())
    found = select_frames({"video": name}, VideoConfig(), total_pixels=10**7, factor=28, max_source_pixels=PIXELS)
    assert found.total == 8


def test_a_codec_of_no_training_video_is_refused(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    file = io.BytesIO()
    with av.open(file, "w", format="avi") as out:
        stream = out.add_stream("cinepak", rate=25)
        stream.width = 64
        stream.height = 48
        stream.pix_fmt = "rgb24"
        for k in range(4):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((48, 64, 3), 20 * k, np.uint8), format="rgb24")))
        out.mux(stream.encode(None))
    with pytest.raises(MediaError, match="its codec is cinepak; expected one of h264"):
        select_frames(
            {"video": file.getvalue()}, VideoConfig(), total_pixels=10**7, factor=28, max_source_pixels=PIXELS
        )
