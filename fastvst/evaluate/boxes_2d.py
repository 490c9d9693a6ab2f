"""2D boxes in an answer, in the pixels of the image that the user gave.

Qwen2.5-VL writes pixels of the image as it was resized for it. Boxes are converted to the user's image before they are
scored, drawn or written.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from fastvst import jsonl
from fastvst.data.vision_inputs import Size, to_source_pixels
from fastvst.spatial.boxes import greedy_matches

Box = tuple[tuple[float, float, float, float], str]  # x1, y1, x2, y2 in pixels; label
LARGEST = 1e6  # pixels; a larger coordinate is no place in an image
KEYS = ("bbox_2d", "bbox", "box")


def boxes_2d(answer: str) -> list[Box]:
    """Entries {"bbox_2d": [x1, y1, x2, y2], "label"} of the JSON in the answer, as Qwen2.5-VL writes them."""
    begin = min((place for place in map(answer.find, "[{") if place >= 0), default=-1)
    end = max(answer.rfind("]"), answer.rfind("}"))
    text = answer[begin : end + 1] if 0 <= begin < end else ""
    try:
        return of_entries(jsonl.loads(text)) if text else []
    except (ValueError, RecursionError):
        return []


def of_entries(entries: Any) -> list[Box]:
    """Boxes of a list of objects, of one object, or of one list of four numbers; what is no box is left out."""
    if isinstance(entries, dict) or _is_box(entries):
        entries = [entries]
    found = []
    for entry in entries if isinstance(entries, list) else []:
        box: Any = entry
        label = ""
        if isinstance(entry, dict):
            box = next((entry[key] for key in KEYS if key in entry), None)
            label = str(entry.get("label") or "")
        if _is_box(box):
            found.append(((float(box[0]), float(box[1]), float(box[2]), float(box[3])), label))
    return found


def _is_box(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 4
        and all(isinstance(x, (int, float)) and not isinstance(x, bool) and abs(x) < LARGEST for x in value)
    )


def in_source_pixels(boxes: Sequence[Box], size: Size, source_size: Size) -> list[Box]:
    """Boxes in the pixels of the image that the model saw (`size`), in those of the user's image (`source_size`)."""
    return [(to_source_pixels(box, size, source_size), label) for box, label in boxes]


def as_json(boxes: Sequence[Box]) -> list[dict[str, Any]]:
    """Boxes as {"bbox_2d", "label"}, in hundredths of a pixel."""
    return [{"bbox_2d": [round(x, 2) for x in box], "label": label} for box, label in boxes]


def iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two boxes x1, y1, x2, y2; corners may be in any order."""
    left, right = (_ordered(box) for box in (a, b))
    width = min(left[2], right[2]) - max(left[0], right[0])
    height = min(left[3], right[3]) - max(left[1], right[1])
    shared = max(width, 0.0) * max(height, 0.0)
    total = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (left, right)) - shared
    return shared / total if total > 0 and math.isfinite(total) else 0.0


def _ordered(box: Sequence[float]) -> tuple[float, float, float, float]:
    return min(box[0], box[2]), min(box[1], box[3]), max(box[0], box[2]), max(box[1], box[3])


def f1(found: Sequence[Box], truth: Sequence[Box], threshold: float = 0.5) -> float:
    """F1 of one-to-one matches with IoU of at least `threshold`, the largest IoU first.

    Labels are compared where both boxes have one, without regard to case and blanks. No box where there is none is 1.
    """
    if not found or not truth:
        return float(not found and not truth)
    overlap = np.array([[iou(a, b) if _same(la, lb) else -1.0 for b, lb in truth] for a, la in found])
    return 2.0 * len(greedy_matches(overlap, threshold)) / (len(found) + len(truth))


def _same(a: str, b: str) -> bool:
    names = [re.sub(r"[\s_]+", " ", label).strip().lower() for label in (a, b)]
    return names[0] == names[1] or not all(names)
