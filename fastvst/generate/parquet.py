"""Samples as rows of VST parquet: the published columns, and `answer` with the checkable answer."""

from __future__ import annotations

import io
import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from fastvst import atomic
from fastvst.data.sample import Sample

IMAGE_PLACEHOLDER = "<|image_pad|>"
VIDEO_PLACEHOLDER = "<|video_pad|>"
Encoded = dict[tuple[str, int], bytes]

# `meta_info` and `answer` are JSON: the sizes of the images, and {"answer": ..., "metadata": ...}.
SCHEMA = pa.schema(
    [
        ("conversations", pa.list_(pa.struct([("from", pa.string()), ("value", pa.string())]))),
        ("id", pa.string()),
        ("data_source", pa.string()),
        ("images", pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))),
        ("type", pa.string()),
        ("meta_info", pa.string()),
        ("answer", pa.string()),
    ]
)


def to_row(sample: Sample, quality: int, encoded: Encoded | None = None, videos: str | None = None) -> dict[str, Any]:
    """A row of SCHEMA. Placeholders of images and videos are where the message has them.

    Args:
        quality: JPEG quality of images and frames, 0 for PNG.
        encoded: bytes of the images and videos of earlier rows, keyed by kind and `id` of the image (for a video: of
            its first frame). Updated in place. The images must stay alive as long as it is used.
        videos: None stores frames, "mp4" stores one file for each video.
    """
    encoded = {} if encoded is None else encoded
    images: list[dict[str, Any]] = []
    sizes: list[dict[str, int]] = []
    conversations = []
    for message in sample.messages:
        text = ""
        for part in message["content"]:
            if part["type"] == "image":
                image = part["image"]
                images.append({"bytes": _encode_once(image, quality, encoded), "path": None})
                requested = {key: part.get(key, -1) for key in ("resized_width", "resized_height")}
                sizes.append({**requested, "width": image.width, "height": image.height})
                text += IMAGE_PLACEHOLDER
            elif part["type"] == "video":
                images += [{"bytes": data, "path": None} for data in _encode_part(part, quality, encoded, videos)]
                text += VIDEO_PLACEHOLDER
            else:
                text += part["text"]
        conversations.append({"from": {"user": "human", "assistant": "gpt"}[message["role"]], "value": text})
    return {
        "conversations": conversations,
        "id": sample.id,
        "data_source": sample.source,
        "images": images,
        "type": sample.kind,
        "meta_info": json.dumps(sizes),
        "answer": json.dumps({"answer": sample.answer, "metadata": sample.metadata}),
    }


def _encode_once(image: Image.Image, quality: int, encoded: Encoded) -> bytes:
    key = ("image", id(image))
    if key not in encoded:
        encoded[key] = encode_image(image, quality)
    return encoded[key]


def _encode_part(part: dict[str, Any], quality: int, encoded: Encoded, videos: str | None) -> list[bytes]:
    """The bytes of a video part: one for each frame, or one file. See `to_row`."""
    frames = part["video"]
    if videos == "mp4":
        key = ("video", id(frames[0]))
        if key not in encoded:
            encoded[key] = encode_video(frames, part.get("fps", 2.0))
        return [encoded[key]]
    return [_encode_once(frame, quality, encoded) for frame in frames]


def encode_image(image: Image.Image, quality: int) -> bytes:
    """JPEG without chroma subsampling, so that coloured dots keep their colour; PNG for quality 0."""
    buffer = io.BytesIO()
    if quality:
        image.save(buffer, format="JPEG", quality=quality, subsampling=0)
    else:
        image.save(buffer, format="PNG", compress_level=3)
    return buffer.getvalue()


def encode_video(frames: list[Image.Image], fps: float) -> bytes:
    """H.264 in MP4 with crf 16; the same frames always give the same bytes.

    Raises:
        RuntimeError: PyAV is not installed.
    """
    try:
        import av  # optional: only video files need it
    except ImportError as error:
        raise RuntimeError("rooms: videos 'mp4' needs PyAV: pip install 'fastvst[video]'") from error
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
        stream.width = frames[0].width
        stream.height = frames[0].height
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": "16", "threads": "1"}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode())
    return buffer.getvalue()


def write_rows(path: Path, rows: list[dict[str, Any]], schema: pa.Schema = SCHEMA) -> None:
    """Write one parquet file, whole or not at all; missing parent folders are created."""
    table = pa.Table.from_pylist(rows, schema=schema)
    with atomic.file(path) as partial:
        # JPEG does not compress further. Row groups of 100 keep a reader's memory small.
        pq.write_table(table, partial, compression="none", row_group_size=100)
