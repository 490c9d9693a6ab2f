"""Simulators of robots, each in a process of its own: reset, steps, images, success.

A `Simulator` starts children/serve.py with a program (Meta-World, LIBERO, or a file of the user) in the Python that the
settings name, which may be another environment. Requests and replies are JSON headers and raw bytes over pipes, see
serve.py. Every request has a deadline. A simulator that hangs, dies, or sends what it must not send raises a
`SimulatorError` with a code; its process is killed, and the next `reset` starts a new one. When this process ends, by
SIGKILL also, nothing of the simulators is left (see supervisor.py).

Requests can be sent without waiting, so that one thread drives many simulators: `begin_step` each, then `wait_any`. The
thread that starts a simulator must outlive it: the kernel ends the process when that thread ends.
"""

from __future__ import annotations

import json
import select
import shutil
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fastvst.processes import plain_environment, resource_limits
from fastvst.vla.replies import (
    Description,
    Observation,
    SimulatorError,
    read_arrays,
    read_description,
    read_observation,
)
from fastvst.vla.simulator_process import SimulatorProcess

CHILDREN = Path(__file__).parent / "children"
PROGRAMS = {"metaworld": "metaworld_environment.py", "libero": "libero_environment.py"}
EXTRAS = {"metaworld": "vla", "libero": "libero"}
# One thread each: many simulators share the cores. EGL needs no display.
VARIABLES = {"MUJOCO_GL": "egl", "PYOPENGL_PLATFORM": "egl", "LP_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
LAST_BRIGHT_MUJOCO = (3, 3, 2)  # newer ones darken LIBERO's images


@dataclass(frozen=True)
class SimulatorConfig:
    """How a simulator is started.

    Attributes:
        program: "metaworld", "libero", or a Python file with a class `Environment` like that of
            children/metaworld_environment.py.
        environment: arguments of `Environment`, e.g. {"task": "reach", "size": 128}.
        python: interpreter of the environment in which the simulator is installed; it needs numpy, not fastvst.
        variables: environment variables of the process on top of VARIABLES, e.g. {"MUJOCO_GL": "osmesa"} or
            {"MUJOCO_EGL_DEVICE_ID": "1"}. Of those of this process it has PATH, HOME and the like, and no secret.
        memory_gib: limit of the address space; 0: none. A GPU's driver reserves tens of GiB of it.
        start_seconds, reset_seconds, step_seconds: limits of a start, of a reset, and of one step. A GPU-less machine
            needs 18 s to start LIBERO and 16 s to reset it.
    """

    program: str
    environment: Mapping[str, Any] = field(default_factory=dict)
    python: str = sys.executable
    variables: Mapping[str, str] = field(default_factory=dict)
    memory_gib: float = 0.0
    start_seconds: float = 600.0
    reset_seconds: float = 600.0
    step_seconds: float = 120.0

    @property
    def path(self) -> Path:
        """The file of the program."""
        return CHILDREN / PROGRAMS[self.program] if self.program in PROGRAMS else Path(self.program)


class Simulator:
    """One environment in a process.

    Attributes:
        config: how it is started.
        starts: processes that were started so far.
    """

    def __init__(self, config: SimulatorConfig) -> None:
        """The process starts with the first reset.

        Raises:
            FileNotFoundError: no such program or interpreter.
        """
        if shutil.which(config.python) is None:
            raise FileNotFoundError(f"no Python {config.python!r} to run the simulator with")
        if not config.path.is_file():
            raise FileNotFoundError(f"no simulator {config.program!r}: expected {', '.join(PROGRAMS)} or a Python file")
        self.config = config
        self.starts = 0
        self._description: Description | None = None
        self._process: SimulatorProcess | None = None
        self._awaited: deque[tuple[int, float]] = deque()  # (id of a reply, seconds that it may take)
        self._deadline = 0.0
        self._number = 0

    def __enter__(self) -> Simulator:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def description(self) -> Description:
        """Known after the first observation."""
        if self._description is None:
            raise ValueError("the simulator has not started; reset it first")
        return self._description

    @property
    def versions(self) -> dict[str, str]:
        """Versions of the simulator; empty before it has started."""
        return {} if self._description is None else dict(self._description.versions)

    @property
    def deadline(self) -> float:
        """time.monotonic() at which the awaited reply is late."""
        return self._deadline

    @property
    def busy(self) -> bool:
        """Whether a reply is awaited."""
        return bool(self._awaited)

    def reset(self, seed: int = 0, initial: int = 0) -> Observation:
        """Start an episode; the same seed and initial state give the same observation.

        Args:
            seed: of the simulator.
            initial: number of the stored initial state, for simulators that have them.

        Raises:
            SimulatorError: see there.
        """
        self.begin_reset(seed, initial)
        return self.wait()

    def step(self, actions: np.ndarray) -> Observation:
        """Take the steps of a chunk (steps, action_dims) until one reaches the goal, and observe."""
        self.begin_step(actions)
        return self.wait()

    def expert(self, noise: np.ndarray | None = None) -> Observation:
        """Take the expert's step with `noise` (action_dims,) added; the observation's `action` is without it."""
        self.begin_expert(noise)
        return self.wait()

    def begin_reset(self, seed: int = 0, initial: int = 0) -> None:
        """`reset` without waiting."""
        if self._process is None:
            self._start()
        self._request({"call": "reset", "seed": int(seed), "initial": int(initial)}, b"", self.config.reset_seconds)

    def begin_step(self, actions: np.ndarray) -> None:
        """`step` without waiting.

        Raises:
            ValueError: actions of another shape, or not finite: the policy's fault, not the simulator's.
        """
        values = np.ascontiguousarray(actions, "<f8")
        dims = self.description.action_dims
        if values.ndim != 2 or not len(values) or values.shape[1] != dims:
            raise ValueError(f"actions have the shape {values.shape}; expected (steps, {dims}) with at least one step")
        self._send("step", "actions", values, len(values) * self.config.step_seconds)

    def begin_expert(self, noise: np.ndarray | None = None) -> None:
        """`expert` without waiting.

        Raises:
            ValueError: the simulator has no expert, or noise of another shape, or not finite.
        """
        dims = self.description.action_dims
        if not self.description.expert:
            raise ValueError(f"{self.config.program} has no expert for the task of {dict(self.config.environment)}")
        values = np.zeros(dims) if noise is None else np.ascontiguousarray(noise, "<f8")
        if values.shape != (dims,):
            raise ValueError(f"noise has the shape {values.shape}; expected ({dims},)")
        self._send("expert", "noise", values, self.config.step_seconds)

    def wait(self) -> Observation:
        """The reply to what was begun."""
        while (found := self.poll()) is None:
            wait_any([self])
        return found

    def poll(self) -> Observation | None:
        """The reply to what was begun, if it is there.

        Raises:
            SimulatorError: see there; the process is gone then.
        """
        if self._process is None or not self._awaited:
            raise ValueError("nothing was asked of the simulator")
        try:
            while (received := self._process.receive()) is not None:
                if (found := self._take(*received)) is not None:
                    return found
            if time.monotonic() > self._deadline:
                raise SimulatorError("hang", f"no reply within {self._awaited[0][1]:g} s{self._process.tail()}")
        except BaseException:
            self.close()
            raise
        return None

    def fileno(self) -> int:
        """Descriptor that is readable when `poll` has something to do."""
        if self._process is None:
            raise ValueError("the simulator has no process; reset it first")
        return self._process.fileno()

    def close(self) -> None:
        """Kill the process and all that it started. A later `reset` starts a new one."""
        if self._process is not None:
            self._process.end()
        self._process = None
        self._awaited.clear()

    def _start(self) -> None:
        limits = resource_limits(self.config.memory_gib)
        settings = json.dumps({"environment": dict(self.config.environment), "limits": limits})
        program = str(self.config.path.resolve())
        command = [self.config.python, str(CHILDREN / "serve.py"), program, settings]
        self._process = SimulatorProcess(command, self._variables())
        self.starts += 1
        self._number = 0
        self._await(0, self.config.start_seconds)

    def _variables(self) -> dict[str, str]:
        variables = {**plain_environment(), **VARIABLES}
        if self.config.python != sys.executable:  # the paths of this Python are wrong for another
            variables = {name: value for name, value in variables.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
        return {**variables, **self.config.variables}

    def _await(self, number: int, seconds: float) -> None:
        if not self._awaited:
            self._deadline = time.monotonic() + seconds
        self._awaited.append((number, seconds))

    def _send(self, call: str, name: str, values: np.ndarray, seconds: float) -> None:
        if not np.isfinite(values).all():
            raise ValueError(f"{name} have the value {values[~np.isfinite(values)][0]}")
        header = {"call": call, "arrays": [[name, "<f8", list(values.shape)]]}
        self._request(header, values.tobytes(), seconds)

    def _request(self, header: dict[str, Any], body: bytes, seconds: float) -> None:
        if self._process is None:
            raise ValueError("the simulator has no episode: its process ended; reset it first")
        if any(number for number, _ in self._awaited):
            raise ValueError("the simulator is busy; take its reply first")
        text = json.dumps({"id": self._number + 1, "arrays": [], **header}).encode()
        self._process.send(text, body)
        self._number += 1
        self._await(self._number, seconds)

    def _take(self, header: dict[str, Any], body: bytes) -> Observation | None:
        """Use a reply: the description, an error, or the observation."""
        if not self._awaited:
            raise SimulatorError("protocol", "a reply to nothing")
        number, _ = self._awaited.popleft()
        if header.get("id") != number:
            raise SimulatorError("protocol", f"a reply to request {header.get('id')!r}; expected {number}")
        if self._awaited:
            self._deadline = time.monotonic() + self._awaited[0][1]
        if "error" in header:
            raise _error_of(str(header["error"]).strip(), number, self.config.program)
        if number == 0:
            self._description = read_description(header)
            return None
        return read_observation(header, read_arrays(header, body), self.description)


def _error_of(text: str, number: int, program: str) -> SimulatorError:
    """The exception whose traceback a simulator has sent in reply to request `number`; 0 is its start."""
    last = text.rpartition("\n")[2]
    hint = ""
    if last.startswith("ModuleNotFoundError") and program in EXTRAS:
        hint = f". Install it (pip install 'fastvst[{EXTRAS[program]}]'), or name the Python that has it"
    return SimulatorError("raised" if number else "start", f"{last}{hint}\n{text}")


def wait_any(simulators: Sequence[Simulator]) -> list[Simulator]:
    """Wait until `poll` of one of these has something to do, and return those.

    Args:
        simulators: at least one, all with a reply awaited.
    """
    waiter = select.poll()
    by_number = {one.fileno(): one for one in simulators}
    for number in by_number:
        waiter.register(number, select.POLLIN)
    first = min(one.deadline for one in simulators)
    ready = [by_number[number] for number, _ in waiter.poll(max(0.0, first - time.monotonic()) * 1000 + 1)]
    now = time.monotonic()
    return ready or [one for one in simulators if one.deadline < now]


def mujoco_note(versions: Mapping[str, str]) -> str:
    """A warning if LIBERO's images are darker than those that published policies were trained on; "" otherwise."""
    version = versions.get("mujoco", "")
    numbers = tuple(int(word) for word in version.split(".")[:3] if word.isdigit())
    if "libero" not in versions or numbers <= LAST_BRIGHT_MUJOCO:
        return ""
    limit = ".".join(map(str, LAST_BRIGHT_MUJOCO))
    return (
        f"MuJoCo {version} darkens LIBERO's images: published scores are of {limit} or older; install mujoco=={limit}"
    )
