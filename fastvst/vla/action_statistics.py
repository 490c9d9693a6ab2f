"""The range of every dimension of a data set's actions, and the files in which it is published.

Two forms are published for LIBERO. OpenVLA's `dataset_statistics.json` (arXiv 2406.09246) names a data set, then
`action`, and its `mask` is false for the gripper, which keeps its own values. openpi's `norm_stats.json` has
`norm_stats`, then `actions`, and no mask: all dimensions are normalised. Both hold the quantiles 1 % and 99 %.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastvst import jsonl

EPSILON = 1e-6  # added to a range, as VST and openpi do: a dimension that never moves has the range 0
MAX_FILE = 1 << 26  # bytes
KEYS = ("action", "actions")


@dataclass(frozen=True)
class ActionStatistics:
    """Ranges of actions; `normalise` maps [q01, q99] to [-1, 1].

    Attributes:
        q01, q99: quantiles 1 % and 99 % of every dimension, in the units of the action.
        mask: which dimensions are normalised. The others are passed on as they are.
    """

    q01: tuple[float, ...]
    q99: tuple[float, ...]
    mask: tuple[bool, ...]

    def __post_init__(self) -> None:
        if not len(self.q01) == len(self.q99) == len(self.mask) > 0:
            raise ValueError(f"q01, q99 and mask have {len(self.q01)}, {len(self.q99)} and {len(self.mask)} values")
        for dim, (low, high) in enumerate(zip(self.q01, self.q99, strict=True)):
            if not (math.isfinite(low) and math.isfinite(high) and low <= high):
                raise ValueError(f"dimension {dim} has q01 = {low} and q99 = {high}; expected q01 <= q99, both finite")

    @property
    def dims(self) -> int:
        """Number of dimensions."""
        return len(self.q01)

    @classmethod
    def of(cls, actions: np.ndarray, mask: Sequence[bool] | None = None) -> ActionStatistics:
        """Statistics of recorded actions.

        Args:
            actions: (steps, dims), in the units of the robot.
            mask: dimensions to normalise; None: all.
        """
        values = np.asarray(actions, np.float64)
        if values.ndim != 2 or not values.size or not np.isfinite(values).all():
            raise ValueError(f"actions have the shape {values.shape}; expected finite values of shape (steps, dims)")
        low, high = np.quantile(values, [0.01, 0.99], axis=0)
        kept = [True] * values.shape[1] if mask is None else [bool(one) for one in mask]
        return cls(tuple(low.tolist()), tuple(high.tolist()), tuple(kept))

    @classmethod
    def load(cls, path: str | Path, data_set: str | None = None) -> ActionStatistics:
        """Read a published statistics file of either form, or one of `save`.

        Args:
            data_set: which data set of a file that names several, e.g. "libero_spatial_no_noops".

        Raises:
            ValueError: no such data set, several without a choice, or values that are no ranges.
        """
        path = Path(path)
        if path.stat().st_size > MAX_FILE:
            raise ValueError(f"{path} has {path.stat().st_size} bytes; a statistics file has less than {MAX_FILE}")
        try:
            content = jsonl.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not JSON: {error}") from error
        found = _data_sets(content)
        if data_set is None and len(found) != 1:
            raise ValueError(f"{path} has the statistics of {sorted(found) or 'no data set'}; name one of them")
        name = next(iter(found)) if data_set is None else data_set
        if name not in found:
            raise ValueError(f"{path} has no data set {name!r}; it has {sorted(found)}")
        try:
            return _read(found[name])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: the statistics of {name or 'the actions'} cannot be read: {error!r}") from error

    def save(self, path: str | Path) -> None:
        """Write a file that `load` reads, in OpenVLA's form without the name of a data set."""
        Path(path).write_text(json.dumps({"action": asdict(self)}, indent=1))

    def normalise(self, actions: np.ndarray) -> np.ndarray:
        """2 (a - q01) / (q99 - q01 + 1e-6) - 1 in the masked dimensions; (..., dims) float64. Nothing is clipped."""
        low, high, mask = self._arrays(actions)
        return np.where(mask, 2 * (actions - low) / (high - low + EPSILON) - 1, actions)

    def denormalise(self, actions: np.ndarray) -> np.ndarray:
        """The inverse of `normalise`; (..., dims) float64."""
        low, high, mask = self._arrays(actions)
        return np.where(mask, (actions + 1) / 2 * (high - low + EPSILON) + low, actions)

    def _arrays(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        if np.shape(actions)[-1:] != (self.dims,):
            raise ValueError(f"actions have the shape {np.shape(actions)}; the statistics have {self.dims} dimensions")
        return np.asarray(self.q01), np.asarray(self.q99), np.asarray(self.mask)


def _data_sets(content: Any) -> dict[str, Mapping[str, Any]]:
    """Data set -> statistics of its actions; "" for a file of one data set without a name."""
    if not isinstance(content, dict):
        return {}
    content = content.get("norm_stats", content)
    if not isinstance(content, dict):
        return {}
    for key in KEYS:
        if isinstance(content.get(key), dict):
            return {"": content[key]}
    named = {name: value for name, value in content.items() if isinstance(value, dict)}
    return {name: value[key] for name, value in named.items() for key in KEYS if isinstance(value.get(key), dict)}


def _read(values: Mapping[str, Any]) -> ActionStatistics:
    q01 = [float(value) for value in values["q01"]]
    q99 = [float(value) for value in values["q99"]]
    mask = values.get("mask")
    if mask is not None and not all(isinstance(one, bool) for one in mask):
        raise TypeError(f"mask is {mask!r}; expected true and false")
    return ActionStatistics(tuple(q01), tuple(q99), (True,) * len(q01) if mask is None else tuple(mask))
