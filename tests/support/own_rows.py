"""Forty rows of a user: questions about plain images, as JSON Lines with the images in a folder next to the file."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image

COLOURS = ("red", "green", "blue", "black")


def write_forty_rows(folder: Path, name: str = "rows.jsonl") -> Path:
    """Write forty rows and their images; returns the file."""
    images = folder / "images"
    images.mkdir(parents=True)
    lines = []
    for index in range(40):
        colour = COLOURS[index % len(COLOURS)]
        Image.new("RGB", (64 + index, 48), colour).save(images / f"{index}.png")
        row = {"question": "Which colour is the image?", "image": f"images/{index}.png", "answer": colour}
        lines.append(json.dumps(row))
    path = folder / name
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
