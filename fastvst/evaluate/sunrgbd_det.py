"""SUN RGB-D monocular 3D detection, AP@15 by the Omni3D protocol of VST's evaluator.

Two published files (rayruiyang/vst_3d_grounding_benchmark): ground truth `*metaqa*.json` (uid, image_path, width,
height, category, camera_intrinsics, answer: boxes of nine numbers with angles in degrees) and prompts
`*prompt*.json` (uid or id, image_path, question). One question names one category that is present in one image. The
evaluator treats each question as an image of its own. Predicted angles are fractions of 180 degrees. The two
ARKitScenes files of the same data set have the same format.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from fastvst.data.sample import Sample
from fastvst.evaluate import choice
from fastvst.evaluate.average_precision import (
    Matches,
    Question,
    average_precision,
    match_ranges,
    pool,
    resampled,
)
from fastvst.evaluate.files import Row, check_unique, locate, read_json
from fastvst.evaluate.report import Report, Score, align, paper, paper_source, scored
from fastvst.evaluate.statistics import Interval
from fastvst.spatial.boxes import corners, iou_3d_sets, parse_boxes
from fastvst.spatial.prompts import detection_prompt

NAME = "SUN RGB-D 3D detection"
DOWNLOAD = (
    "Download the ground truth (*metaqa*.json) and the prompts (*prompt*.json) of the data set "
    "rayruiyang/vst_3d_grounding_benchmark into one folder, put the images below it at the paths that the files "
    "name, and pass that folder as the data path."
)
TRUTH = ("*metaqa*.json", "annotations/*metaqa*.json")
PROMPTS = ("*prompt*.json", "annotations/*prompt*.json")
FIELDS = ("uid", "image_path", "width", "height", "category", "camera_intrinsics", "answer")
MAX_NEW_TOKENS = 1024
PROCESSOR = {"enable_fov": True, "fov_base_width": 960.0}
HEIGHT_LIMIT = 10.5  # ground truth whose projection is at least this many image heights tall is ignored
FACE_AREA = 1e-8  # square metres; a predicted box with a smaller face triangle has IoU 0
AT = 2  # index of IoU 0.15 in THRESHOLDS
DRAWS = 200  # draws of the bootstrap; each one evaluates every category


def load(path: str | Path) -> list[Row]:
    """Questions in the order of the ground-truth file. The result depends on the order.

    `path` is the folder or the ground-truth file. Without a prompt file the prompt is built from the intrinsics.

    Raises:
        FileNotFoundError, ValueError: a file is missing (the message says what to download and where to put it); a box
            is not nine numbers; the two files have different uids.
    """
    truth = locate(path, TRUTH, DOWNLOAD)[0]
    table = read_json(truth, FIELDS, DOWNLOAD)
    folder = truth.parent.parent if truth.parent.name == "annotations" else truth.parent
    prompts = _prompts(Path(path), truth)
    rows = []
    for cell in table:
        uid = str(cell["uid"])
        boxes = np.asarray(cell["answer"], dtype=np.float64).reshape(-1, 9) if _is_boxes(cell["answer"]) else None
        if boxes is None:
            raise ValueError(
                f"{truth}, uid {uid}: answer {str(cell['answer'])[:80]} is not a list of nine numbers each"
            )
        if prompts is not None and uid not in prompts:
            raise ValueError(
                f"{truth}, uid {uid}: the prompt file has no such uid; the two files are of different versions"
            )
        intrinsics = {k: float(cell["camera_intrinsics"][k]) for k in ("fx", "fy", "cx", "cy")}
        width = int(cell["width"])
        height = int(cell["height"])
        question = f"Detect the 3D bounding boxes of {cell['category']}"
        text = prompts[uid] if prompts is not None else detection_prompt(question, width, height, **intrinsics)
        rows.append(
            Row(
                id=uid,
                question=text,
                answer=f"{len(boxes)} boxes",
                category=str(cell["category"]),
                images=(folder / cell["image_path"],),
                scene=str(cell["image_path"]),
                fields={"boxes": boxes, "height": height, "intrinsics": intrinsics},
            )
        )
    return check_unique(rows, truth)


def _is_boxes(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(box, list) and len(box) == 9 for box in value)


def _prompts(path: Path, truth: Path) -> dict[str, str] | None:
    """uid -> question of the prompt file; None if only the ground truth was given."""
    if path.is_file():
        return None
    table = read_json(locate(path, PROMPTS, DOWNLOAD)[0], ["question"], DOWNLOAD)
    return {str(cell.get("question_id") or cell.get("id") or cell.get("uid")): cell["question"] for cell in table}


def prompt(row: Row, *, thinking: bool = False) -> Sample:
    """Image and the stored prompt.

    The kind "bbox_3d" makes the processor unify the field of view (960 px, 69.16 degrees). VST evaluates detection
    without thinking; with `thinking` the text after `</think>` is the answer.
    """
    return choice.sample(row, row.question, source=NAME, thinking=thinking, kind="bbox_3d")


def is_ignored(boxes: np.ndarray, fy: np.ndarray | float, cy: np.ndarray | float, height: np.ndarray | float):
    """(G,) bool: ground truth with a size <= 0, or whose eight projected corners span >= 10.5 image heights.

    As in VST's evaluator, corners behind the camera are projected like any other.

    Args:
        boxes: (G, 9) metres and degrees.
        fy, cy, height: pixels, (G,) or numbers.
    """
    points = corners(boxes)
    fy, cy, height = (np.broadcast_to(x, len(boxes)) for x in (fy, cy, height))
    with np.errstate(divide="ignore", invalid="ignore"):
        rows = fy[:, None] * points[..., 1] / points[..., 2] + cy[:, None]
    tall = np.ptp(rows, axis=1) >= HEIGHT_LIMIT * height if len(boxes) else np.zeros(0, dtype=bool)
    return (boxes[:, 3:6] <= 0).any(1) | tall


def _ignored(rows: Sequence[Row], truth: Sequence[np.ndarray]) -> list[np.ndarray]:
    """`is_ignored` of every question; all boxes are computed together."""
    counts = [len(boxes) for boxes in truth]
    camera = [(r.fields["intrinsics"]["fy"], r.fields["intrinsics"]["cy"], r.fields["height"]) for r in rows]
    every = np.concatenate([np.zeros((0, 9)), *truth])
    values = np.repeat(np.array(camera, dtype=np.float64).reshape(-1, 3), counts, axis=0)
    return np.split(is_ignored(every, *values.T), np.cumsum(counts)[:-1]) if rows else []


def overlaps(predicted: Sequence[np.ndarray], truth: Sequence[np.ndarray]) -> list[np.ndarray]:
    """(D, G) exact IoU of every question.

    A predicted size counts by its absolute value. Boxes with a face triangle of at most 1e-8 square metres have IoU 0.
    """
    counts = [len(found) for found in predicted]
    every = np.concatenate([np.zeros((0, 9)), *predicted])
    x, y, z = every[:, 3:6].T
    every = np.concatenate([every[:, :3], np.abs(every[:, 3:6]), every[:, 6:]], axis=1)
    flat = np.minimum(np.minimum(np.abs(x * y), np.abs(y * z)), np.abs(x * z)) / 2 <= FACE_AREA
    ends = np.cumsum(counts).tolist()
    sets = [every[end - n : end] for n, end in zip(counts, ends, strict=True)]
    ious = iou_3d_sets(list(zip(sets, truth, strict=True)))
    for i in np.unique(np.searchsorted(ends, np.nonzero(flat)[0], side="right")):
        ious[i][flat[ends[i] - counts[i] : ends[i]]] = 0.0
    return ious


def score(
    rows: Sequence[Row],
    predictions: Sequence[str | None],
    *,
    thinking: bool = False,
    failures: Mapping[str, str] | None = None,
) -> Report:
    """AP@15 as the mean over categories, and AP25, AP50, AP (mean of all thresholds), near, medium and far.

    An answer that cannot be parsed has no boxes. The score of a single question is the F1 of its boxes at IoU 0.15; it
    only sorts the error page. Intervals draw images with all of their questions.
    """
    texts, reasons = align(rows, predictions, failures)
    boxes = [
        parse_boxes("" if r.id in reasons else choice.final_answer(t, thinking))[0]
        for r, t in zip(rows, texts, strict=True)
    ]
    truth = [row.fields["boxes"] for row in rows]
    ious = overlaps(boxes, truth)
    ignored = _ignored(rows, truth)
    questions = [
        Question(iou, found[:, 2], real[:, 2], skip)
        for iou, found, real, skip in zip(ious, boxes, truth, ignored, strict=True)
    ]
    members: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        members.setdefault(row.category, []).append(i)
    matches = match_ranges(questions)
    f1 = [_f1(m) for m in matches["all"]]
    lines = scored(rows, texts, [f"{len(found)} boxes" for found in boxes], f1, reasons)
    images = [row.scene for row in rows]
    whole = _table(matches["all"], members, images)
    tables = {
        label: whole if found is matches["all"] else _table(found, members, images) for label, found in matches.items()
    }
    if not whole:
        raise ValueError(f"{NAME}: no ground truth counts in these {len(rows)} questions; this is not the right file")
    others = [Score(f"AP{cut}", len(rows), _mean(whole, k)) for cut, k in ((25, 4), (50, 9))]
    others.append(Score("AP (mean of IoU 0.05 to 0.50)", len(rows), _mean(whole)))
    others += [
        Score(f"AP {label}", len(rows), _mean(tables[label])) for label in ("near", "medium", "far") if tables[label]
    ]
    return Report(
        benchmark=NAME,
        protocol="Omni3D evaluation as VST runs it: one image a question, score 1.0 for every box, AP at IoU 0.15 over "
        f"{len(whole)} categories, exact oriented IoU" + (choice.THINKING_NOTE if thinking else ""),
        overall=Score("AP15", len(rows), _mean(whole, AT), paper("sunrgbd", "AP15")),
        categories=tuple(Score(n, len(members[n]), _mean({n: whole[n]}, AT)) for n in sorted(whole)),
        others=tuple(others),
        rows=lines,
        source=paper_source() + " (AP@15, Total3D version of the val split)",
    )


def _f1(found: Matches) -> float:
    hits = int((found.hit[AT] & ~found.skipped[AT]).sum())
    total = int((~found.skipped[AT]).sum()) + found.positives
    return 2.0 * hits / total if total else 1.0


def _table(
    matches: Sequence[Matches], members: Mapping[str, Sequence[int]], images: Sequence[str], seed: int = 0
) -> dict[str, np.ndarray]:
    """Category -> (1 + DRAWS, T) average precision: of the data, then of each bootstrap draw of whole images.

    The order is kept. A draw without ground truth gives nan. Categories without ground truth are left out.
    """
    names, inverse = np.unique(images, return_inverse=True)
    rng = np.random.default_rng(seed)
    times = np.stack([np.bincount(rng.integers(0, len(names), len(names)), minlength=len(names)) for _ in range(DRAWS)])
    table = {}
    for name, chosen in members.items():
        category = pool([matches[i] for i in chosen])
        value = average_precision(category)
        if value is not None:
            table[name] = np.concatenate([value[None], resampled(category, times[:, inverse[list(chosen)]])])
    return table


def _mean(table: Mapping[str, np.ndarray], threshold: int | None = None) -> Interval:
    """Mean over categories at one threshold, or at all, with its percentile interval."""
    values = np.stack(list(table.values()))
    values = values.mean(-1) if threshold is None else values[..., threshold]
    present = ~np.isnan(values)
    means = np.where(present, values, 0.0).sum(0) / np.maximum(present.sum(0), 1)
    low, high = np.percentile(means[1:][present[:, 1:].any(0)], [2.5, 97.5])
    return Interval(float(means[0]), float(low), float(high))
