"""The program of a simulator process: it makes one environment and answers requests over two pipes.

    python serve.py PROGRAM SETTINGS

PROGRAM is a Python file with a class `Environment` (see metaworld_environment.py). SETTINGS is JSON: "environment" has
the arguments of `Environment`, "limits" the resource limits by the names of the module `resource`.

This file and the programs next to it run in the Python environment of the simulator, which may lack fastvst and may be
old. They import the standard library, numpy and the simulator, and use the syntax of Python 3.8.

A message is HEAD (the magic number, the bytes of the header, the bytes of the arrays), the header in JSON, and the
arrays as raw bytes in the order of the header. Nothing is pickled.
"""

from __future__ import annotations

import importlib.util
import json
import os
import resource
import struct
import sys
import traceback
from typing import Any, BinaryIO

import numpy as np

HEAD = struct.Struct("<4sIQ")
MAGIC = b"FVS1"
ERROR_CHARACTERS = 4000  # of a message that is passed on


def send(pipe: BinaryIO, header: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    """Write one message."""
    packed = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    described = [[name, array.dtype.str, list(array.shape)] for name, array in packed.items()]
    text = json.dumps({**header, "arrays": described}).encode()
    pipe.write(HEAD.pack(MAGIC, len(text), sum(array.nbytes for array in packed.values())))
    pipe.write(text)
    for array in packed.values():
        pipe.write(array.tobytes())
    pipe.flush()


def receive(pipe: BinaryIO) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Read one message of the trainer, which is trusted; EOFError at the end of the pipe."""
    magic, length, _ = HEAD.unpack(_exactly(pipe, HEAD.size))
    if magic != MAGIC:
        raise EOFError("the pipe has no message")
    header = json.loads(_exactly(pipe, length))
    arrays = {}
    for name, kind, shape in header["arrays"]:
        count = int(np.prod(shape))
        arrays[name] = np.frombuffer(_exactly(pipe, count * np.dtype(kind).itemsize), kind).reshape(shape)
    return header, arrays


def _exactly(pipe: BinaryIO, count: int) -> bytes:
    data = pipe.read(count)
    if len(data) != count:
        raise EOFError("the pipe was closed")
    return data


def answer(environment: Any, header: dict[str, Any], arrays: dict[str, np.ndarray]) -> tuple[dict[str, Any], Any]:
    """The header and the arrays of a reply: an observation, and what led to it."""
    more = {}
    steps = 0
    success = False
    if header["call"] == "reset":
        environment.reset(header["seed"], header["initial"])
    elif header["call"] == "step":
        for action in arrays["actions"]:
            steps += 1
            success = bool(environment.step(action, steps == len(arrays["actions"])))
            if success:
                break
    elif header["call"] == "expert":
        more["action"] = np.asarray(environment.expert(), np.float64)
        success = bool(environment.step(more["action"] + arrays.get("noise", 0.0), True))
        steps = 1
    images, proprioception = environment.observe()
    named = {"image:" + name: image for name, image in images.items()}
    state = np.asarray(environment.state(), np.float64)
    reply = {"id": header["id"], "steps": steps, "success": success, "instruction": environment.instruction}
    return reply, {**named, "proprioception": np.asarray(proprioception, np.float64), "state": state, **more}


def load(program: str) -> Any:
    """The class `Environment` of a file."""
    spec = importlib.util.spec_from_file_location("fastvst_simulator_program", program)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Environment


def main(program: str, settings: dict[str, Any]) -> int:
    """Answer requests until the pipe is closed."""
    requests = os.fdopen(os.dup(0), "rb")
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)  # what the simulator prints, from C also, must not reach the pipe
    sys.path[:] = [place for place in sys.path if place not in ("", os.path.dirname(os.path.abspath(__file__)))]
    for name, limit in settings["limits"].items():
        hard = resource.getrlimit(getattr(resource, name))[1]
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(getattr(resource, name), (limit, limit))
    try:
        environment = load(program)(**settings["environment"])
        send(replies, {"id": 0, **environment.describe()}, {})
    except Exception:
        send(replies, {"id": 0, "error": traceback.format_exc()[-ERROR_CHARACTERS:]}, {})
        return 1
    while True:
        try:
            header, arrays = receive(requests)
        except EOFError:
            return 0
        try:
            reply, found = answer(environment, header, arrays)
        except Exception:
            send(replies, {"id": header["id"], "error": traceback.format_exc()[-ERROR_CHARACTERS:]}, {})
            return 1
        send(replies, reply, found)


if __name__ == "__main__":
    status = main(sys.argv[1], json.loads(sys.argv[2]))
    sys.stdout.flush()
    os._exit(status)  # MuJoCo's and Mesa's destructors print errors at exit, after all work is done
