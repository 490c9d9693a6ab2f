"""The reward of 3D boxes: exact oriented IoU of the best one-to-one assignment, and the format of the response."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from fastvst import jsonl
from fastvst.rl.rewards.matching import assign
from fastvst.spatial.boxes import iou_3d, parse_boxes

HIT_IOU = 0.25  # a matched pair with at least this IoU is a hit (VST's RL stage)


def score_boxes(text: str, answer: Any) -> tuple[float, float, str]:
    """(accuracy, format, reason) of a response without its thoughts; `answer` as in `verifiable.score`.

    The format is 1 if the fenced block is a JSON list with at least one entry, and every entry has a `label` and nine
    numbers in `bbox_3d`. Without boxes in the response or in the truth the accuracy is 0, as in VST.
    """
    entries = fenced_entries(text)
    format_reward = float(bool(entries) and all(_well_formed(entry) for entry in entries or ()))
    boxes, _ = parse_boxes(text)
    truth = true_boxes(answer)
    if not len(boxes):
        return 0.0, format_reward, "no boxes"
    if not len(truth):
        return 0.0, format_reward, "the truth has no boxes"
    return box_accuracy(boxes, truth), format_reward, "bbox3d" if format_reward else "bbox3d; format"


def fenced_entries(text: str) -> list[Any] | None:
    """The JSON list in the first block that starts with a line "```json"; None without a block or a list."""
    lines = text.split("\n")
    starts = [k for k, line in enumerate(lines) if line.strip() == "```json"]
    if not starts:
        return None
    try:
        entries = jsonl.loads("\n".join(lines[starts[0] + 1 :]).split("```")[0])
    except (ValueError, RecursionError):
        return None
    return entries if isinstance(entries, list) else None


def _well_formed(entry: Any) -> bool:
    return isinstance(entry, dict) and "label" in entry and _nine_numbers(entry.get("bbox_3d"))


def _nine_numbers(box: Any) -> bool:
    return (
        isinstance(box, (list, tuple))
        and len(box) == 9
        and all(isinstance(x, (int, float)) and not isinstance(x, bool) and abs(x) < 1e6 for x in box)
    )


def true_boxes(answer: Any) -> np.ndarray:
    """(N, 9) boxes in metres and degrees of a true answer in any of its forms; (0, 9) if it has no boxes.

    Angles in VST's texts and RL rows are in units of 180 degrees. They are in degrees if the unit of a `Sample.answer`
    says "degrees", or if any angle of the list is beyond 1.
    """
    value = answer.get("value") if isinstance(answer, dict) else answer
    if isinstance(value, str):
        entries = fenced_entries(value)
        value = fenced_entries(f"```json\n{value}\n```") if entries is None else entries
    rows = [e.get("bbox_3d") if isinstance(e, dict) else e for e in value] if isinstance(value, (list, tuple)) else []
    array = np.array([row for row in rows if _nine_numbers(row)], dtype=np.float64).reshape(-1, 9)
    degrees = isinstance(answer, dict) and "degree" in str(answer.get("unit", ""))
    if not degrees and not (np.abs(array[:, 6:]) > 1).any():
        array[:, 6:] *= 180
    return array


def box_accuracy(boxes: Any, truth: Any) -> float:
    """0.5 mean IoU + 0.5 F1 of boxes (N, 9) against true boxes (M, 9), in metres and degrees; neither may be empty.

    Boxes are paired by the assignment with the largest sum of IoUs; labels are ignored. The mean IoU is the sum over
    pairs / M. A pair counts as a hit of F1 if its IoU is at least HIT_IOU.
    """
    iou = iou_3d(boxes, truth)
    matched = np.array([iou[i, j] for i, j in assign(-iou)])
    hits = float((matched >= HIT_IOU).sum())
    f1 = 2 * hits / (len(boxes) + len(truth))
    result = 0.5 * float(matched.sum()) / len(truth) + 0.5 * f1
    return result if math.isfinite(result) else 0.0
