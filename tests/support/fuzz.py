"""Damaged files of every format that training reads: no crash, no hang, bounded memory, every row accounted for.

    python tests/support/fuzz.py                       # without end; inputs that fail are kept in tests/data/corpus
    python tests/support/fuzz.py --count 3000 --seed 7

Input number n of a seed is the same on every machine with the same encoders: a file of the format n % formats, with
bytes changed, cut, repeated or inserted, or with a length field set to an extreme value. A child process reads the
inputs in order and writes the number of each before it. The parent finds crashes, and inputs that take longer than
HANG_SECONDS.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import os
import random
import resource
import select
import struct
import subprocess
import sys
import tarfile
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

CORPUS = Path(__file__).parent.parent / "data" / "corpus"
HANG_SECONDS = 300.0  # a busy machine takes a minute for the imports alone
MEMORY = 1 << 30  # bytes of resident memory of the child; the libraries alone take 0.4 GiB
ADDRESS_SPACE = 8 << 30
PIXELS = 1 << 22
EXTREMES = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
ROWS = [{"id": f"r{i}", "question": f"What {i}?", "answer": "é" * (i % 5 + 1), "type": "qa"} for i in range(20)]


def image(kind: str, mode: str = "RGB", **options: object) -> bytes:
    """A small encoded image."""
    pixels = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, kind, **options)
    return file.getvalue()


def video(container: str, codec: str) -> bytes:
    """Eight frames of 32 x 32 pixels."""
    import av

    file = io.BytesIO()
    with av.open(file, "w", format=container) as out:
        stream = out.add_stream(codec, rate=25)
        stream.width = 32
        stream.height = 32
        stream.pix_fmt = "yuv420p"
        for k in range(8):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((32, 32, 3), 30 * k, np.uint8), format="rgb24")))
        out.mux(stream.encode(None))
    return file.getvalue()


def tables() -> dict[str, bytes]:
    """ROWS in every format of rows."""
    table = pa.Table.from_pylist(ROWS)
    parquet = io.BytesIO()
    pq.write_table(table, parquet, row_group_size=8)
    arrow = io.BytesIO()
    with pa.ipc.new_stream(arrow, table.schema) as sink:
        sink.write_table(table, max_chunksize=8)
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for row in ROWS:
            info = tarfile.TarInfo(f"{row['id']}.json")
            info.size = len(json.dumps(row))
            tar.addfile(info, io.BytesIO(json.dumps(row).encode()))
    lines = [",".join(row[name] for name in ("id", "question", "answer")) for row in ROWS]
    return {
        "rows.parquet": parquet.getvalue(),
        "rows.arrow": arrow.getvalue(),
        "rows.tar": archive.getvalue(),
        "rows.jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode(),
        "rows.json": json.dumps(ROWS, ensure_ascii=False).encode(),
        "rows.csv": "\n".join(["id,question,answer", *lines]).encode(),
        "rows.tsv": "\n".join(["id,question,answer", *lines]).replace(",", "\t").encode(),
    }


def seeds() -> dict[str, bytes]:
    """One whole file of every format, by name."""
    images = {
        "plain.jpg": image("JPEG"),
        "progressive.jpg": image("JPEG", progressive=True),
        "cmyk.jpg": image("JPEG", "CMYK"),
        "plain.png": image("PNG"),
        "palette.png": image("PNG", "P"),
        "grey16.png": image("PNG", "I;16") if "I;16" in Image.MODES else image("PNG", "L"),
        "lossy.webp": image("WEBP"),
        "lossless.webp": image("WEBP", "RGBA", lossless=True),
        "plain.gif": image("GIF", "P"),
        "plain.bmp": image("BMP"),
        "plain.tiff": image("TIFF"),
        "deflate.tiff": image("TIFF", compression="tiff_deflate"),
        "lzw.tiff": image("TIFF", compression="tiff_lzw"),
        "plain.avif": image("AVIF"),
        "plain.ppm": image("PPM"),
    }
    videos = {
        "h264.mp4": video("mp4", "libx264"),
        "h264.mkv": video("matroska", "libx264"),
        "vp8.webm": video("webm", "libvpx"),
        "mpeg4.avi": video("avi", "mpeg4"),
        "mpeg2.ts": video("mpegts", "mpeg2video"),
        "h264.flv": video("flv", "libx264"),
    }
    return {**images, **videos, **tables()}


def mutated(data: bytes, rng: random.Random) -> bytes:
    """The file with one to four changes."""
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 4])):
        if not changed:
            break
        at = rng.randrange(len(changed))
        kind = rng.randrange(7)
        if kind == 0:  # other bytes
            for _ in range(rng.choice([1, 8, 50])):
                changed[rng.randrange(len(changed))] = rng.choice([0, 255, rng.randrange(256)])
        elif kind == 1:  # an extreme number of 1, 2 or 4 bytes
            size, code = rng.choice([(1, "B"), (2, "H"), (4, "I")])
            number = rng.choice(EXTREMES) & ((1 << 8 * size) - 1)
            changed[at : at + size] = struct.pack(rng.choice("<>") + code, number)
        elif kind == 2:
            del changed[at:]
        elif kind == 3:
            del changed[at : at + rng.randrange(1, 200)]
        elif kind == 4:
            changed[at:at] = rng.randbytes(rng.randrange(1, 100))
        elif kind == 5:  # a piece twice, or very often
            piece = changed[at : at + rng.randrange(1, 100)]
            changed[at:at] = piece * rng.choice([1, 1, 1000])
        else:  # one bit
            changed[at] ^= 1 << rng.randrange(8)
    return bytes(changed)


def made(number: int, seed: int, whole: dict[str, bytes]) -> tuple[str, bytes]:
    """(name, content) of an input."""
    name = list(whole)[number % len(whole)]
    return name, mutated(whole[name], random.Random(f"{seed} {number}"))


def read(name: str, data: bytes, folder: Path) -> bool:
    """Read one input as training does; False if it is refused. Raises if anything but a refusal happens."""
    from fastvst.data.images import MediaError, image_header, load_rgb
    from fastvst.data.sample import Sample
    from fastvst.data.sources import open_source
    from fastvst.data.video import VideoConfig, decode_video, select_frames

    if not name.startswith("rows."):
        suffix = Path(name).suffix
        try:
            if suffix in (".mp4", ".mkv", ".webm", ".avi", ".ts", ".flv", ".sdp", ".m3u8"):
                part = {"type": "video", "video": data}
                config = VideoConfig(time_limit=1.0)
                chosen = select_frames(part, config, total_pixels=10**6, factor=28, max_source_pixels=PIXELS)
                found = decode_video(part, chosen, time_limit=1.0, max_source_pixels=PIXELS)
                assert len(found.frames) == len(chosen.indices)
            else:
                size = image_header(data, max_source_pixels=PIXELS).size
                assert load_rgb(data, max_source_pixels=PIXELS, time_limit=1.0).size == size
        except MediaError:
            return False
        return True
    path = folder / name
    path.write_bytes(data)
    try:
        source = open_source(path)
    except ValueError as error:
        assert name in str(error), error
        return False
    rows = [one for block in range(len(source.blocks)) for one in source.samples(block)]
    assert len(rows) == len(source)
    return any(isinstance(row, Sample) for row in rows)


def peak_memory() -> int:
    """Largest resident memory of this program in bytes. ru_maxrss would also count what its parent had before exec."""
    text = Path("/proc/self/status").read_text()
    return int(text.partition("VmHWM:")[2].split()[0]) << 10


def child(seed: int, first: int, count: int | None) -> None:
    """Read inputs in order; a line with the number before each, and at the end how many were read and the memory."""
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    warnings.simplefilter("ignore")
    whole = seeds()
    good = 0
    with tempfile.TemporaryDirectory() as folder:
        for number in itertools.count(first) if count is None else range(first, count):
            print(number, flush=True)
            good += read(*made(number, seed, whole), Path(folder))
            memory = peak_memory()
            if memory > MEMORY:
                raise MemoryError(f"{memory:,} bytes of resident memory; at most {MEMORY:,} are allowed")
    print(json.dumps({"read": good, "memory": memory}), flush=True)


def run(seed: int, count: int | None) -> tuple[dict[str, int], list[tuple[int, str]]]:
    """Read the inputs in child processes.

    Returns:
        The child's counts, and (number, what happened) of every input that failed.
    """
    first = 0
    failed: list[tuple[int, str]] = []
    last: dict[str, int] = {"read": 0, "memory": 0}
    while count is None or first < count:
        words = [sys.executable, __file__, "--child", str(first), "--seed", str(seed)]
        words += [] if count is None else ["--count", str(count)]
        process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0)
        number, text = _follow(process, first)
        if process.returncode == 0:
            found = json.loads(text)
            last = {"read": last["read"] + found["read"], "memory": max(last["memory"], found["memory"])}
            break
        why = text or f"ended with status {process.returncode}"
        failed.append((number, why))
        name, data = made(number, seed, seeds())
        target = CORPUS / f"found-{seed}-{number}-{name}"
        target.write_bytes(data)
        print(f"{target}: {why}", file=sys.stderr, flush=True)
        first = number + 1
    return last, failed


def _follow(process: subprocess.Popen[bytes], first: int) -> tuple[int, str]:
    """(the last number that a child wrote, its last line or why it ended)."""
    number = first
    line = b""
    assert process.stdout is not None and process.stderr is not None
    while True:
        if not select.select([process.stdout], [], [], HANG_SECONDS)[0]:
            process.kill()
            process.wait()
            return number, f"no end within {HANG_SECONDS:g} s"
        piece = os.read(process.stdout.fileno(), 1 << 16)
        if not piece:
            break
        *whole, line = (line + piece).split(b"\n")
        for one in whole:
            number = int(one) if one.isdigit() else number
            text = one.decode()
    errors = process.stderr.read().decode(errors="replace").strip()
    process.wait()
    return number, text if process.returncode == 0 else errors[-2000:]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, help="number of inputs (default: without end)")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        child(arguments.seed, arguments.child, arguments.count)
        return 0
    counts, failed = run(arguments.seed, arguments.count)
    print(f"{arguments.count} inputs, {counts['read']} of the last child could be read, {len(failed)} failed")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
