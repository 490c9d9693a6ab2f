"""Image preprocessing against transformers' PIL image processor (tolerance 0), and damaged or dangerous files."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as hf_smart_resize

from fastvst.data import Processor, Sample
from fastvst.data.image_modes import ImageRules
from fastvst.data.images import (
    CLIP_MEAN,
    CLIP_STD,
    WORK_PER_SECOND,
    MediaError,
    PatchGeometry,
    image_size,
    load_rgb,
    patchify,
    resize_planar,
    smart_resize,
    target_size,
)
from fastvst.data.media_files import BYTES_OF_A_DECODE, jpeg_scans

GEOMETRY = PatchGeometry()
LIMITS = {"max_source_pixels": 10_000_000, "time_limit": 10.0}
MODES = ["RGB", "L", "RGBA", "P", "CMYK", "LA", "1", "YCbCr", "F", "I"]
DROP = ImageRules(alpha="drop")  # as transformers


def make_image(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """Smooth waves and noise in any Pillow mode."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = np.stack([np.sin(x / 9 + k) + np.cos(y / (7 + k)) for k in range(3)], -1)
    rgb = np.clip(waves * 60 + 128 + rng.normal(0, 20, waves.shape), 0, 255).astype(np.uint8)
    image = Image.fromarray(rgb).convert(mode)
    if mode == "RGBA":
        image.putalpha(Image.fromarray(rng.integers(0, 256, (height, width), dtype=np.uint8)))
    return image


def ours(image: object, min_pixels: int, max_pixels: int) -> tuple[np.ndarray, tuple[int, int]]:
    rgb = load_rgb(image, **LIMITS, rules=DROP)
    size = target_size(*rgb.size, factor=28, min_pixels=min_pixels, max_pixels=max_pixels)
    return patchify([resize_planar(rgb, size)], GEOMETRY), (size[1] // 14, size[0] // 14)


def theirs(image: Image.Image, min_pixels: int, max_pixels: int) -> tuple[np.ndarray, tuple[int, int]]:
    # pass `size`: min_pixels and max_pixels would change a dict of the class, and with it every later processor
    processor = Qwen2VLImageProcessorPil(size={"shortest_edge": min_pixels, "longest_edge": max_pixels})
    out = processor(image, return_tensors="np")
    return out["pixel_values"], tuple(int(v) for v in out["image_grid_thw"][0][1:])


@given(
    width=st.integers(28, 500),
    height=st.integers(28, 500),
    columns=st.integers(1, 18),
    rows=st.integers(1, 18),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_the_fast_resize_stays_within_two_levels_of_pillow(width, height, columns, rows, seed) -> None:
    rng = np.random.default_rng(seed)
    # Far enough from black and white that no pass is clipped; with values up to both ends the difference is 3.
    coarse = rng.integers(64, 192, (height // 12 + 2, width // 12 + 2, 3), dtype=np.uint8)
    smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    noise = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
    for image, size, most in (
        (smooth, (28 * columns, 28 * rows), 2),
        (noise, (28 * columns, height), 1),  # a single pass: nothing is clipped between two
        (noise, (width, 28 * rows), 1),
        (noise, (width, height), 0),
    ):
        exact, fast = (resize_planar(image, size, method).astype(int) for method in ("pillow", "torch"))
        assert fast.shape == exact.shape == (3, size[1], size[0])
        assert abs(fast - exact).max() <= most


def test_the_resize_is_a_choice_of_the_processor() -> None:
    image = make_image(15, 10).resize((300, 200), Image.Resampling.BICUBIC)
    message = {"role": "user", "content": [{"type": "image", "image": image}]}
    sample = Sample.from_messages([message, {"role": "assistant", "content": "."}])
    exact = Processor.preset("tiny").encode(sample).patches
    fast = Processor.preset("tiny", resize="torch").encode(sample).patches
    assert not torch.equal(exact, fast), "the option must reach the resize"
    assert (exact - fast).abs().max() <= 2.01 / 255 / min(CLIP_STD)
    with pytest.raises(ValueError, match="resize is 'cubic'"):
        Processor.preset("tiny", resize="cubic")


@given(
    width=st.integers(28, 300),
    height=st.integers(28, 300),
    mode=st.sampled_from(MODES),
    limits=st.sampled_from([(3136, 12845056), (56 * 56, 100 * 784), (40_000, 60_000), (784, 784), (784, 12845056)]),
    seed=st.integers(0, 5),
)
@settings(max_examples=60, deadline=None)
def test_pixels_and_grid_equal_transformers_bit_for_bit(width, height, mode, limits, seed) -> None:
    image = make_image(width, height, mode, seed)
    values, grid = ours(image, *limits)
    expected, expected_grid = theirs(image, *limits)
    assert grid == expected_grid
    assert values.dtype == expected.dtype == np.float32
    np.testing.assert_array_equal(values, expected)


@pytest.mark.parametrize("size", [(28, 28), (56, 56), (640, 480), (29, 2000), (1500, 30), (57, 55), (730, 530)])
def test_chosen_sizes_equal_transformers(size: tuple[int, int]) -> None:
    image = make_image(*size)
    for left, right in zip(ours(image, 3136, 12845056), theirs(image, 3136, 12845056), strict=True):
        np.testing.assert_array_equal(left, right)


def test_all_256_values_of_every_channel_equal_the_float64_formula() -> None:
    frame = np.stack([np.resize(np.arange(256, dtype=np.uint8), (28, 28)) for _ in range(3)])
    scaled = (frame.astype(np.float64) * (1 / 255)).astype(np.float32)
    mean, std = (np.array(v, dtype=np.float32)[:, None, None] for v in (CLIP_MEAN, CLIP_STD))
    expected = (scaled - mean) / std
    values = patchify([frame], GEOMETRY).reshape(2, 2, 3, 2, 14, 14)  # (row, column, channel, time, y, x)
    for time in range(2):
        np.testing.assert_array_equal(values[:, :, :, time].transpose(2, 0, 3, 1, 4).reshape(3, 28, 28), expected)


@given(
    height=st.integers(1, 4000),
    width=st.integers(1, 4000),
    low=st.sampled_from([784, 3136, 200_704]),
    high=st.sampled_from([250_000, 1_003_520, 12_845_056]),
)
@settings(max_examples=300, deadline=None)
def test_smart_resize_is_transformers(height, width, low, high) -> None:
    try:
        expected = hf_smart_resize(height, width, 28, low, high)
    except ValueError:
        with pytest.raises(MediaError, match="aspect_ratio"):
            smart_resize(height, width, factor=28, min_pixels=low, max_pixels=high)
        return
    assert smart_resize(height, width, factor=28, min_pixels=low, max_pixels=high) == expected


@given(short=st.integers(1, 27), ratio=st.floats(1, 199), flip=st.booleans())
@settings(max_examples=100, deadline=None)
def test_a_side_below_28_is_enlarged_until_both_are_at_least_56(short, ratio, flip) -> None:
    size = (short, int(short * ratio))
    width, height = target_size(*(size[::-1] if flip else size), factor=28, min_pixels=3136, max_pixels=12845056)
    assert min(width, height) == 56 and width % 28 == height % 28 == 0


def test_explicit_size_ignores_the_limits_and_is_rounded() -> None:
    # VST resizes 959 x 696 to 952 x 700, although max_pixels is small
    assert target_size(730, 530, factor=28, min_pixels=784, max_pixels=7840, explicit=(959, 696)) == (952, 700)
    assert target_size(730, 530, factor=28, min_pixels=784, max_pixels=784, explicit=(10, 10)) == (56, 56)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_image_bytes_and_path_are_the_same(tmp_path: Path) -> None:
    image = make_image(90, 70)
    data = encoded(image, "PNG")
    (tmp_path / "a.png").write_bytes(data)
    for source in (image, data, bytearray(data), tmp_path / "a.png", str(tmp_path / "a.png")):
        assert image_size(source, max_source_pixels=10_000) == (90, 70)
        np.testing.assert_array_equal(np.asarray(load_rgb(source, **LIMITS)), np.asarray(image))


def reason(action) -> str:
    with pytest.raises(MediaError) as caught:
        action()
    assert caught.value.detail
    return caught.value.reason


def png_of_size(width: int, height: int) -> bytes:
    """A PNG header that promises width x height pixels, without any pixel."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "empty_file"),
        (b"not an image", "broken_image"),
        (encoded(make_image(200, 200), "PNG")[:2000], "broken_image"),
        (encoded(make_image(200, 200), "JPEG")[:1500], "broken_image"),
        (png_of_size(4000, 4000), "decompression_bomb"),
        (png_of_size(60_000, 60_000), "decompression_bomb"),
        (3.5, "bad_image_type"),
        (Path("no/such/file.png"), "missing_image"),
    ],
    ids=["0 bytes", "text", "cut png", "cut jpeg", "16 Mpx", "3.6 Gpx", "number", "no file"],
)
def test_bad_images_have_reason_codes(data: object, code: str) -> None:
    assert reason(lambda: load_rgb(data, **LIMITS)) == code


def test_an_empty_file_on_disk_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"")
    assert reason(lambda: image_size(path, max_source_pixels=100)) == "empty_file"
    assert reason(lambda: load_rgb(path, **LIMITS)) == "empty_file"


def test_the_header_alone_tells_the_size_and_the_bomb() -> None:
    assert image_size(encoded(make_image(200, 200), "PNG")[:2000], max_source_pixels=10**6) == (200, 200)
    assert reason(lambda: image_size(png_of_size(4000, 4000), max_source_pixels=10**6)) == "decompression_bomb"


def progressive(scans: int) -> bytes:
    """A JPEG of 400 x 400 pixels whose last scan is there several times."""
    file = io.BytesIO()
    make_image(400, 400).save(file, "JPEG", progressive=True)
    data = file.getvalue()
    last = data.rindex(b"\xff\xda")
    return data[:-2] + data[last:-2] * (scans - data.count(b"\xff\xda")) + data[-2:]


def test_the_work_of_a_jpeg_is_its_pixels_in_every_scan() -> None:
    for scans in (10, 400):
        assert jpeg_scans(progressive(scans)) == scans
    second = 1_000_000 / WORK_PER_SECOND
    load_rgb(progressive(10), max_source_pixels=10**6, time_limit=2 * second)
    with pytest.raises(MediaError, match="decode_timeout: 400 x 400 pixels in 20 scans are 0.016 s at"):
        load_rgb(progressive(20), max_source_pixels=10**6, time_limit=2 * second)
    with pytest.raises(MediaError, match="decode_timeout"):
        load_rgb(make_image(400, 400), max_source_pixels=10**6, time_limit=0.1 * second)
    plain = encoded(make_image(400, 400), "JPEG")
    assert jpeg_scans(plain) == 1 and jpeg_scans(plain + progressive(40)) == 1  # what follows the image is not decoded
    assert jpeg_scans(b"\x89PNG\xff\xda\xff\xda") == 1 and jpeg_scans(plain[:100]) == 1


def test_images_without_pixels_are_refused() -> None:
    assert reason(lambda: target_size(0, 10, factor=28, min_pixels=784, max_pixels=7840)) == "empty_image"
    assert reason(lambda: target_size(10, 2100, factor=28, min_pixels=784, max_pixels=7840)) == "aspect_ratio"


MEMORY = """
import sys
from pathlib import Path
from fastvst.data.images import load_rgb, resize_planar
for name in sys.argv[1:]:
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    status = lambda key: int(Path("/proc/self/status").read_text().split(key + ":")[1].split()[0]) << 10
    before = status("VmRSS")
    image = load_rgb(name, max_source_pixels=10**8, time_limit=60)
    resize_planar(image, (560, 560))
    print(status("VmHWM") - before)
    del image
"""


def test_the_memory_of_a_decode_is_bounded(tmp_path: Path) -> None:
    side = 2000
    values = np.zeros((side, side, 4), dtype=np.uint8)
    values[::7] = 200
    rgba = Image.fromarray(values)
    rgb = rgba.convert("RGB")
    floats = Image.fromarray(values[..., 0].astype(np.float32) * 3)
    wide = Image.fromarray(values[..., 0].astype(np.uint16) * 257)
    files = {"a.jpg": rgb, "b.png": rgba, "c.webp": rgba, "d.tiff": floats, "e.png": wide, "f.gif": rgb, "g.avif": rgb}
    for name, image in files.items():
        image.save(tmp_path / name)
    rgb.save(tmp_path / "h.jpg", progressive=True, subsampling=0)
    paths = sorted(tmp_path.iterdir())
    run = subprocess.run([sys.executable, "-c", MEMORY, *map(str, paths)], capture_output=True, text=True, check=True)
    for path, line in zip(paths, run.stdout.split(), strict=True):
        assert int(line) < BYTES_OF_A_DECODE * side**2 + path.stat().st_size + (16 << 20), path.name
