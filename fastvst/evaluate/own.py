"""One's own questions: rows in any format that training reads, scored by the strict reading (docs/answers.md)."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastvst import jsonl
from fastvst.data.chat import THINK_SYSTEM
from fastvst.data.mixture import SourceConfig, open_configured
from fastvst.data.sample import Sample
from fastvst.evaluate import boxes_2d
from fastvst.evaluate.answers import score as strict
from fastvst.evaluate.answers import stated_number, texts_of
from fastvst.evaluate.choice import THINKING_NOTE, final_answer
from fastvst.evaluate.files import Row, is_file
from fastvst.evaluate.options import stated_letter
from fastvst.evaluate.quantities import whole_quantity
from fastvst.evaluate.report import Report, align, by_category, clusters_of, mean_score, reported, scored
from fastvst.evaluate.units import UNITS

if TYPE_CHECKING:
    from fastvst.data.processor import Processor

TASKS = ("choice", "number", "text", "boxes")
BOX_IOU = 0.5
PROTOCOLS = {
    "choice": "the letter or the text of the option, strict reading; accuracy",
    "number": "the stated number in the unit of the truth, within its tolerance (exact without one), strict reading; "
    "accuracy",
    "text": "the same text, letter, number or JSON, strict reading; accuracy",
    "boxes": f"F1 of one-to-one matches, labels compared: 2D boxes in the pixels of the user's image with IoU of at "
    f"least {BOX_IOU}, 3D boxes with oriented IoU of at least 0.15",
}


@dataclass(frozen=True)
class OwnQuestions:
    """A data set of one's own as a benchmark.

    Attributes:
        source: the rows.
        task: one of TASKS.
        processor: tells the size at which the model saw an image; its 2D boxes are in these pixels. None: boxes are in
            the pixels of the user's image already.
    """

    source: SourceConfig
    task: str
    processor: Processor | None = None

    MAX_NEW_TOKENS = 1024
    DOWNLOAD = "Paths of images are relative to the file that names them."

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ValueError(f"--task is {self.task!r}; expected one of {', '.join(TASKS)}")

    @property
    def NAME(self) -> str:  # noqa: N802 - the name that every benchmark has
        return Path(self.source.path).stem

    @property
    def PROCESSOR(self) -> dict[str, Any]:  # noqa: N802
        """The limits of the checkpoint: a set of one's own has none."""
        return {}

    def load(self, path: str | Path) -> list[Row]:
        """The rows of a file or folder. A row that cannot be asked says why; equal ids are numbered.

        Raises:
            ValueError, FileNotFoundError: as `open_source`; no row can be asked.
        """
        source = open_configured(dataclasses.replace(self.source, path=str(path)))
        rows: list[Row] = []
        seen: Counter[str] = Counter()
        for raw, sample in itertools.chain.from_iterable(source.pairs(b) for b in range(len(source.blocks))):
            where = f"row {len(rows)}"
            try:
                row = self._row(raw, sample, where)
            except Exception as error:  # a row of an unexpected structure
                reason = f"{where}: {type(error).__name__}: {error}"
                row = Row(where, "", "", "", unaskable=reason, fields={"task": self.task})
            seen[row.id] += 1
            rows.append(row if seen[row.id] == 1 else dataclasses.replace(row, id=f"{row.id}#{seen[row.id]}"))
        if any(row.images or row.video for row in rows):  # among questions about images, one without is a mistake
            blind = [row.askable and not (row.images or row.video) for row in rows]
            rows = [
                dataclasses.replace(row, unaskable=f"{row.id} has no image") if lost else row
                for row, lost in zip(rows, blind, strict=True)
            ]
        if not any(row.askable for row in rows):
            raise ValueError(f"{path}: no row can be asked; the first: {rows[0].unaskable}")
        return rows

    def _row(self, raw: Any, sample: Any, where: str) -> Row:
        category = raw.get("category") if isinstance(raw, dict) else None
        category = category if isinstance(category, str) else ""
        if not isinstance(sample, Sample):
            return Row(where, "", "", category, unaskable=str(sample), fields={"task": self.task})
        images = tuple(m for p in sample.parts("image") if (m := _media(p["image"])) is not None)
        video = next((m for p in sample.parts("video") if isinstance(m := _media(p["video"]), Path)), None)
        asked = [m for m in sample.messages if m["role"] == "user"]
        text = " ".join(p["text"] for p in asked[-1]["content"] if p["type"] == "text") if asked else ""
        answer, problem = self._truth(sample)
        missing = [m for m in (*images, video) if isinstance(m, Path) and not is_file(m)]
        if missing:
            problem = f"missing_image: {missing[0]}"
        if sample.messages[-1:] and sample.messages[-1]["role"] == "assistant":
            sample = dataclasses.replace(sample, messages=sample.messages[:-1])
        if not asked:
            problem = "the row has no question"
        shown = _shown(answer)
        fields = {"task": self.task, "answer": answer, "sample": sample}
        reason = f"{sample.id}: {problem}" if problem else ""
        return Row(sample.id, text, shown, category, images, video, fields=fields, unaskable=reason)

    def _truth(self, sample: Sample) -> tuple[dict[str, Any], str]:
        """(the checkable answer, or why there is none)."""
        answer = dict(sample.answer or {})
        if answer.get("value") is None and sample.messages[-1]["role"] == "assistant":
            said = " ".join(p["text"] for p in sample.messages[-1]["content"] if p["type"] == "text")
            answer = {"type": "text", "value": said.rsplit("</think>", 1)[-1].strip()}
        value = answer.get("value")
        if value is None or value in ("", []) and self.task != "boxes":
            return {}, "the row has no answer"
        if self.task == "boxes":
            return _true_boxes(value)
        if self.task == "number":
            found = whole_quantity(texts_of(value)[0])
            if found is None or found.low != found.high:
                return {}, f"the answer {value!r:.80} is no number"
            unit = answer.get("unit") or next((name for name, unit in UNITS.items() if unit == found.unit), None)
            number = value if answer.get("unit") else found.low
            return {**answer, "type": "number", "value": number, "unit": unit}, ""
        known = answer.get("type") == "choice" and {"letter", "candidates"} <= set(answer)
        return (answer if known and self.task == "choice" else {"type": self.task, "value": value}), ""

    def prompt(self, row: Row, *, thinking: bool = False) -> Sample:
        """The row's own conversation up to its last question; with `thinking`, after VST's thinking system prompt."""
        sample: Sample = row.fields["sample"]
        if not thinking:
            return sample
        system = {"role": "system", "content": [{"type": "text", "text": THINK_SYSTEM}]}
        kept = [m for m in sample.messages if m["role"] != "system"]
        return dataclasses.replace(sample, messages=[system, *kept])

    def score(
        self,
        rows: Sequence[Row],
        predictions: Sequence[str | None],
        *,
        thinking: bool = False,
        failures: Mapping[str, str] | None = None,
    ) -> Report:
        """The mean score of all rows; a row that could not be asked or answered counts as wrong and is named."""

        @reported(None)
        def judged(rows: Sequence[Row], predictions: Sequence[str | None]) -> Report:
            texts, reasons = align(rows, predictions, failures)
            found = [self._judge(row, text) for row, text in zip(rows, texts, strict=True)]
            lines = scored(rows, texts, [read for read, _ in found], [points for _, points in found], reasons)
            clusters = clusters_of(rows)
            return Report(
                benchmark=self.NAME,
                protocol=PROTOCOLS[self.task] + (THINKING_NOTE if thinking else ""),
                overall=mean_score("overall", lines, clusters),
                categories=by_category(lines, clusters),
                others=(),
                rows=lines,
                source="not reported",
            )

        return judged(rows, predictions)

    def _judge(self, row: Row, text: str) -> tuple[str, float]:
        """(what was read, the score) of one prediction."""
        answer = row.fields.get("answer")
        if not answer or not text:
            return "", 0.0
        final = final_answer(text, True)
        if answer["type"] == "boxes_2d":
            found = self._boxes(row, final)
            points = boxes_2d.f1(found, boxes_2d.of_entries(answer["value"]), BOX_IOU)
            return json.dumps(boxes_2d.as_json(found), ensure_ascii=False), points
        points = strict(final, answer)
        if self.task == "number":
            ends = stated_number(final, answer.get("unit"))
            return "" if ends is None else " to ".join(f"{end:g}" for end in dict.fromkeys(ends)), points
        letter = stated_letter(final) if self.task == "choice" else None
        return letter[0] if letter else final[:200], points

    def _boxes(self, row: Row, text: str) -> list[boxes_2d.Box]:
        """The 2D boxes of an answer, in the pixels of the user's last image."""
        from fastvst.data.images import MediaError
        from fastvst.data.vision_inputs import measure_vision_inputs

        found = boxes_2d.boxes_2d(text)
        if self.processor is None or not found or not row.images:
            return found
        messages = row.fields["sample"].messages
        try:
            inputs = measure_vision_inputs(messages, self.processor.config, self.processor.geometry)
        except MediaError:
            return []
        last = [one for one in inputs if one.frames is None][-1]
        return boxes_2d.in_source_pixels(found, last.size, last.source_size)


def _media(media: Any) -> bytes | Path | None:
    """A file or encoded bytes; None for frames and images in memory, which the page does not show."""
    if isinstance(media, (str, Path)):
        return Path(media)
    return bytes(media) if isinstance(media, (bytes, bytearray)) else None


def _shown(answer: Mapping[str, Any]) -> str:
    """The truth as text."""
    if not answer:
        return ""
    value = answer["value"]
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return f"{text} {answer['unit']}" if answer.get("unit") else text


def _true_boxes(value: Any) -> tuple[dict[str, Any], str]:
    """Boxes from a list, an object or their JSON: 3D if the entries have "bbox_3d", else 2D."""
    if isinstance(value, str):
        try:
            value = jsonl.loads(value)
        except (ValueError, RecursionError):
            return {}, f"the answer {value!r:.80} is no JSON of boxes"
    entries = value if isinstance(value, list) else [value]
    if entries and all(isinstance(one, dict) and "bbox_3d" in one for one in entries):
        solid = all(isinstance(one["bbox_3d"], list) and len(one["bbox_3d"]) == 9 for one in entries)
        labelled = [{**one, "label": str(one.get("label") or "")} for one in entries]
        return ({"type": "boxes", "value": labelled}, "") if solid else ({}, "a bbox_3d without nine numbers")
    found = boxes_2d.of_entries(value)
    if len(found) != (1 if boxes_2d.of_entries([value]) else len(entries)):
        return {}, f"the answer {value!r:.80} is no list of boxes"
    return {"type": "boxes_2d", "value": boxes_2d.as_json(found)}, ""
