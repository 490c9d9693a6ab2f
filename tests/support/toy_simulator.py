"""A simulator for tests of reinforcement learning: whether an episode succeeds depends on one value of one action."""

import numpy as np

SIZE = 16
MOST = -0.3  # an action below it succeeds


class Environment:
    """One number as the action.

    Args:
        mixed: a third of the seeds always succeeds, a third never does, and the rest depends on the action.
        others: arguments of the real ones, which are not used.
    """

    def __init__(self, task="toy", mixed=False, size=SIZE, fov=0, repeat=1):
        self.instruction = f"do {task}"
        self.mixed = mixed

    def describe(self):
        return {
            "action_dims": 1,
            "proprioception": {"ee_states": 1},
            "versions": {"toy": "1"},
            "initial_states": None,
            "expert": False,
        }

    def reset(self, seed, initial):
        self.seed = seed
        self.kind = ("action", "always", "never")[seed % 3 if self.mixed else 0]

    def step(self, action, last):
        return self.kind == "always" or (self.kind == "action" and bool(action[0] < MOST))

    def observe(self):
        image = np.random.default_rng(self.seed).integers(0, 256, (SIZE, SIZE, 3), np.uint8)
        return {"agentview": image}, np.zeros(1)

    def state(self):
        return np.array([self.seed], np.float64)
