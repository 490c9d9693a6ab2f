"""What a simulator sends: its messages are checked before anything is made of them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

HEADER_BYTES = 1 << 20  # longest header of a reply
ARRAY_BYTES = 1 << 28  # largest sum of the arrays of a reply: 16 images of 2,048 x 2,048 are 201 MB
DTYPES = ("|u1", "<f8")
MAX_DIMENSIONS = 3
BLACK = 8  # an image whose brightest and darkest values differ by no more shows nothing


class SimulatorError(RuntimeError):
    """A simulator failed; its process is gone. `code` says how.

    Codes: "start" (it could not be made), "hang" (no reply within the time), "died" (the process ended), "raised" (an
    exception of the simulator), "protocol" (the reply is no message of serve.py), "not_finite" (NaN or infinity in the
    proprioception), "black_image" (an image of one colour).
    """

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(f"{code}: {detail}")
        self.code = code


@dataclass(frozen=True)
class Description:
    """What a simulator says about itself.

    Attributes:
        action_dims: values of an action.
        proprioception: name -> values, in the order of `Observation.proprioception`.
        versions: of the simulator, of MuJoCo, of numpy.
        initial_states: number of stored initial states; None if the state follows from the seed alone.
        expert: whether `expert` works.
    """

    action_dims: int
    proprioception: Mapping[str, int]
    versions: Mapping[str, str]
    initial_states: int | None
    expert: bool


@dataclass(frozen=True)
class Observation:
    """The state after a reset or after steps.

    Attributes:
        images: camera -> (height, width, 3) uint8, upright.
        proprioception: (n,) float64.
        state: (m,) float64, the simulator's own state.
        instruction: the task in words.
        success: whether the last step reached the goal; the steps after it were not taken.
        steps: steps taken since the last observation.
        action: (action_dims,) what the expert did, after `expert`.
    """

    images: Mapping[str, np.ndarray]
    proprioception: np.ndarray
    state: np.ndarray
    instruction: str
    success: bool
    steps: int
    action: np.ndarray | None = None


def read_header(text: bytes) -> dict[str, Any]:
    """The header of a reply."""
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SimulatorError("protocol", f"the header is not JSON: {str(error)[:200]}") from error
    if not isinstance(header, dict):
        raise SimulatorError("protocol", f"the header is a {type(header).__name__}")
    return header


def read_arrays(header: Mapping[str, Any], body: bytes) -> dict[str, np.ndarray]:
    """The arrays of a reply; number types and sizes are checked before anything is made of them."""
    found: dict[str, np.ndarray] = {}
    at = 0
    listed = header.get("arrays")
    for entry in listed if isinstance(listed, list) else [listed]:
        name, kind, shape = entry if isinstance(entry, list) and len(entry) == 3 else ("", "", [])
        if not isinstance(name, str) or name in found or kind not in DTYPES or not _is_shape(shape):
            raise SimulatorError("protocol", f"an array is described as {str(entry)[:200]}")
        count = int(math.prod(shape))
        size = count * np.dtype(kind).itemsize
        if at + size > len(body):
            raise SimulatorError("protocol", f"the array {name[:80]!r} of shape {shape} is longer than the reply")
        found[name] = np.frombuffer(body, kind, count, at).reshape(shape)
        at += size
    if at != len(body):
        raise SimulatorError("protocol", f"the arrays have {at} bytes of {len(body)}")
    return found


def _is_shape(shape: Any) -> bool:
    sized = isinstance(shape, list) and 0 < len(shape) <= MAX_DIMENSIONS
    return sized and all(type(n) is int and 0 <= n <= ARRAY_BYTES for n in shape)


def read_description(header: Mapping[str, Any]) -> Description:
    """The first reply."""
    dims = header.get("action_dims")
    parts = header.get("proprioception")
    versions = header.get("versions")
    initial = header.get("initial_states")
    if (
        type(dims) is not int
        or not 1 <= dims <= 64
        or not isinstance(parts, dict)
        or not all(type(n) is int and n > 0 for n in parts.values())
        or not isinstance(versions, dict)
        or not (initial is None or type(initial) is int)
    ):
        raise SimulatorError("protocol", f"the description is {json.dumps(header)[:400]}")
    words = {str(name): str(version) for name, version in versions.items()}
    return Description(dims, parts, words, initial, header.get("expert") is True)


def read_observation(header: Mapping[str, Any], arrays: dict[str, np.ndarray], known: Description) -> Observation:
    """Every other reply."""
    images = {name[len("image:") :]: array for name, array in arrays.items() if name.startswith("image:")}
    proprioception = arrays.get("proprioception")
    steps = header.get("steps")
    action = arrays.get("action")
    expected = sum(known.proprioception.values())
    if proprioception is None or proprioception.shape != (expected,) or "state" not in arrays or not images:
        shapes = {name: array.shape for name, array in arrays.items()}
        raise SimulatorError("protocol", f"an observation has {shapes}; expected images, {expected} values, a state")
    if type(steps) is not int or type(header.get("success")) is not bool or type(header.get("instruction")) is not str:
        raise SimulatorError("protocol", f"an observation has the header {json.dumps(header)[:400]}")
    if action is not None and action.shape != (known.action_dims,):
        raise SimulatorError("protocol", f"the expert's action has the shape {action.shape}")
    for name, image in images.items():
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise SimulatorError("protocol", f"the image {name[:80]!r} has the shape {image.shape} of {image.dtype}")
        if int(image.max()) - int(image.min()) <= BLACK:
            raise SimulatorError(
                "black_image", f"the image {name[:80]!r} shows nothing: all values are near {image.max()}"
            )
    for name, array in {**arrays, "proprioception": proprioception}.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise SimulatorError("not_finite", f"{name[:80]} has the value {array[~np.isfinite(array)][0]}")
    return Observation(images, proprioception, arrays["state"], header["instruction"], header["success"], steps, action)
