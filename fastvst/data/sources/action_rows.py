"""Rows of robot demonstrations -> questions, as VST asks them: "What action should the robot take to {task}?".

    VST's Parquet   id, images, meta_info {action (normalised), action_unnorm, language_instruction}: one step a row
    LIBERO's HDF5   data/demo_0/{actions, obs/agentview_rgb, obs/robot_states}; see hdf5_files.py
    LeRobot         data/*.parquet with images as bytes, or videos/**/*.mp4, and meta/; see lerobot_files.py

A source becomes one of actions by its key `actions`, a table of `ActionRows`. The answer is the text of `ActionCodec`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np

from fastvst import jsonl
from fastvst.config import check_at_least, check_positive
from fastvst.vla import ActionCodec, ActionError, ActionStatistics

QUESTION = "What action should the robot take to {task}?"
STATE = "\nThe robot's state is {values}."
KIND = "action"  # of the samples
SPARE = 1e-3  # by which an action without statistics may leave [-1, 1]


@dataclass(frozen=True)
class ActionRows:
    """How demonstrations are asked and answered.

    Attributes:
        kind: "tokens" (VST, OpenVLA) or "text" (integers, VLA-0), see `ActionCodec`.
        bins: edges of the bins of a value, or the largest integer.
        dims: values of a step.
        chunk: steps in an answer, 1 to 16. After the end of a demonstration its last action is repeated. VST's Parquet
            has one step in a row.
        statistics: file with the ranges of the actions; "" = the actions are in [-1, 1] as they are. The actions of
            VST's Parquet are normalised; with statistics its `action_unnorm` is read.
        data_set: which data set of a statistics file that names several.
        cameras: names of one or two cameras, in the order of the images: data sets of `obs` in HDF5 (default:
            agentview_rgb), features of LeRobot (default: the first that is an image or a video). VST's rows show all
            their images.
        state: write the robot's state into the question: HDF5's robot_states, LeRobot's observation.state.
        side: pixels of each side at which HDF5's images are shown, LIBERO's protocol: 256.
        augment: share of the samples whose images are cropped and recoloured in training; VST: 0.5.
        metres, degrees: how far a value of 1 moves and turns the hand, for the errors of an evaluation; LIBERO's
            controller by 0.05 m and half a radian.
        grow: where the model's vocabulary has no free rows for the tokens of "tokens", append rows to its embedding and
            its LM head. Otherwise that is an error: the trained model is then of another shape than the published one.
    """

    kind: Literal["tokens", "text"] = "tokens"
    bins: int = 256
    dims: int = 7
    chunk: int = 1
    statistics: str = ""
    data_set: str = ""
    cameras: tuple[str, ...] = ()
    state: bool = False
    side: int = 256
    augment: float = 0.0
    metres: float = 0.05
    degrees: float = 28.65
    grow: bool = False

    def __post_init__(self) -> None:
        check_at_least(1, dims=self.dims, chunk=self.chunk, side=self.side)
        check_positive(metres=self.metres, degrees=self.degrees)
        ActionCodec(self.kind, self.bins, self.dims, self.chunk)  # raises for what makes no codec
        if not 0 <= self.augment <= 1:
            raise ValueError(f"augment is {self.augment}; expected a share from 0 to 1")
        if len(set(self.cameras)) != len(self.cameras) or len(self.cameras) > 2:
            raise ValueError(f"cameras is {list(self.cameras)}; expected the names of one or two cameras")

    @property
    def codec(self) -> ActionCodec:
        """The codec of the answers.

        Raises:
            FileNotFoundError, ValueError: `statistics` cannot be read.
        """
        return _codec(self)


@lru_cache(maxsize=64)
def _codec(rows: ActionRows) -> ActionCodec:
    ranges = ActionStatistics.load(rows.statistics, rows.data_set or None) if rows.statistics else None
    return ActionCodec(rows.kind, rows.bins, rows.dims, rows.chunk, ranges)


@dataclass(frozen=True)
class Step:
    """One step of a demonstration.

    Attributes:
        id: name of the step.
        images: encoded bytes or images of Pillow, in the order of the cameras.
        task: what the robot is told.
        actions: (n >= 1, dims): this action and those that follow it, to the end of the demonstration or the chunk.
        state: (values,) of the robot; None: not recorded.
        side: pixels of each side to which the images are resized; None: they keep their size.
    """

    id: str
    images: list[Any]
    task: str
    actions: np.ndarray
    state: np.ndarray | None = None
    side: int | None = None


def question_row(step: Step, rows: ActionRows) -> dict[str, Any]:
    """A step as a row of the form `question`.

    Raises:
        ActionError: an action that cannot be written: "shape", "not_finite", "out_of_range".
        ValueError: no image, no task, or no state where the question names it.
    """
    if not step.images:
        raise ValueError("the step has no image")
    if not step.task.strip():
        raise ValueError("the step has no instruction")
    if step.actions.ndim != 2 or step.actions.shape[1] != rows.dims:
        raise ActionError("shape", f"the step has actions of {step.actions.shape[1:]} values; dims is {rows.dims}")
    chunk = step.actions[: rows.chunk]
    if len(chunk) < rows.chunk:
        chunk = np.concatenate([chunk, np.repeat(chunk[-1:], rows.chunk - len(chunk), axis=0)])
    codec = rows.codec
    if codec.statistics is None and np.abs(chunk).max() > 1 + SPARE:
        raise ActionError(
            "out_of_range",
            f"an action has the value {chunk.flat[np.abs(chunk).argmax()]:.4g}, outside of [-1, 1]; give the "
            "`statistics` of the data set",
        )
    asked = question(step.task, step.state, rows)
    row = {"id": step.id, "type": KIND, "images": step.images, "question": asked, "answer": codec.encode(chunk)}
    if step.side is not None:
        row["meta_info"] = [{"resized_width": step.side, "resized_height": step.side}] * len(step.images)
    return row


def question(task: str, state: np.ndarray | None, rows: ActionRows) -> str:
    """The text of the question. Raises ValueError if it should name a state that is not there or not finite."""
    asked = QUESTION.format(task=task.strip().rstrip(".").lower())
    if not rows.state:
        return asked
    if state is None or not np.isfinite(state).all():
        raise ValueError("the step has no finite state of the robot; leave out `state` of `actions`")
    return asked + STATE.format(values=" ".join(f"{value:.3f}" for value in state))


def vst_step(row: dict[str, Any], where: str, rows: ActionRows) -> Step:
    """The step of a row of VST's Parquet.

    Raises:
        ValueError: no such row, or more than one step is asked of it.
    """
    info = row.get("meta_info")
    try:
        info = jsonl.loads(info) if isinstance(info, (str, bytes)) else info
    except (ValueError, RecursionError) as error:
        raise ValueError(f"meta_info is not JSON: {error}") from error
    key = "action_unnorm" if rows.statistics else "action"
    if not isinstance(info, dict) or key not in info or not isinstance(info.get("language_instruction"), str):
        raise ValueError(f"meta_info has no {key!r} or no 'language_instruction'; expected a row of VST's action data")
    try:
        action = np.asarray(info[key], np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{key} is not a list of numbers: {error}") from error
    if action.ndim != 1:
        raise ValueError(f"{key} has the shape {action.shape}; expected one list of numbers")
    if rows.chunk > 1:
        raise ValueError(f"the row holds one step; chunk is {rows.chunk}. Read HDF5 or LeRobot data for chunks")
    images = row.get("images") if isinstance(row.get("images"), list) else [row.get("images")]
    return Step(
        str(row.get("id") or where), [one for one in images or [] if one], info["language_instruction"], action[None]
    )
