"""Images of every mode as viewers show them, against Pillow's own operations and arithmetic on the values."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps, ImageSequence

from fastvst.data import Processor, Sample
from fastvst.data.image_modes import ImageRules, to_rgb
from fastvst.data.images import MediaError, image_header, image_size, load_rgb

LIMITS = {"max_source_pixels": 10_000_000, "time_limit": 10.0}
SIDE = 10**7


def noise(width: int = 64, height: int = 40, channels: int = 3) -> Image.Image:
    rng = np.random.default_rng(3)
    coarse = rng.integers(0, 256, (height // 8, width // 8, channels), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.NEAREST)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def with_orientation(kind: str, value: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = value
    return encoded(noise(), kind, exif=exif)


def notes(source: object, **rules: object) -> tuple[str, ...]:
    return image_header(source, max_source_pixels=SIDE, rules=ImageRules(**rules)).notes


def pixels(source: object, **rules: object) -> np.ndarray:
    return np.asarray(load_rgb(source, **LIMITS, rules=ImageRules(**rules))).astype(int)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("value", range(1, 9))
def test_exif_orientation_is_that_of_pillow(kind: str, value: int, tmp_path: Path) -> None:
    data = with_orientation(kind, value)
    shown = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    path = tmp_path / "a"
    path.write_bytes(data)
    for source in (data, path, Image.open(io.BytesIO(data))):
        assert image_size(source, max_source_pixels=SIDE) == shown.size == ((40, 64) if value >= 5 else (64, 40))
        np.testing.assert_array_equal(pixels(source), np.asarray(shown))
    assert notes(data) == (("exif_orientation_applied",) if value != 1 else ())
    again = load_rgb(data, **LIMITS)
    assert load_rgb(again, **LIMITS).size == shown.size, "an image that was turned is not turned again"


def test_orientation_off_gives_the_stored_pixels() -> None:
    data = with_orientation("JPEG", 6)
    assert image_size(data, max_source_pixels=SIDE, rules=ImageRules(orientation=False)) == (64, 40)
    np.testing.assert_array_equal(pixels(data, orientation=False), np.asarray(Image.open(io.BytesIO(data))))
    assert notes(data, orientation=False) == ()


def test_orientation_that_a_png_names_after_its_pixels(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 8
    body = exif.tobytes()
    body = body[6:] if body.startswith(b"Exif\0\0") else body
    chunk = struct.pack(">I", len(body)) + b"eXIf" + body + struct.pack(">I", zlib.crc32(b"eXIf" + body))
    plain = encoded(noise(), "PNG")
    data = plain[:-12] + chunk + plain[-12:]
    assert image_size(data, max_source_pixels=SIDE) == (40, 64)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    np.testing.assert_array_equal(pixels(data), np.asarray(expected))
    assert image_size(data[: len(data) // 2], max_source_pixels=SIDE) == (64, 40)  # a cut file is measured all the same


def test_damaged_exif_does_not_refuse_an_image() -> None:
    data = encoded(noise(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\x7fgarbage")
    assert pixels(data).shape == (40, 64, 3) and notes(data) == ()


def transparent(mode: str) -> Image.Image:
    """A gradient of alpha over noise."""
    rgba = noise(channels=4).convert("RGBA")
    rgba.putalpha(Image.fromarray(np.tile(np.linspace(0, 255, 64).astype(np.uint8), (40, 1))))
    return rgba.convert(mode)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "La", "RGBa"])
def test_alpha_is_composed_on_white(mode: str) -> None:
    image = transparent("LA").convert("La") if mode == "La" else transparent("RGBA").convert(mode)
    rgba = np.asarray((image.convert("LA") if mode == "La" else image).convert("RGBA")).astype(float)
    alpha = rgba[..., 3:] / 255
    expected = rgba[..., :3] * alpha + 255 * (1 - alpha)
    assert np.abs(pixels(image) - expected).max() <= 1
    np.testing.assert_array_equal(pixels(image, alpha="drop"), rgba[..., :3])
    assert notes(image) == ("alpha_on_white",) and notes(image, alpha="drop") == ("alpha_dropped",)


def test_transparent_colour_of_palette_and_grey_images() -> None:
    levels = np.repeat(np.array([[0, 100, 200]], np.uint8), 8, 1)
    grey = encoded(Image.fromarray(np.tile(levels, (8, 1))), "PNG", transparency=0)
    palette = Image.fromarray(np.tile(levels // 100, (8, 1)), "P")
    palette.putpalette([0, 0, 0, 100, 100, 100, 200, 200, 200])
    for data in (grey, encoded(palette, "PNG", transparency=0), encoded(palette, "GIF", transparency=0)):
        assert pixels(data)[0, ::8, 0].tolist() == [255, 100, 200]
        assert pixels(data, alpha="drop")[0, ::8, 0].tolist() == [0, 100, 200]
    assert notes(encoded(palette, "PNG")) == (), "a palette without a transparent colour is an ordinary image"


def test_opaque_alpha_changes_nothing() -> None:
    image = noise().convert("RGBA")
    np.testing.assert_array_equal(pixels(image), np.asarray(noise()))


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    values = np.linspace(0, 65535, 64 * 40).astype(np.uint16).reshape(40, 64)
    expected = np.round(values / 65535 * 255)
    for source in (
        encoded(Image.fromarray(values), "PNG"),
        encoded(Image.fromarray(values), "TIFF"),
        Image.fromarray(values.astype(np.int32)),
    ):
        np.testing.assert_array_equal(pixels(source), np.repeat(expected[..., None], 3, 2))
    assert notes(encoded(Image.fromarray(values), "PNG")) == ("16_bit_scaled",)
    assert notes(Image.fromarray(values.astype(np.int32))) == ("32_bit_scaled",)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0, 0.25, 0.5, 1.0], [0, 64, 128, 255]),  # parts of 1
        ([0.0, 10.0, 200.0, 255.0], [0, 10, 200, 255]),  # 8-bit levels
        ([-3.0, 0.0, 1.0, 5.0], [0, 96, 128, 255]),  # anything else: from the least to the largest
        ([0.0, 300.0, 600.0, np.nan], [0, 128, 255, 0]),
        ([7e3, 7e3, 7e3, 7e3], [128] * 4),
        ([np.nan] * 4, [0] * 4),
    ],
)
def test_float_images_lose_no_level(values: list[float], expected: list[int]) -> None:
    image = Image.fromarray(np.array([values], np.float32))
    assert pixels(image)[0, :, 0].tolist() == expected and notes(image) == ("float_scaled",)


def test_integers_beyond_sixteen_bits_are_stretched() -> None:
    image = Image.fromarray(np.array([[-100_000, 0, 100_000]], np.int32))
    assert pixels(image)[0, :, 0].tolist() == [0, 128, 255]
    assert pixels(Image.fromarray(np.array([[0, 9, 255]], np.int32)))[0, :, 0].tolist() == [0, 9, 255]


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "LAB", "HSV"])
def test_other_colour_spaces_are_converted_by_pillow(mode: str) -> None:
    image = noise() if mode in ("CMYK", "YCbCr", "HSV") else Image.new("LAB", (8, 8), (120, 30, 60))
    image = image.convert(mode)
    np.testing.assert_array_equal(pixels(image), np.asarray(image.convert("RGB")))
    assert notes(image) == (f"{mode.lower()}_converted",)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_animations_and_pages_give_their_first_frame(kind: str) -> None:
    frames = [Image.new("RGB", (32, 32), (60 * k, 255 - 60 * k, 7)) for k in range(3)]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    first = next(iter(ImageSequence.Iterator(Image.open(io.BytesIO(data))))).convert("RGB")
    np.testing.assert_array_equal(pixels(data), np.asarray(first))
    assert "first_frame_only" in notes(data)


def test_postscript_is_not_run() -> None:
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n%%EndComments\nshowpage\n%%EOF\n"
    with pytest.raises(MediaError, match="broken_image"):
        load_rgb(eps, **LIMITS)


def test_ordinary_images_are_returned_as_they_are() -> None:
    image = noise()
    assert to_rgb(image) is image
    with pytest.raises(ValueError, match="alpha is 'black'"):
        Processor.preset("tiny", alpha="black")


def test_the_processor_carries_notes_and_sizes() -> None:
    content = [
        {"type": "image", "image": with_orientation("JPEG", 6)},
        {"type": "image", "image": transparent("RGBA")},
        {"type": "image", "image": noise(280, 280)},
        {"type": "text", "text": "?"},
    ]
    sample = Sample.from_messages([{"role": "user", "content": content}])
    processor = Processor.preset("tiny", max_pixels=140 * 140)
    found = processor.encode(sample)
    assert found.notes == processor.inspect(sample).notes == ("exif_orientation_applied", "alpha_on_white")
    assert found.source_sizes == ((40, 64), (64, 40), (280, 280))
    assert found.sizes == tuple((14 * w, 14 * h) for _, h, w in found.grid.tolist()) and found.sizes[2] == (140, 140)
    stored = Processor.preset("tiny", orientation=False, alpha="drop").encode(sample)
    assert stored.source_sizes[0] == (64, 40) and stored.notes == ("alpha_dropped",)
    assert not np.array_equal(stored.patches.numpy(), found.patches.numpy())
