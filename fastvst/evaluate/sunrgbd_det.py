"""SUN RGB-D monocular 3D detection, AP@15 by the Omni3D protocol of VST's evaluator.

Two published files (rayruiyang/vst_3d_grounding_benchmark): ground truth `*metaqa*.json` (uid, image_path, width,
height, category, camera_intrinsics, answer: boxes of nine numbers with angles in degrees) and prompts
`*prompt*.json` (uid or id, image_path, question). One question names one category that is present in one image. The
evaluator treats each question as an image of its own. Predicted angles are fractions of 180 degrees. The two
ARKitScenes files of the same data set have the same format.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastvst import jsonl
from fastvst.data.sample import Sample
from fastvst.evaluate import checks, choice
from fastvst.evaluate.average_precision import (
    AT,
    Matches,
    Question,
    by_category,
    category_mean,
    match_ranges,
)
from fastvst.evaluate.files import Row, locate, read_json
from fastvst.evaluate.report import Published, Report, Score, align, paper, paper_source, reported, scored
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
INTRINSICS = ("fx", "fy", "cx", "cy")
LARGEST = 1e6  # metres; a predicted box with a larger number, or with NaN, has IoU 0
HEIGHT_LIMIT = 10.5  # ground truth whose projection is at least this many image heights tall is ignored
FACE_AREA = 1e-8  # square metres; a predicted box with a smaller face triangle has IoU 0


def load(path: str | Path) -> list[Row]:
    """Questions in the order of the ground-truth file. The result depends on the order.

    `path` is the folder or the ground-truth file. Without a prompt file the prompt is built from the intrinsics.

    Raises:
        FileNotFoundError, ValueError: a file is missing (the message says what to download and where to put it); a row
            has no boxes, or a box is not nine finite numbers; the two files have different uids.
    """
    truth = locate(path, TRUTH, DOWNLOAD)[0]
    table = read_json(truth, FIELDS, DOWNLOAD)
    prompts = _prompts(Path(path), truth)
    return checks.checked([_row(cell, truth, prompts, number) for number, cell in enumerate(table)], truth)


def _row(cell: dict[str, Any], truth: Path, prompts: Mapping[str, str] | None, number: int) -> Row:
    uid = checks.identifier(cell, "uid", truth, number)
    where = f"{truth}, uid {uid}"
    boxes = _boxes(cell["answer"], where)
    if prompts is not None and uid not in prompts:
        raise ValueError(f"{where}: the prompt file has no such uid; the two files are of different versions")
    try:
        intrinsics = {k: float(cell["camera_intrinsics"][k]) for k in INTRINSICS}
        width = int(cell["width"])
        height = int(cell["height"])
        if min(width, height) < 1 or not np.isfinite(list(intrinsics.values())).all():
            raise ValueError("a size below 1, or NaN")
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{where}: width, height or camera_intrinsics are not numbers ({error})") from error
    category = checks.text(cell, "category", where)
    asked = f"Detect the 3D bounding boxes of {category}"
    text = prompts[uid] if prompts is not None else detection_prompt(asked, width, height, **intrinsics)
    folder = truth.parent.parent if truth.parent.name == "annotations" else truth.parent
    path = checks.category(cell["image_path"])
    return Row(
        id=uid,
        question=checks.text({"question": text}, "question", where),
        answer=f"{len(boxes)} boxes",
        category=category,
        images=(folder / path,) if path else (),
        scene=path,
        fields={"boxes": boxes, "height": height, "intrinsics": intrinsics},
        unaskable="" if path else f"{where} has no image",
    )


def _boxes(value: Any, where: str) -> np.ndarray:
    """(N, 9) float64, N > 0. Raises ValueError for anything else."""
    if checks.is_missing(value):
        raise ValueError(f"{where} has no answer: a question names a category of which the image shows a box")
    try:
        boxes = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        boxes = np.zeros(0)
    if boxes.ndim != 2 or boxes.shape[1] != 9 or not np.isfinite(boxes).all():
        raise ValueError(f"{where}: answer {str(value)[:80]} is not a list of nine numbers each")
    return boxes


def _prompts(path: Path, truth: Path) -> dict[str, str] | None:
    """uid -> question of the prompt file; None if only the ground truth was given."""
    if path.is_file():
        return None
    file = locate(path, PROMPTS, DOWNLOAD)[0]
    prompts: dict[str, str] = {}
    for number, cell in enumerate(read_json(file, ["question"], DOWNLOAD)):
        key = next((k for k in ("question_id", "id", "uid") if not checks.is_missing(cell.get(k))), "uid")
        uid = checks.identifier(cell, key, file, number)
        if prompts.setdefault(uid, cell["question"]) != cell["question"]:
            raise ValueError(f"{file} has two different prompts with uid {uid!r}")
    return prompts


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

    A predicted size counts by its absolute value. Boxes with a face triangle of at most 1e-8 square metres have IoU 0,
    and so have boxes with NaN or with a number of 1e6 or more.
    """
    counts = [len(found) for found in predicted]
    every = np.concatenate([np.zeros((0, 9)), *predicted])
    every = np.where((np.abs(every) < LARGEST).all(1, keepdims=True), every, 0.0)
    x, y, z = every[:, 3:6].T
    every = np.concatenate([every[:, :3], np.abs(every[:, 3:6]), every[:, 6:]], axis=1)
    flat = np.minimum(np.minimum(np.abs(x * y), np.abs(y * z)), np.abs(x * z)) / 2 <= FACE_AREA
    ends = np.cumsum(counts).tolist()
    sets = [every[end - n : end] for n, end in zip(counts, ends, strict=True)]
    ious = iou_3d_sets(list(zip(sets, truth, strict=True)))
    for i in np.unique(np.searchsorted(ends, np.nonzero(flat)[0], side="right")):
        ious[i][flat[ends[i] - counts[i] : ends[i]]] = 0.0
    return ious


def vst_boxes(text: str) -> np.ndarray:
    """(N, 9) boxes of a reply, metres and degrees, as VST reads them (Yangr116/VST, vst/utils/box3d_utils.py).

    The JSON is the text between the first line that is exactly "```json" and the next "```"; without such a line it is
    the whole text. Entries whose `bbox_3d` is missing, or is not nine long, are dropped. Any other fault (broken JSON,
    an entry that is no object, a box of anything but numbers) leaves no box of the reply.
    """
    none = np.zeros((0, 9))
    lines = text.splitlines()
    if "```json" in lines:
        text = "\n".join(lines[lines.index("```json") + 1 :]).split("```")[0]
    try:
        entries = jsonl.loads(text)
        found = [entry.get("bbox_3d") for entry in entries]
        nine = [box for box in found if box is not None and len(box) == 9]
        boxes = np.array([[_number(x) for x in box] for box in nine], dtype=np.float64).reshape(-1, 9)
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        return none
    boxes[:, 6:9] *= 180
    return boxes


def _number(value: object) -> float:
    if isinstance(value, (int, float)):
        return float(value)
    raise TypeError(f"{type(value).__name__} in a box")


def lenient_boxes(text: str) -> np.ndarray:
    """(N, 9) boxes that `vst_boxes` reads, and those of four more forms.

    These are a fence with blanks around it, `<3dbbox>` tags, the good entries of a list that has a bad one, and the
    finite boxes of a list that has NaN or numbers of 1e6 or more.
    """
    found = parse_boxes(text)[0]
    return found if len(found) else vst_boxes(text)


# How boxes are read: VST's own reader (the paper's numbers), or a reader that forgives more.
EXTRACTIONS: dict[str, Callable[[str], np.ndarray]] = {"vst": vst_boxes, "lenient": lenient_boxes}


def _images(rows: Sequence[Row]) -> int:
    return len({row.scene or row.id for row in rows})


# The val split has 5,050 images. The number of questions is not published.
PUBLISHED = Published((4545,), "images", _images, at_least=True)


@reported(PUBLISHED)
def score(
    rows: Sequence[Row],
    predictions: Sequence[str | None],
    *,
    thinking: bool = False,
    failures: Mapping[str, str] | None = None,
    extraction: str = "vst",
) -> Report:
    """AP@15 as the mean over categories, and AP25, AP50, AP (mean of all thresholds), near, medium and far.

    An answer that cannot be parsed has no boxes. The score of a single question is the F1 of its boxes at IoU 0.15; it
    only sorts the error page. Intervals draw images with all of their questions.

    Raises:
        ValueError: an unknown `extraction`, or the number of predictions is not the number of rows.
    """
    read = choice.pick(NAME, EXTRACTIONS, extraction)
    texts, reasons = align(rows, predictions, failures)
    boxes = [
        read("" if r.id in reasons else choice.final_answer(t, thinking)) for r, t in zip(rows, texts, strict=True)
    ]
    truth = [row.fields["boxes"] for row in rows]
    ious = overlaps(boxes, truth)
    ignored = _ignored(rows, truth)
    questions = [
        Question(iou, np.nan_to_num(found[:, 2]), real[:, 2], skip)
        for iou, found, real, skip in zip(ious, boxes, truth, ignored, strict=True)
    ]
    members: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        members.setdefault(row.category, []).append(i)
    matches = match_ranges(questions)
    f1 = [_f1(m) for m in matches["all"]]
    lines = scored(rows, texts, [f"{len(found)} boxes" for found in boxes], f1, reasons)
    images = [row.scene or row.id for row in rows]
    drawn = len(set(images))
    whole = by_category(matches["all"], members, images)
    tables = {
        label: whole if found is matches["all"] else by_category(found, members, images)
        for label, found in matches.items()
    }
    if not whole:
        raise ValueError(f"{NAME}: no ground truth counts in these {len(rows)} questions; this is not the right file")
    others = [Score(f"AP{cut}", len(rows), category_mean(whole, drawn, k)) for cut, k in ((25, 4), (50, 9))]
    others.append(Score("AP (mean of IoU 0.05 to 0.50)", len(rows), category_mean(whole, drawn)))
    others += [
        Score(f"AP {label}", len(rows), category_mean(tables[label], drawn))
        for label in ("near", "medium", "far")
        if tables[label]
    ]
    return Report(
        benchmark=NAME,
        protocol="Omni3D evaluation as VST runs it: one image a question, score 1.0 for every box, AP at IoU 0.15 over "
        f"{len(whole)} categories, exact oriented IoU; {extraction} extraction"
        + (choice.THINKING_NOTE if thinking else ""),
        overall=Score("AP15", len(rows), category_mean(whole, drawn, AT), paper("sunrgbd", "AP15")),
        categories=tuple(_category(n, whole[n], [images[i] for i in members[n]]) for n in sorted(whole)),
        others=tuple(others),
        rows=lines,
        source=paper_source() + " (AP@15, Total3D version of the val split)",
    )


def _category(name: str, table: np.ndarray, images: Sequence[str]) -> Score:
    return Score(name, len(images), category_mean({name: table}, len(set(images)), AT))


def _f1(found: Matches) -> float:
    hits = int((found.hit[AT] & ~found.skipped[AT]).sum())
    total = int((~found.skipped[AT]).sum()) + found.positives
    return 2.0 * hits / total if total else 1.0
