"""A simulator for tests: a point that must reach a goal in a square, and all the ways in which a simulator fails."""

import os
import pathlib
import signal
import struct
import sys
import time

import numpy as np

SIZE = 16
REPLIES = 4  # the descriptor of the replies in serve.py
SPEED = 0.1
RADIUS = 0.1


class Environment:
    """A point.

    Args:
        fault: what goes wrong at step `at` of an episode (0: at the reset); "" for nothing. See `fail`.
        once: a file; if given, the fault happens only while it does not exist, and makes it.
        note: a file that receives a line for every episode and every step.
        others: arguments of the real ones, which are not used.
    """

    def __init__(
        self,
        fault="",
        at=0,
        once="",
        note="",
        mujoco="3.3.2",
        task="point",
        size=SIZE,
        cameras=(),
        suite="",
        gripper="",
        fov=0,
        repeat=1,
    ):
        self.fault = fault
        self.at = at
        self.once = once
        self.note = note
        self.mujoco = mujoco
        self.task = task
        self.instruction = f"move to the goal of {task}"
        self.taken = 0
        self.bad = ""
        if fault == "start":
            raise RuntimeError("no display")
        if fault == "slow_start":
            time.sleep(1000)

    def describe(self):
        versions = {"libero": "0", "mujoco": self.mujoco}
        more = {"action_dims": -1} if self.fault == "description" else {"action_dims": 2}
        return {
            **more,
            "proprioception": {"ee_states": 2},
            "versions": versions,
            "initial_states": None,
            "expert": True,
        }

    def reset(self, seed, initial):
        self.log(f"reset {self.task} {seed} {initial}")
        generator = np.random.default_rng([seed, initial])
        self.point = generator.uniform(-1, 1, 2)
        self.goal = generator.uniform(-1, 1, 2)
        self.taken = 0
        self.bad = ""
        self.fail()

    def step(self, action, last):
        self.taken += 1
        self.log("step")
        self.point = np.clip(self.point + SPEED * np.clip(action, -1, 1), -1, 1)
        self.fail()
        return bool(np.linalg.norm(self.point - self.goal) < RADIUS)

    def expert(self):
        return np.clip((self.goal - self.point) / SPEED, -1, 1)

    def observe(self):
        if self.bad == "no_image":
            return {}, self.point
        image = np.full((SIZE, SIZE, 3), 40, np.uint8)
        for place, colour in ((self.point, 0), (self.goal, 1)):
            x, y = ((place + 1) / 2 * (SIZE - 1)).round().astype(int)
            image[y, x, colour] = 255
        if self.bad == "black":
            image[:] = 3
        if self.bad == "float_image":
            image = image.astype(np.float64)
        point = np.array([np.nan, 0.0]) if self.bad == "nan" else self.point
        return {"agentview": image}, point[:1] if self.bad == "short" else point

    def state(self):
        return np.concatenate([self.point, self.goal])

    def log(self, line):
        if self.note:
            with open(self.note, "a") as file:
                file.write(f"{line} {os.getpid()}\n")

    def fail(self):
        if self.taken != self.at or not self.fault:
            return
        if self.once:
            try:  # of several processes, one makes the file
                pathlib.Path(self.once).touch(exist_ok=False)
            except FileExistsError:
                return
        if self.fault == "hang":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(1000)
        elif self.fault == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.fault == "exit":
            print("the simulator's last words", flush=True)
            os._exit(3)
        elif self.fault == "raise":
            raise RuntimeError("the physics exploded")
        elif self.fault == "garbage":
            os.write(REPLIES, b"WARNING: GL context lost\n")
            time.sleep(1000)
        elif self.fault == "huge_header":
            os.write(REPLIES, struct.pack("<4sIQ", b"FVS1", 0xFFFFFFFF, 0))
            time.sleep(1000)
        elif self.fault == "huge_arrays":
            os.write(REPLIES, struct.pack("<4sIQ", b"FVS1", 2, 1 << 60))
            time.sleep(1000)
        elif self.fault.startswith("header "):
            text = self.fault.partition(" ")[2].encode()
            os.write(REPLIES, struct.pack("<4sIQ", b"FVS1", len(text), 8) + text + bytes(8))
            time.sleep(1000)
        elif self.fault == "prints":
            for _ in range(40):
                print("x" * 100_000)
                print("y" * 100_000, file=sys.stderr)
            os.write(1, b"z" * 100_000)
        else:
            self.bad = self.fault
