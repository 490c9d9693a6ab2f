"""Video files as they are in the world: their visible frames, and the decoding of some of them, by PyAV.

A frame is visible if a player shows it. Frames before the start of an edit list are not (clips that were cut without
re-encoding), and neither are the alternate reference frames of VP8. The table of samples of an MP4 or MOV file lists
its frames; of any other container every packet is read, but not decoded.
"""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from fastvst.data.file_range import FileRange
from fastvst.data.media_cache import Cache, media_key
from fastvst.data.media_files import VIDEO_BYTES, MediaError, open_file

# Containers of training videos, and songs, which are refused by name. No playlist (HLS, DASH, concat), no session
# description (SDP) and no list of images is among them: these would open other files and sockets.
CONTAINERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,h264,hevc,m4v,av1,obu,ivf,flv,asf,ogg,gif,wav,mp3"
)
CODECS = (  # of FFmpeg's 500
    *("h264", "hevc", "vvc", "av1", "libdav1d", "libaom-av1", "vp8", "vp9", "libvpx", "libvpx-vp9", "theora", "gif"),
    *("mpeg1video", "mpeg2video", "mpeg4", "h261", "h263", "msmpeg4", "msmpeg4v1", "msmpeg4v2", "msmpeg4v3", "flv"),
    *("wmv1", "wmv2", "wmv3", "vc1", "vp6", "vp6f", "mjpeg", "png", "prores", "dnxhd", "ffv1", "huffyuv", "rawvideo"),
)
# What is opened to find the streams of a file. Sound is never decoded, but its headers are.
PROBED = ",".join((*CODECS, "aac", "mp3", "mp3float", "ac3", "eac3", "opus", "vorbis", "flac", "pcm_s16le", "wmav2"))
FRAME_PIXELS = 8192 * 4320  # largest frame, whatever max_source_pixels allows: a decoder holds up to 17 of them
BYTES_OF_A_DECODE = 128  # most memory for each pixel of a frame, without the kept ones: H.264 4:4:4 with 10 bits has 93
MOST_FRAMES = 1 << 22  # of a file: 38 hours at 30 frames a second; their times take 200 MB while they are read
REORDERED = 16  # frames: no codec shows a frame more than 16 frames later than it decodes it
BUFFER = 1 << 16  # bytes that FFmpeg reads at a time
WORTH_A_SEEK = 2 * REORDERED  # frames that a seek must skip
HEADERS: Cache[VideoHeader] = Cache(512)  # videos


@dataclass(frozen=True)
class VideoHeader:
    """What is known of a video file before its frames are decoded.

    Attributes:
        size: (width, height) as displayed.
        pixels: pixels of one stored frame.
        total: visible frames of the file.
        rate: frames per second; None if the file does not say and has only one frame.
        seconds: (total,) start of every frame if they are not evenly spaced, else None.
        stamps: (total,) presentation times in the file's unit; None if frames can only be counted.
        keys: (frame, time) pairs: decoding from `time` yields every frame from `frame` on.
        turn: how a stored frame is turned for display, None for not at all.
        notes: codes of what was changed.
    """

    size: tuple[int, int]
    pixels: int
    total: int
    rate: Fraction | None
    seconds: np.ndarray | None
    stamps: np.ndarray | None
    keys: tuple[tuple[int, int], ...]
    turn: Image.Transpose | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Frames:
    """The visible frames of a stream, as its table of samples or its packets tell them."""

    stamps: np.ndarray | None
    total: int
    keys: tuple[tuple[int, int], ...] = ()
    last: int = 0  # duration of the last frame
    cut: bool = False  # the file ends before the last frame that its header promises


@contextlib.contextmanager
def open_video(source: Any) -> Iterator[tuple[Any, Any]]:
    """An open PyAV container and its video stream; errors inside the block become MediaErrors."""
    try:
        import av
    except ImportError as error:
        raise ImportError('decoding video files needs PyAV: pip install "fastvst[video]"') from error
    limits = {"protocol_whitelist": "none", "format_whitelist": CONTAINERS, "codec_whitelist": PROBED}
    try:
        with (
            _handle(source) as handle,
            av.open(handle, options=limits, metadata_errors="ignore", buffer_size=BUFFER) as container,
        ):
            cover = av.stream.Disposition.attached_pic  # the cover image of a song
            streams = [s for s in container.streams.video if not s.disposition & cover]
            if not streams:
                raise MediaError("broken_video", "the file has no video stream")
            stream = streams[0]
            if stream.codec_context is None:
                raise MediaError("broken_video", "FFmpeg does not know the video's codec")
            if stream.codec_context.name not in CODECS:
                raise MediaError(
                    "broken_video", f"its codec is {stream.codec_context.name}; expected one of {', '.join(CODECS)}"
                )
            stream.codec_context.options = {"max_pixels": str(FRAME_PIXELS)}
            stream.thread_type = "NONE"  # the loader has many workers already
            yield container, stream
    except MediaError:
        raise
    except Exception as error:  # av.FFmpegError, OSError, and what PyAV raises on damaged headers
        raise MediaError("broken_video", f"{type(error).__name__}: {error}") from error


def _handle(source: Any) -> BinaryIO:
    """An open file: FFmpeg gets no name that it could take for an address, and may open nothing itself."""
    if isinstance(source, (str, Path)):
        return open_file(source, "video", VIDEO_BYTES)
    if isinstance(source, FileRange):
        return source.open()
    if not isinstance(source, (bytes, bytearray, memoryview)):
        raise MediaError("bad_video_type", f"got {type(source).__name__}; expected a path, bytes or a list of images")
    if len(source) == 0:
        raise MediaError("empty_file", "the video has 0 bytes")
    return io.BytesIO(bytes(source))


def read_header(source: Any, *, max_source_pixels: int, orientation: bool = True) -> VideoHeader:
    """The header of a video file, and its first frame, which alone tells how it is displayed.

    The headers of the last 512 videos are kept.

    Args:
        source: path or encoded bytes.
        orientation: apply the display matrix and the pixel aspect ratio.

    Raises:
        MediaError: "broken_video", "empty_file", "missing_video", "not_a_file", "unreadable_file", "bad_video_type",
            "decompression_bomb", "too_many_frames".
    """
    content = media_key(source)
    key = None if content is None else (content, orientation)
    header = HEADERS.get(key)
    if header is None:
        header = _read_header(source, max_source_pixels, orientation)
        HEADERS.put(key, header)
    most = min(max_source_pixels, FRAME_PIXELS)
    if header.pixels > most:
        raise MediaError("decompression_bomb", f"frames of {header.pixels} pixels; at most {most}")
    return header


def _read_header(source: Any, max_source_pixels: int, orientation: bool) -> VideoHeader:
    with open_video(source) as (container, stream):
        width = stream.codec_context.width
        height = stream.codec_context.height
        most = min(max_source_pixels, FRAME_PIXELS)
        if width * height > most:
            raise MediaError("decompression_bomb", f"frames of {width} x {height}; at most {most} pixels")
        first = next(decode_frames(container, stream), None)
        if first is None:
            raise MediaError("broken_video", "none of its frames can be decoded")
        turn, size, notes = _display(first, stream.sample_aspect_ratio, orientation)
    with open_video(source) as (container, stream):  # a second time: decoding has moved the first
        unit = stream.time_base
        rate = stream.average_rate or stream.guessed_rate
        frames = _table(stream, container.size, first.pts) if "mov" in container.format.name else None
        frames = frames or _read_packets(container, stream, first.pts)
        if frames.stamps is None and stream.guessed_rate:  # an elementary stream: the rate is in its bits
            rate = stream.guessed_rate
    seconds = None
    if frames.stamps is not None and frames.total > 1:
        rate, seconds = _timing(frames, unit, rate)
    return VideoHeader(
        size=size,
        pixels=first.width * first.height,
        total=frames.total,
        rate=Fraction(rate) if rate else None,
        seconds=seconds,
        stamps=frames.stamps,
        keys=frames.keys,
        turn=turn,
        notes=notes + ("video_cut",) * frames.cut + ("uneven_frame_rate",) * (seconds is not None),
    )


def _table(stream: Any, size: int, first: int | None) -> _Frames | None:
    """The frames of an MP4 or MOV file from its table of samples; None if the table is incomplete or unevenly spaced.

    Args:
        size: bytes of the file.
        first: time of the first frame that the decoder yields.
    """
    count = len(stream.index_entries)
    _check_frames(max(count, stream.frames))
    if count == 0 or count != stream.frames:
        return None
    times: list[int] = []
    keys = []
    for k in range(count):
        entry = stream.index_entries[k]
        if entry.pos + entry.size > size:  # the file was cut
            break
        if entry.is_keyframe:
            keys.append((len(times), entry.timestamp))
        if not entry.is_discard:
            times.append(entry.timestamp)
    steps = np.diff(times)
    if not times or first is None or (len(steps) and (steps != steps[0]).any()):
        return None
    step = int(steps[0]) if len(steps) else 1
    stamps = first + step * np.arange(len(times), dtype=np.int64)
    # Decoding order differs from the order of display by the frames that are reordered.
    later = tuple((k + REORDERED, time) for k, time in keys if k)
    return _Frames(stamps, len(times), later, step, cut=k + 1 < count or entry.pos + entry.size > size)


def _read_packets(container: Any, stream: Any, first: int | None) -> _Frames:
    """The frames of any container from its packets. Frames are counted where their times cannot be trusted."""
    stamps = []
    keys = []
    last = 0
    total = 0
    seen = 0
    promised = stream.frames
    counted = container.format.name == "avi"  # wrong times for videos with B-frames
    vp8 = stream.codec_context.name in ("vp8", "libvpx")
    for packet in _packets(container, stream):
        seen += packet.size > 0 or packet.dts is not None
        if not packet.size or packet.is_discard:
            continue
        if vp8 and not memoryview(packet)[0] & 0x10:  # show_frame of RFC 6386 §9.1
            continue
        total += 1
        _check_frames(total)
        last = int(packet.duration or 0)
        if packet.pts is None:
            counted = True
            continue
        stamps.append(packet.pts)
        if packet.is_keyframe:
            keys.append(packet.pts)
    cut = 0 < seen < promised
    if counted or first not in stamps or len(set(stamps)) != total:
        return _Frames(None, total, cut=cut)
    ordered = np.sort(np.asarray(stamps, dtype=np.int64))
    return _Frames(ordered, total, tuple((int(np.searchsorted(ordered, k)), k) for k in sorted(keys)), last, cut)


def _check_frames(count: int) -> None:
    if count > MOST_FRAMES:
        raise MediaError(
            "too_many_frames", f"the video has at least {count:,} frames; at most {MOST_FRAMES:,} are read"
        )


def _timing(frames: _Frames, unit: Fraction, rate: Fraction | None) -> tuple[Fraction, np.ndarray | None]:
    """(frames per second, start of every frame in seconds if they are not evenly spaced)."""
    stamps = frames.stamps
    assert stamps is not None
    count = len(stamps) - 1
    step = Fraction(int(stamps[-1] - stamps[0]), count)
    even = np.abs(stamps - stamps[0] - np.arange(count + 1) * float(step)).max() <= 0.5 * float(step)
    if even:
        measured = 1 / (step * unit)
        near = rate is not None and abs(measured / rate - 1) < 0.02
        return (Fraction(rate) if near and rate is not None else measured), None
    last = frames.last or int(np.median(np.diff(stamps)))
    length = (int(stamps[-1] - stamps[0]) + last) * unit
    return Fraction(count + 1) / length, (stamps - stamps[0]) * float(unit)


def _display(
    frame: Any, aspect: Fraction | None, orientation: bool
) -> tuple[Image.Transpose | None, tuple[int, int], tuple[str, ...]]:
    """(turn, displayed (width, height), notes) of a video whose first frame is `frame`."""
    width = frame.width
    height = frame.height
    if not orientation:
        return None, (width, height), ()
    notes: tuple[str, ...] = ()
    if aspect and aspect != 1 and Fraction(1, 10) < aspect < 10:
        width = max(round(width * aspect), 1)
        notes += ("pixel_aspect_applied",)
    turn = _turn(frame)
    if turn is not None:
        notes += ("display_matrix_applied",)
    sideways = (Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_270, Image.Transpose.TRANSPOSE)
    if turn in sideways or turn == Image.Transpose.TRANSVERSE:
        width, height = height, width
    return turn, (width, height), notes


def _turn(frame: Any) -> Image.Transpose | None:
    """The display matrix as one of the seven turns and flips by whole quarters; other angles go to the nearest one."""
    found = frame.side_data.get("DISPLAYMATRIX")
    data = bytes(found) if found is not None else b""
    if len(data) < 36:
        return None
    a, b, _, c, d = np.frombuffer(data, dtype=np.int32)[:5].astype(np.float64)
    upright = abs(a) + abs(d) >= abs(b) + abs(c)
    # x' = a x + c y, y' = b x + d y (ISO 14496-12, §6.2.2); y points down.
    x_kept = a >= 0
    y_kept = d >= 0
    if upright:
        turns: dict[tuple[bool, bool], Image.Transpose | None] = {
            (True, True): None,
            (False, True): Image.Transpose.FLIP_LEFT_RIGHT,
            (True, False): Image.Transpose.FLIP_TOP_BOTTOM,
            (False, False): Image.Transpose.ROTATE_180,
        }
        return turns[x_kept, y_kept]
    return {
        (True, True): Image.Transpose.TRANSPOSE,
        (True, False): Image.Transpose.ROTATE_270,  # x points down, y points left: a quarter clockwise
        (False, True): Image.Transpose.ROTATE_90,
        (False, False): Image.Transpose.TRANSVERSE,
    }[b >= 0, c >= 0]


def _packets(container: Any, stream: Any) -> Iterator[Any]:
    """Packets up to the end or to where the container is damaged."""
    import av

    with contextlib.suppress(av.FFmpegError):
        yield from container.demux(stream)


def decode_frames(container: Any, stream: Any) -> Iterator[Any]:
    """Frames in the order of display; packets that cannot be decoded are left out."""
    import av

    ended = False
    for packet in _packets(container, stream):
        ended = packet.size == 0
        with contextlib.suppress(av.FFmpegError):
            yield from packet.decode()
    if not ended:  # the container ends in damage: what the decoder still holds
        with contextlib.suppress(av.FFmpegError):
            yield from stream.decode(None)


@dataclass(frozen=True)
class _Run:
    """Consecutive decoding: from `time` (None: the beginning), which yields frame `start`, to the last of `wanted`."""

    start: int
    time: int | None
    wanted: list[int] = dataclasses.field(default_factory=list)


def _runs(header: VideoHeader, wanted: Sequence[int]) -> list[_Run]:
    runs = [_Run(0, None)]
    reached = 0  # the next frame that the decoder yields
    for index in wanted:
        place = bisect.bisect_right(header.keys, index, key=lambda k: k[0]) - 1
        key = header.keys[place] if place >= 0 else (0, 0)
        if key[0] - reached > WORTH_A_SEEK:
            runs.append(_Run(key[0], key[1]))
        runs[-1].wanted.append(index)
        reached = index + 1
    return [run for run in runs if run.wanted]


def work(header: VideoHeader, wanted: Sequence[int]) -> int:
    """Pixels that are decoded, at most, to get the frames `wanted` (ascending)."""
    return header.pixels * sum(run.wanted[-1] + 1 - max(run.start - REORDERED, 0) for run in _runs(header, wanted))


@dataclass
class _Decoded:
    """Frames that were kept, how many frames each is away from the wanted one, and the pixels that may be decoded."""

    keep: Callable[[Image.Image], np.ndarray]
    limit: float
    frames: dict[int, np.ndarray] = dataclasses.field(default_factory=dict)
    distance: dict[int, int] = dataclasses.field(default_factory=dict)


def decode_wanted(
    source: Any, header: VideoHeader, wanted: Sequence[int], keep: Callable[[Image.Image], np.ndarray], limit: float
) -> tuple[dict[int, np.ndarray], dict[int, int]]:
    """`keep(image)` of the frames that a player shows at the frames `wanted` (ascending).

    Decoding starts at the key frame before a wanted frame. Where that does not give the frame, the file is decoded from
    its beginning.

    Args:
        limit: most pixels to decode.

    Returns:
        The kept frames, and how many frames before the wanted one each was shown (0 except in damaged files). Frames
        before the first decodable one are missing in both.

    Raises:
        MediaError: "decode_timeout" above the limit, "broken_video".
    """
    out = _Decoded(keep, limit)
    runs = _runs(header, wanted)
    with open_video(source) as (container, stream):
        for run in runs:
            if run.time is not None:
                container.seek(run.time, stream=stream, backward=True)
            _decode_run(decode_frames(container, stream), header, run, out)
    missing = [index for index in wanted if out.distance.get(index, 1) > 0]
    if missing and any(run.time is not None for run in runs):
        again = _Decoded(keep, limit)
        with open_video(source) as (container, stream):
            _decode_run(decode_frames(container, stream), header, _Run(0, None, missing), again)
        out.frames |= again.frames
        out.distance |= again.distance
    return out.frames, out.distance


def _decode_run(frames: Iterator[Any], header: VideoHeader, run: _Run, out: _Decoded) -> None:
    """Keep the wanted frames of one run. A frame that cannot be decoded is replaced by the one shown before it."""
    waiting = list(reversed(run.wanted))
    shown: tuple[int, Any] | None = None
    for number, frame in enumerate(frames):
        out.limit -= frame.width * frame.height
        if out.limit < 0:
            raise MediaError("decode_timeout", "decoding took more work than video_time_limit allows")
        index = number
        if header.stamps is not None:
            if frame.pts is None or frame.pts < header.stamps[0]:
                continue
            index = int(np.searchsorted(header.stamps, frame.pts, side="right")) - 1
        while waiting and waiting[-1] < index:
            _keep(waiting.pop(), shown, header, out)
        shown = (index, frame)
        if waiting and waiting[-1] == index:
            _keep(waiting.pop(), shown, header, out)
        if not waiting:
            return
    for index in waiting:
        _keep(index, shown, header, out)


def _keep(index: int, shown: tuple[int, Any] | None, header: VideoHeader, out: _Decoded) -> None:
    if shown is None:
        return
    if shown[0] not in out.frames:
        image = shown[1].to_image()
        out.frames[shown[0]] = out.keep(image if header.turn is None else image.transpose(header.turn))
    out.frames[index] = out.frames[shown[0]]
    out.distance[index] = index - shown[0]
