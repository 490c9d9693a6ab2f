"""Multiple choice by the rules of VLMEvalKit: the prompt for Qwen2.5-VL, and the letter in a free answer.

The paper (arXiv 2511.05491) ran CV-Bench, BLINK, 3DSRBench, RealWorldQA, MMStar, MMBench, MMMU and AI2D this way.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from fastvst.data.chat import THINK_SYSTEM
from fastvst.data.sample import Sample
from fastvst.evaluate.checks import checked, with_answer_in
from fastvst.evaluate.files import Row, locate
from fastvst.evaluate.report import (
    Published,
    Report,
    Scored,
    align,
    by_category,
    clusters_of,
    mean_score,
    paper,
    paper_source,
    reported,
    scored,
)
from fastvst.evaluate.tsv import load_rows

Way = TypeVar("Way")
INSTRUCTION = "Please select the correct answer from the options above."
INSTRUCTION_CHINESE = "请直接回答选项字母。"
PUNCTUATION = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
# Refusals of some served models. VLMEvalKit reads them as the answer Z, which is always wrong.
REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
API_FAILURE = "Failed to obtain answer via API"
LAST_TOKENS = 5  # a lone letter counts if it starts in the last five tokens
# Settings of the paper for these suites: answer length, and pixels of one image.
MAX_NEW_TOKENS = 2048
THINKING_NOTE = "; thinking mode: the text after </think> is scored"
# As in VLMEvalKit, the images of one question share no budget; a question above 65,536 tokens fails.
PIXELS = {"min_pixels": 1280 * 28 * 28, "max_pixels": 16384 * 28 * 28, "share_pixels": False, "max_seq_len": 65536}


def question_text(row: Row, *, chinese: bool = True) -> str:
    """Hint, question, options and instruction, in the format of VLMEvalKit's Qwen2-VL wrapper.

    Args:
        chinese: a text with a Chinese character gets the instruction in Chinese (_build_mcq_prompt of VLMEvalKit).
    """
    lines = [f"Hint: {row.fields['hint']}"] if row.fields.get("hint") else []
    lines.append(f"Question: {row.question}")
    if row.options:
        lines += ["Options:", *(f"{letter}. {text}" for letter, text in row.options.items())]
        is_chinese = chinese and re.search(r"[\u4e00-\u9fff]", "\n".join(lines))
        lines.append(INSTRUCTION_CHINESE if is_chinese else INSTRUCTION)
    return "\n".join(lines).rstrip()


def sample(row: Row, text: str, *, source: str, thinking: bool = False, kind: str = "qa", **video: Any) -> Sample:
    """One user turn of images, then text; with `thinking`, after VST's thinking system prompt.

    Args:
        kind: the Sample's kind ("bbox_3d" enables the field-of-view conversion).
        video: keys of the video part (`fps`), if the row has a video.
    """
    parts: list[dict[str, Any]] = [{"type": "image", "image": image} for image in row.images]
    if row.video is not None:
        parts.append({"type": "video", "video": row.video, **video})
    return wrap(row, [*parts, {"type": "text", "text": text}], source=source, thinking=thinking, kind=kind)


def wrap(row: Row, parts: Sequence[dict[str, Any]], *, source: str, thinking: bool = False, kind: str = "qa") -> Sample:
    """One user turn of content parts in any order."""
    messages: list[dict[str, Any]] = [{"role": "user", "content": list(parts)}]
    if thinking:
        messages.insert(0, {"role": "system", "content": THINK_SYSTEM})
    return Sample.from_messages(messages, id=row.id, source=source, kind=kind, metadata={"category": row.category})


def final_answer(prediction: str, thinking: bool) -> str:
    """The scored text, stripped: with `thinking` the part after the last `</think>` (everything if there is none)."""
    return prediction.rsplit("</think>", 1)[-1].strip() if thinking else prediction


def infer(answer: str, options: Mapping[str, str]) -> str:
    """The chosen letter by VLMEvalKit's rules, "Z" for a refusal, "" if no rule applies.

    1. Punctuation becomes blanks. If exactly one option letter is a token of its own and is among the last five tokens,
       it is the answer.
    2. Otherwise, if exactly one option's text occurs in the answer (lower case), and the answer is at most twice as
       long as all options together, that option is the answer.

    VLMEvalKit (can_infer) then asks a language model if one is configured; this function does not.
    """
    letter = _lone_letter(answer, options)
    return letter if letter else _option_text(answer, options)


def _lone_letter(answer: str, options: Mapping[str, str]) -> str:
    if API_FAILURE in answer:
        return ""
    if any(refusal in answer for refusal in REFUSALS):
        return "Z"
    tokens = answer.translate(PUNCTUATION).split()
    present = [letter for letter in options if letter in tokens]
    if len(present) == 1 and tokens.index(present[0]) > len(tokens) - LAST_TOKENS:
        return present[0]
    return "Z" if not present and "Z" in tokens else ""


def _option_text(answer: str, options: Mapping[str, str]) -> str:
    if len(answer.lower()) > 2 * sum(len(text) for text in options.values()):
        return ""
    lowered = answer.lower()
    found = [letter for letter, text in options.items() if text.lower() in lowered]
    return found[0] if len(found) == 1 else ""


def bare(letter: str) -> str:
    """ "(A)", " A" and "A." -> "A"; CV-Bench and BLINK write "(A)"."""
    return letter.strip().rstrip(".").strip("()").strip()


def lettered(texts: Sequence[str]) -> dict[str, str]:
    """Options without letters -> {"A": ..., "B": ...}."""
    return {chr(ord("A") + i): str(text) for i, text in enumerate(texts)}


def read(path: str | Path, names: Sequence[str], required: Sequence[str], download: str) -> list[Row]:
    """Rows of the TSV at `path`: the file itself, or the first of `names` in the folder.

    A row whose answer is none of its options is marked as unscorable.
    """
    file = locate(path, names, download)[0]
    rows = load_rows(file, ["answer", *required], download)
    return checked([with_option_answer(row, file) for row in rows], file)


def with_option_answer(row: Row, file: Path) -> Row:
    """The row; marked as unscorable if its answer is not the letter of one of its options."""
    return with_answer_in(row, list(row.options), bare(row.answer), f"{file}, row {row.id}")


def score(
    rows: Sequence[Row],
    predictions: Sequence[str | None],
    *,
    benchmark: str,
    column: str,
    thinking: bool = False,
    failures: Mapping[str, str] | None = None,
    extract: Callable[[str, Row], str] | None = None,
    protocol: str = "letter by VLMEvalKit's rules (no language model), accuracy over all questions",
    order: Sequence[str] = (),
    published: int | None = None,
) -> Report:
    """Accuracy of a multiple-choice benchmark: all questions, and each category.

    Args:
        column: column of the paper's main table; "" if the paper does not report the benchmark.
        extract: function from an answer to its letter (default: `infer` with the row's options).
        published: number of questions of the paper's score.
    """

    @reported(Published((published,)) if published else None)
    def accuracy(rows: Sequence[Row], predictions: Sequence[str | None]) -> Report:
        lines = judge(rows, predictions, thinking=thinking, failures=failures, extract=extract)
        clusters = clusters_of(rows)
        return Report(
            benchmark=benchmark,
            protocol=protocol + (THINKING_NOTE if thinking else ""),
            overall=mean_score("overall", lines, clusters, paper("main", column) if column else None),
            categories=by_category(lines, clusters, order=order),
            others=(),
            rows=lines,
            source=paper_source() if column else "not reported",
        )

    return accuracy(rows, predictions)


@dataclass(frozen=True)
class ChoiceSet:
    """A multiple-choice benchmark in VLMEvalKit's TSV without rules of its own.

    Attributes:
        name: name of the benchmark, and of its column in the paper's main table.
        file: the TSV as published by VLMEvalKit.
        questions: number of questions of the published file.
        required: columns that the file must have, besides the usual ones.
    """

    name: str
    file: str
    questions: int
    required: tuple[str, ...] = ()

    @property
    def download(self) -> str:
        """What to download, for error messages."""
        source = f"{self.file} (VLMEvalKit's copy of {self.name})"
        return f"Download {source} and pass the file or its folder as the data path."

    def load(self, path: str | Path) -> list[Row]:
        """Rows of the TSV, or of the folder that holds it. Errors name the file to download."""
        return read(path, (self.file,), self.required, self.download)

    def prompt(self, row: Row, *, thinking: bool = False) -> Sample:
        """Image, question, options and the instruction of VLMEvalKit's Qwen2-VL prompt."""
        return sample(row, question_text(row), source=self.name, thinking=thinking)

    def score(
        self,
        rows: Sequence[Row],
        predictions: Sequence[str | None],
        *,
        thinking: bool = False,
        failures: Mapping[str, str] | None = None,
    ) -> Report:
        """Accuracy, as VLMEvalKit reports it."""
        return score(
            rows,
            predictions,
            benchmark=self.name,
            column=self.name,
            thinking=thinking,
            failures=failures,
            published=self.questions,
        )


def pick(benchmark: str, extractions: Mapping[str, Way], name: str) -> Way:
    """The extraction rule of this name. Raises ValueError for an unknown name."""
    if name not in extractions:
        raise ValueError(f"{benchmark}: extraction is {name!r}; expected one of {', '.join(extractions)}")
    return extractions[name]


def judge(
    rows: Sequence[Row],
    predictions: Sequence[str | None],
    *,
    thinking: bool = False,
    failures: Mapping[str, str] | None = None,
    extract: Callable[[str, Row], str] | None = None,
) -> tuple[Scored, ...]:
    """One `Scored` per row: score 1 if the extracted letter is the right one."""
    texts, reasons = align(rows, predictions, failures)
    read_letter = extract or (lambda text, row: infer(text, row.options))
    letters = [read_letter(final_answer(text, thinking), row) for text, row in zip(texts, rows, strict=True)]
    hits = [letter == bare(row.answer) for letter, row in zip(letters, rows, strict=True)]
    return scored(rows, texts, letters, hits, reasons)
