"""How an image of any mode becomes RGB: as a viewer shows it, one rule for each mode (docs/images_and_video.md)."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import ExifTags, Image

ALPHA = ("white", "drop")
TURNS = {  # the values of the EXIF tag Orientation, as in PIL.ImageOps.exif_transpose
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
ON_ITS_SIDE = (5, 6, 7, 8)  # width and height change places
ORIENTATION_KEYS = ("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif")
CONVERTED = ("CMYK", "YCbCr", "LAB", "HSV")


@dataclass(frozen=True)
class ImageRules:
    """How images are shown to the model.

    Attributes:
        alpha: "white" composes transparent pixels on white, as viewers and qwen-vl-utils do; "drop" ignores alpha, as
            transformers does.
        orientation: apply the EXIF orientation of images, and the display matrix and pixel aspect ratio of videos.
    """

    alpha: str = "white"
    orientation: bool = True

    def __post_init__(self) -> None:
        if self.alpha not in ALPHA:
            raise ValueError(f"alpha is {self.alpha!r}; expected one of {ALPHA}")


AS_DISPLAYED = ImageRules()


def read_orientation(image: Image.Image) -> int:
    """The EXIF orientation 1..8, without decoding a pixel; 1 if there is none or it cannot be read.

    Pillow applies the tag of a TIFF file itself, when it decodes the file; such images have 1 here.
    """
    if image.format == "TIFF":
        return 1
    try:
        exif = image.getexif() if image.format != "PNG" else _png_exif(image)
        value = exif.get(ExifTags.Base.Orientation, 1)
        return value if value in TURNS else 1
    except Exception:  # damaged EXIF data raise struct.error, SyntaxError, ...; viewers then show the image unturned
        return 1


def _png_exif(image: Image.Image) -> Image.Exif:
    """EXIF data of a PNG file, also those after the pixels; `getexif` of a PNG decodes all pixels to find them."""
    file = getattr(image, "fp", None)
    if "exif" in image.info or file is None:
        return Image.Image.getexif(image)
    here = file.tell()
    try:
        file.seek(8)  # behind the signature
        while len(head := file.read(8)) == 8:
            length = int.from_bytes(head[:4], "big")
            if head[4:] == b"eXIf":
                exif = Image.Exif()
                exif.load(file.read(length))
                return exif
            file.seek(length + 4, 1)  # content and checksum
    finally:
        file.seek(here)
    return Image.Image.getexif(image)


def shown(image: Image.Image, rules: ImageRules = AS_DISPLAYED) -> tuple[tuple[int, int], tuple[str, ...]]:
    """((width, height) of `to_rgb(image, rules)`, codes of the rules that change the image), without decoding a pixel.

    The codes of an ordinary image are ().
    """
    orientation = read_orientation(image) if rules.orientation else 1
    width, height = image.size
    notes = []
    if image.mode.startswith("I;16"):
        notes.append("16_bit_scaled")
    elif image.mode in ("I", "F"):
        notes.append("32_bit_scaled" if image.mode == "I" else "float_scaled")
    elif image.has_transparency_data:
        notes.append("alpha_on_white" if rules.alpha == "white" else "alpha_dropped")
    if image.mode in CONVERTED:
        notes.append(f"{image.mode.lower()}_converted")
    if orientation != 1 or (rules.orientation and _turned_tiff(image)):
        notes.append("exif_orientation_applied")
    with contextlib.suppress(Exception):  # counting the frames of a damaged file; decoding names its damage
        if getattr(image, "is_animated", False):
            notes.append("first_frame_only")
    return (height, width) if orientation in ON_ITS_SIDE else (width, height), tuple(notes)


def _turned_tiff(image: Image.Image) -> bool:
    tags = getattr(image, "tag_v2", None) if image.format == "TIFF" else None
    return tags is not None and tags.get(ExifTags.Base.Orientation, 1) in TURNS


def to_rgb(image: Image.Image, rules: ImageRules = AS_DISPLAYED) -> Image.Image:
    """The image in mode RGB as `rules` say; `image` itself if nothing changes."""
    orientation = read_orientation(image) if rules.orientation else 1  # before decoding, which changes what is known
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        rgb = _levels(image).convert("RGB")
    elif image.has_transparency_data and rules.alpha == "white":
        rgb = _on_white(image)
    elif image.mode in ("La", "RGBa"):  # alpha premultiplied; there is no direct conversion
        rgb = image.convert("LA" if image.mode == "La" else "RGBA").convert("RGB")
    else:
        rgb = image if image.mode == "RGB" else image.convert("RGB")
    if orientation == 1:
        return rgb
    turned = rgb.transpose(TURNS[orientation])
    turned.info = {key: value for key, value in rgb.info.items() if key not in ORIENTATION_KEYS}
    return turned


def _on_white(image: Image.Image) -> Image.Image:
    """Alpha composed on white by `Image.paste`, as in qwen-vl-utils."""
    rgba = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
    white = Image.new("RGB", image.size, (255, 255, 255))
    white.paste(rgba, mask=rgba.getchannel("A"))
    return white


def _levels(image: Image.Image) -> Image.Image:
    """16-bit, 32-bit and float values as 8-bit levels. Values that are 8-bit levels already are kept.

    16 bits: value / 257, so that 65,535 is white. 32-bit integers: as 16 bits up to 65,535, else stretched from the
    least to the largest value. Floats: 0..1 times 255, else stretched; NaN and infinities become the least value.
    """
    values: Any = np.asarray(image)
    if image.mode == "F":
        finite = np.isfinite(values)
        values = np.where(finite, values, values[finite].min() if finite.any() else 0).astype(np.float64)
    else:
        values = values.astype(np.float64)
    low = values.min()
    high = values.max()
    if image.mode.startswith("I;16"):
        values = np.rint(values / 257)
    elif image.mode == "F" and low >= 0 and high <= 1:
        values = np.rint(values * 255)
    elif image.mode == "I" and low >= 0 and 255 < high <= 65535:
        values = np.rint(values / 257)
    elif low < 0 or high > 255:
        values = np.rint((values - low) * (255 / (high - low))) if high > low else np.full_like(values, 128)
    return Image.fromarray(values.astype(np.uint8))
