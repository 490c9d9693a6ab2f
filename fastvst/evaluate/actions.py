"""Answers to questions about robot actions: share of right action tokens, and the error in metres and degrees.

Token accuracy alone misleads: a model may name 95 % of the tokens and never grasp an object
(https://github.com/openvla/openvla/issues/197). So the distance between the motion that is said and the demonstrated
one is reported next to it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from fastvst.data.sample import Sample
from fastvst.data.sources.action_rows import ActionRows
from fastvst.evaluate.files import Row
from fastvst.vla import ActionError

MOVES = 3  # values of a step that move the hand
TURNS = 3  # and that turn it, where a step has at least MOVES + TURNS + 1
SAME_GRIPPER = 0.5  # least difference of two gripper values that mean another command


def action_questions(samples: Sequence[Sample]) -> list[Row]:
    """Samples of a source of actions as rows of a benchmark."""
    rows = []
    for number, sample in enumerate(samples):
        kept = [message for message in sample.messages if message["role"] != "assistant"]
        asked = dataclasses.replace(sample, messages=kept)
        answer = next(m for m in sample.messages if m["role"] == "assistant")["content"][0]["text"]
        rows.append(Row(f"{number}/{sample.id}", "", answer, "action", fields={"sample": asked}))
    return rows


def max_new_tokens(actions: ActionRows) -> int:
    """Tokens of an answer with its end."""
    codec = actions.codec
    return codec.values * (1 if codec.kind == "tokens" else codec.width + 1) + 1


def token_accuracy(actions: ActionRows, rows: Sequence[Row], texts: Sequence[str | None]) -> float:
    """Share of the values that are those of the demonstration; all values of a malformed answer are wrong."""
    codec = actions.codec
    right = 0
    for row, text in zip(rows, texts, strict=True):
        try:
            right += int((codec.numbers(text or "") == codec.numbers(row.answer)).sum())
        except ActionError:
            continue
    return right / (codec.values * len(rows))


def errors(actions: ActionRows, rows: Sequence[Row], texts: Sequence[str | None]) -> dict[str, float]:
    """The mean errors of the steps of all well-formed answers.

    Returns:
        "well-formed" and "gripper right", shares; "position, m" and, where a step has rotations, "rotation, degrees":
        the mean Euclidean distances. Only "well-formed" where no answer is.
    """
    codec = actions.codec
    differences = []
    for row, text in zip(rows, texts, strict=True):
        try:
            differences.append(codec.decode(text or "") - codec.decode(row.answer))
        except ActionError:
            continue
    found = {"well-formed": len(differences) / len(rows)}
    if not differences:
        return found
    steps = np.concatenate(differences)
    right = float((np.abs(steps[:, -1]) < SAME_GRIPPER).mean())
    moved = np.linalg.norm(steps[:, : min(MOVES, codec.dims - 1)], axis=1) * actions.metres
    found |= {"gripper right": right, "position, m": float(moved.mean())}
    if codec.dims > MOVES + TURNS:
        turned = np.linalg.norm(steps[:, MOVES : MOVES + TURNS], axis=1) * actions.degrees
        found["rotation, degrees"] = float(turned.mean())
    return found


def score(
    actions: ActionRows, rows: Sequence[Row], texts: Sequence[str | None], failures: Mapping[str, str]
) -> tuple[float, dict[str, float]]:
    """(token accuracy, by group: none). A question without a text counts as wrong."""
    return token_accuracy(actions, rows, texts), {}
