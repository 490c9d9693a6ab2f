"""CheckReport: what `fastvst data check` found in a data set, as text and as JSON."""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fastvst.data.sample import Sample

MOST_LISTED = 10_000  # problems that are kept with their ids; all are counted
ACCEPTED = (
    "double_marks",
    "literal_mark",
    "duplicate_id",
    "angle_range",
    "behind_camera",
    "box_size",
    "bad_boxes",
    "no_thought",
    "empty_answer",
    "unread_media",
)


@dataclass(frozen=True)
class Problem:
    """One problem of one row: its reason code, the row's id and location, and the details."""

    reason: str
    id: str
    where: str
    detail: str


@dataclass
class CheckReport:
    """What `check_source` found.

    Attributes:
        path: the data set.
        name: its name in ids and errors.
        rows: number of rows read, good and bad.
        usable: number of rows that the loader accepts.
        prompts: number of rows without a turn that is learnt; supervised training learns nothing from them.
        types: number of rows by VST's `type`.
        sources: number of rows by `data_source`.
        sizes: number of images by stored (width, height); a video counts with its first frame.
        images, videos: number of images and videos in usable rows.
        tokens: tokens of every usable row.
        vision_tokens: merged patches in all usable rows.
        letters: number of correct answers of multiple-choice rows, by number of options and letter.
        problems: the first 10,000 problems.
        counts: number of all problems, by reason.
        examples: the first usable rows of every type, for a page.
        lines: what the source says about its files: what is read, and what is not.
        ignored: number of rows by key that nothing reads.
        ignored_first: the first row with each of these keys.
        changed: number of rows by what was changed in them: the rules of docs/data.md and docs/images_and_video.md.
        changed_first: the first row of each, with the details.
    """

    path: str
    name: str = ""
    rows: int = 0
    usable: int = 0
    prompts: int = 0
    types: Counter = field(default_factory=Counter)
    sources: Counter = field(default_factory=Counter)
    sizes: Counter = field(default_factory=Counter)
    images: int = 0
    videos: int = 0
    tokens: list[int] = field(default_factory=list)
    vision_tokens: int = 0
    letters: dict[int, Counter] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    counts: Counter = field(default_factory=Counter)
    examples: dict[str, list[Sample]] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    ignored: Counter = field(default_factory=Counter)
    ignored_first: dict[str, str] = field(default_factory=dict)
    changed: Counter = field(default_factory=Counter)
    changed_first: dict[str, str] = field(default_factory=dict)

    def add(self, reason: str, id: str, where: str, detail: str) -> None:
        """Count one problem, and keep it if there are not too many."""
        self.counts[reason] += 1
        if len(self.problems) < MOST_LISTED:
            self.problems.append(Problem(reason, id, where, detail))

    def change(self, code: str, id: str, where: str, detail: str = "") -> None:
        """Count one change of a row, and keep the first of each code."""
        self.changed[code] += 1
        self.changed_first.setdefault(code, f"{id} at {where}" + (f": {detail}" if detail else ""))

    @property
    def vision_share(self) -> float:
        """Share of vision tokens among all tokens."""
        return self.vision_tokens / max(sum(self.tokens), 1)

    def balance(self) -> dict[int, float]:
        """Balance of the answer letters for each number of options.

        It is the chi-square of the letters against a uniform distribution, divided by its degrees of freedom. About 1
        is balanced; VST's release (36 / 36 / 14 / 14 %) has 0.19 x rows / 3.
        """
        found = {}
        for count, letters in sorted(self.letters.items()):
            seen = np.array([letters["ABCDEF"[k]] for k in range(count)], dtype=np.float64)
            even = seen.sum() / count
            found[count] = float(((seen - even) ** 2 / even).sum() / (count - 1)) if count > 1 and even > 0 else 0.0
        return found

    def table(self) -> str:
        """The report as text."""
        tokens = np.array(self.tokens or [0])
        lines = [
            f"{self.path}: {self.rows} rows, {self.usable} usable, {self.images} images, {self.videos} videos",
            "types: " + ", ".join(f"{name} {count}" for name, count in self.types.most_common()),
            "sources: " + ", ".join(f"{name} {count}" for name, count in self.sources.most_common(12)),
            "sizes: " + ", ".join(f"{w}x{h} {count}" for (w, h), count in self.sizes.most_common(8)),
            f"tokens: {int(tokens.sum())} in all; a row has {tokens.mean():.0f} on average, "
            f"{np.percentile(tokens, 95):.0f} at the 95th percentile, {tokens.max()} at most; "
            f"{self.vision_share:.1%} are vision tokens",
        ]
        for count, skew in self.balance().items():
            letters = self.letters[count]
            total = sum(letters.values())
            shares = ", ".join(f"{k} {letters[k] / total:.1%}" for k in "ABCDEF"[:count])
            lines.append(f"letters of {total} questions with {count} options: {shares} (chi-square / df {skew:.1f})")
        lines += self.lines
        if self.prompts:
            lines.append(f"prompts: {self.prompts} rows have no answer; supervised training learns nothing from them")
        lines += [
            f"ignored: {key} in {count} rows, e.g. {self.ignored_first[key]}"
            for key, count in self.ignored.most_common()
        ]
        lines += [
            f"changed: {code} in {count} rows, e.g. {self.changed_first[code][:200]}"
            for code, count in self.changed.most_common()
        ]
        if not self.counts:
            return "\n".join([*lines, "no problems"])
        lines.append(f"problems: {sum(self.counts.values())}")
        refused = sum(count for reason, count in self.counts.items() if reason not in ACCEPTED)
        lines[-1] += f", of which {refused} would be rejected"
        for reason, count in self.counts.most_common():
            first = [p for p in self.problems if p.reason == reason][:3]
            kind = "accepted, but probably wrong" if reason in ACCEPTED else "rejected"
            lines.append(f"  {count:>8}  {reason} ({kind})")
            lines += [f"            {p.id} at {p.where}: {p.detail[:160]}" for p in first]
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """All numbers and all listed problems; JSON-able."""
        return {
            "path": self.path,
            "rows": self.rows,
            "usable": self.usable,
            "prompts": self.prompts,
            "types": dict(self.types),
            "sources": dict(self.sources),
            "sizes": {f"{w}x{h}": count for (w, h), count in self.sizes.items()},
            "pictures": self.images,
            "videos": self.videos,
            "tokens": int(sum(self.tokens)),
            "vision_share": self.vision_share,
            "letters": {str(count): dict(letters) for count, letters in self.letters.items()},
            "balance": {str(count): skew for count, skew in self.balance().items()},
            "files": self.lines,
            "ignored": dict(self.ignored),
            "changed": dict(self.changed),
            "changed_first": dict(self.changed_first),
            "counts": dict(self.counts),
            "problems": [dataclasses.asdict(p) for p in self.problems],
        }
