"""Fingerprints: which weights, processor and settings gave a prediction, and which question it answers.

A prediction on disk is used again only if its fingerprint is that of the run and the row. Names are no part of it: a
folder may hold other weights than yesterday, and an image file another image.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from fastvst.data.sample import Part, Sample
from fastvst.model import weights
from fastvst.model.hub import local_checkpoint

if TYPE_CHECKING:
    from fastvst.data.processor import Processor
    from fastvst.model import Qwen25VL

CHUNK = 1 << 26  # bytes that one thread hashes at a time; hashlib releases the interpreter lock
WHOLE = 1 << 22  # media files up to 4 MiB are hashed whole
BLOCKS = 64  # evenly spaced blocks of BLOCK bytes that stand for a larger media file
BLOCK = 1 << 16
REMEMBERED = 256  # images and videos whose fingerprint is kept
VALUES = 1 << 24  # integers of a tensor that are summed at a time
ODD = 0x9E3779B1  # every place of a chunk has a factor of its own
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of a value


def of(values: Any) -> str:
    """16 hexadecimal digits of a JSON-able value."""
    text = json.dumps(values, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def of_directory(directory: str | Path) -> str:
    """Of every byte of the weight files of a model directory.

    The files are hashed in threads, at about the speed at which they are read. Loading the model reads them again,
    from the page cache where they fit.

    Raises:
        FileNotFoundError: the directory has no weights.
    """
    files = [path for path in weights.weight_files(local_checkpoint(directory)) if path.is_file()]
    chunks = [(path, begin) for path in files for begin in range(0, max(path.stat().st_size, 1), CHUNK)]
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        return of(list(pool.map(_chunk, *zip(*chunks, strict=True))))


def _chunk(path: Path, begin: int) -> str:
    with open(path, "rb") as file:
        file.seek(begin)
        return hashlib.blake2b(file.read(CHUNK), digest_size=8).hexdigest()


def of_model(model: Qwen25VL) -> str:
    """Of the parameters in memory: dtype, shape and two checksums of every tensor. Waits for the device once each."""
    return of([[name, str(p.dtype), list(p.shape), _checksums(p)] for name, p in model.state_dict().items()])


def _checksums(tensor: Tensor) -> list[int]:
    """Sum of the values' bits as integers, and their sum with a factor for each place, both modulo 2^63."""
    bits = tensor.contiguous().flatten().view(INTEGERS[tensor.element_size()])
    total = torch.zeros(2, dtype=torch.int64, device=tensor.device)
    for number, begin in enumerate(range(0, bits.numel(), VALUES)):
        part = bits[begin : begin + VALUES].to(torch.int64)
        place = torch.arange(1, part.numel() + 1, device=part.device) * ODD + number
        total += torch.stack([part.sum(), (part * place).sum()])
    return [value & ((1 << 63) - 1) for value in total.tolist()]


def of_processor(processor: Processor) -> str:
    """Of the tokenizer, the chat template, the token ids of the model and all options."""
    template = processor.files.template
    parts = [processor.tokenizer.to_str(), "" if template is None else template.source]
    return of([*parts, dataclasses.asdict(processor.config), repr(processor.model_config)])


class SampleFingerprints:
    """Fingerprints of questions: every text, and the content of every image and video.

    It remembers the last media that it has hashed: neighbouring questions are often about one image.
    """

    def __init__(self) -> None:
        self._media: dict[Any, tuple[Any, str]] = {}  # key -> (the object, which keeps its id from being used again)

    def of(self, sample: Sample, run: str = "") -> str:
        """Of a question in a run with the fingerprint `run`. Id, source and answer are no part of it."""
        turns = [[m["role"], [self._part(p) for p in m["content"]]] for m in sample.messages]
        return of([run, sample.kind, turns])

    def _part(self, part: Part) -> Any:
        kind = part["type"]
        return part if kind == "text" else {**part, kind: self._digest(part[kind])}

    def _digest(self, media: Any) -> Any:
        if isinstance(media, (list, tuple)):
            return [self._digest(one) for one in media]
        key = str(media) if isinstance(media, (str, Path)) else id(media)
        if key not in self._media:
            if len(self._media) == REMEMBERED:  # what it remembers stays in memory
                self._media.clear()
            self._media[key] = (media, _media_digest(media))
        return self._media[key][1]


def _media_digest(media: Any) -> str:
    if isinstance(media, (str, Path)):
        pieces = _file_pieces(Path(media)) if os.path.isfile(media) else iter([b"missing", str(media).encode()])
    elif isinstance(media, Image.Image):
        pieces = iter([f"{media.mode} {media.size} {media.getexif().get(0x0112)}".encode(), media.tobytes()])
    else:
        pieces = iter([bytes(media)])
    digest = hashlib.blake2b(digest_size=8)
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


def _file_pieces(path: Path) -> Iterator[bytes]:
    """The bytes of a file; of a large one its size and evenly spaced blocks."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        if size <= WHOLE:
            yield file.read()
            return
        yield str(size).encode()
        for index in range(BLOCKS):
            file.seek(index * (size - BLOCK) // (BLOCKS - 1))
            yield file.read(BLOCK)


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The settings that differ, as text: "weights: '1f…', now '2e…'"; "" if none does."""
    names = [name for name in now if before.get(name) != now[name]]
    return ", ".join(f"{name}: {before.get(name)!r}, now {now[name]!r}" for name in names)
