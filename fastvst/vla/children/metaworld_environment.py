"""Meta-World (arXiv 1910.10897) for serve.py: one task of its fifty, with the scripted expert that comes with it.

The initial state follows from the seed alone. Images are upright: the "corner" cameras hang upside down, so their
images are turned by 180 degrees.
"""

from __future__ import annotations

import importlib.metadata
import warnings
from typing import Any

import numpy as np

INSTRUCTIONS = {
    "reach": "reach the red target",
    "push": "push the puck to the green target",
    "pick-place": "pick up the puck and move it to the target",
    "door-open": "open the door",
    "door-close": "close the door",
    "drawer-open": "open the drawer",
    "drawer-close": "close the drawer",
    "button-press": "press the button",
    "button-press-topdown": "press the button from above",
    "window-open": "open the window",
    "window-close": "close the window",
}


class Environment:
    """One task.

    Args:
        task: name without the version, e.g. "button-press-topdown".
        size: height and width of the images in pixels.
        cameras: names of Meta-World's cameras.
        fov: vertical field of view of the cameras in degrees; None: that of each camera (45 or 60).
        repeat: how often every action is taken. One action with repeat = 4 is four of Meta-World's steps.
    """

    def __init__(
        self,
        task: str,
        size: int = 128,
        cameras: tuple[str, ...] = ("corner4",),
        fov: float | None = None,
        repeat: int = 1,
    ) -> None:
        import metaworld.policies
        import mujoco
        from metaworld.env_dict import ENV_CLS_MAP

        warnings.filterwarnings("ignore", "Constant\\(s\\) may be too high", UserWarning)  # of the experts, every step
        name = f"{task}-v3"
        if name not in ENV_CLS_MAP:
            known = ", ".join(sorted(word[: -len("-v3")] for word in ENV_CLS_MAP))
            raise ValueError(f"Meta-World has no task {task!r}; it has {known}")
        if repeat < 1 or (fov is not None and not 1 <= fov <= 170):
            raise ValueError(f"repeat is {repeat} and fov {fov}; expected at least 1, and 1 to 170 degrees")
        self.instruction = INSTRUCTIONS.get(task, task.replace("-", " "))
        self.task = task
        self.cameras = tuple(cameras)
        self.repeat = repeat
        self.env = ENV_CLS_MAP[name]()
        # As Meta-World makes its environments "goal observable": the scripted experts need the goal.
        self.env._partially_observable = False
        del self.env.sawyer_observation_space
        self.env._freeze_rand_vec = False
        self.env.seeded_rand_vec = True
        self.env._set_task_called = True
        self.env.max_path_length = 1 << 30  # the caller counts the steps
        # Four samples a pixel, shadows and reflections take ten times as long on a CPU.
        self.env.model.vis.quality.offsamples = 0
        if fov is not None:
            self.env.model.cam_fovy[:] = fov
        self.renderer = mujoco.Renderer(self.env.model, size, size)
        self.renderer.scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = 0
        self.renderer.scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0
        words = "".join(word.title() for word in task.split("-"))
        self.forward = mujoco.mj_forward
        self.policy = getattr(metaworld.policies, f"Sawyer{words}V3Policy")()
        self.last: Any = None

    def describe(self) -> dict[str, Any]:
        """What the caller must know before the first episode."""
        return {
            "instruction": self.instruction,
            "action_dims": 4,
            "proprioception": {"ee_states": 3, "gripper_states": 1},
            "expert": True,
            "initial_states": None,
            "versions": {
                "metaworld": importlib.metadata.version("metaworld"),
                "mujoco": importlib.metadata.version("mujoco"),
                "numpy": np.__version__,
            },
        }

    def reset(self, seed: int, initial: int) -> None:
        """Start an episode. `initial` is not used: Meta-World draws the state from the seed."""
        self.env.seed(seed)
        self.last, _ = self.env.reset()
        self.forward(self.env.model, self.env.data)  # the reset has moved the goal in the model, but not in the image

    def step(self, action: np.ndarray, last: bool) -> bool:
        """Take an action (4,): moves of the hand in units of 1 cm and the effort of the gripper, in [-1, 1].

        Args:
            last: whether `observe` follows even if the step does not reach the goal.

        Returns:
            Whether the goal is reached.
        """
        for _ in range(self.repeat):
            self.last, _, _, _, info = self.env.step(np.clip(action, -1, 1))
            if info["success"]:
                return True
        return False

    def expert(self) -> np.ndarray:
        """The action of the scripted expert, clipped as the environment clips it."""
        return np.clip(self.policy.get_action(self.last), -1, 1)

    def observe(self) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Images by camera, (size, size, 3) uint8, and (4,): the hand in metres, the opening of the gripper, 0 to 1."""
        images = {}
        for site in self.env._target_site_config:  # the goals of some tasks are known to the environment alone
            self.env._set_pos_site(*site)
        for name in self.cameras:
            self.renderer.update_scene(self.env.data, camera=name)
            image = self.renderer.render()
            images[name] = image[::-1, ::-1] if name.startswith("corner") else image
        return images, self.last[:4]

    def state(self) -> np.ndarray:
        """Positions and velocities of MuJoCo, and the random values that placed the objects and the goal."""
        return np.concatenate([self.env.data.qpos, self.env.data.qvel, self.env._last_rand_vec])
