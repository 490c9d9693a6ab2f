"""Helper: functions that may crash or hang, such as decoders of files of strangers, run in a process of their own.

    with Helper(processor) as helper:
        encoded = helper.call(processor.encode, sample)  # HelperLost if the process hangs, or dies twice

The caller forks a nursery, which does nothing but fork the process that works, and again when that one is lost. A fork
copies locks that other threads hold, and nobody releases them; the nursery has one thread, so a replacement meets none.
A fork needs no import, and objects that are named at the beginning are not sent: they are in the process already.
"""

from __future__ import annotations

import contextlib
import gc
import io
import os
import pickle
import resource
import signal
import socket
import struct
import threading
import time
import traceback
import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastvst.processes import end_with_parent, processor_seconds

T = TypeVar("T")

STILL_S = 60.0  # a process that has worked for less than LEAST_WORK_S in this time hangs
LEAST_WORK_S = 0.3
PROCESSOR_S = 300.0  # most processor time of one call; a busy machine does not shorten it
POLL_S = 1.0  # seconds between looks at a process that has not answered
START_S = 60.0  # limit for the nursery, which only forks
NUMBER = struct.Struct("<q")


class HelperLost(RuntimeError):
    """The process of a call was lost: `reason` is "worker_died" or "worker_hung", `detail` a sentence."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type[HelperLost], tuple[str, str]]:
        return HelperLost, (self.reason, self.detail)


class _Died(Exception):
    """The process ended during a call."""


class Helper:
    """Calls functions in another process, one after the other. The process starts with the first call, or by `start`.

    A call whose process dies is tried once more, because the kernel kills innocent processes too. A call that stands
    still for `still_s` seconds, or takes `processor_s` of processor time, is not. The process ends with the Helper, and
    with the process that made it.

    Attributes:
        shared: objects that functions use and that are never sent, e.g. a Processor with its tokenizer. The process has
            them as they were when it started.
    """

    def __init__(self, *shared: Any, still_s: float = STILL_S, processor_s: float = PROCESSOR_S) -> None:
        self.shared = shared
        self.still_s = still_s
        self.processor_s = processor_s
        self._lock = threading.Lock()
        self._nursery: _Nursery | None = None
        self._worker: tuple[int, socket.socket] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(Helper, still_s=self.still_s, processor_s=self.processor_s), self.shared

    def __enter__(self) -> Helper:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def start(self) -> None:
        """Start the process now: before threads, and before memory that a copy would keep."""
        with self._lock:
            self._ready()

    def call(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """`function(*args, **kwargs)` in the other process; raises what it raises.

        Args:
            function: of a module, or a method; it and the arguments are pickled, except the shared objects.

        Raises:
            HelperLost: the process hangs, or has died twice.
            ChildProcessError: no process can be started.
        """
        parts = _dump((function, args, kwargs), self.shared)
        with self._lock:
            for _ in range(2):
                try:
                    succeeded, result = self._ask(parts)
                except _Died as error:
                    died = str(error)
                    continue
                if not succeeded:
                    raise result
                return result
        raise HelperLost("worker_died", f"two processes ended while they did it, the last one by {died}")

    def close(self) -> None:
        """End the process; another call starts one again."""
        with self._lock:
            self._forget()

    def _ask(self, parts: Sequence[Any]) -> tuple[bool, Any]:
        pid, connection = self._ready()
        watch = _Watch(pid, self.still_s, self.processor_s)
        try:
            for part in parts:
                _write(connection, part, watch.check)
            return _load(_read(connection, watch.check), ())
        except HelperLost:
            self._end_worker()
            raise
        except (EOFError, OSError):
            raise _Died(self._end_worker()) from None
        except BaseException:  # Ctrl-C: the answer that follows must not be taken for that of the next call
            self._end_worker()
            raise

    def _ready(self) -> tuple[int, socket.socket]:
        if self._nursery is not None and self._nursery.owner != os.getpid():  # a fork has copied this object
            self._nursery = None
            self._worker = None
        if self._worker is not None:
            return self._worker
        for attempt in range(2):
            try:
                self._nursery = self._nursery or _Nursery.start(self.shared)
                self._worker = self._nursery.fork()
                return self._worker
            except OSError as error:
                self._forget()
                if attempt:
                    raise ChildProcessError(f"no process for decoding can be started: {error}") from error
        raise AssertionError

    def _end_worker(self) -> str:
        """Kill the process; returns how it ended."""
        assert self._worker is not None and self._nursery is not None
        pid, connection = self._worker
        self._worker = None
        connection.close()
        try:
            return _ending(self._nursery.end(pid))
        except OSError:
            self._forget()
            return "an unknown signal"

    def _forget(self) -> None:
        if self._nursery is not None:
            self._nursery.finish()
        if self._worker is not None:
            self._worker[1].close()
        self._nursery = None
        self._worker = None


@dataclass(eq=False)
class _Nursery:
    """The process that forks.

    Attributes:
        pid: its process id.
        control: connection to it.
        owner: process that started it.
    """

    pid: int
    control: socket.socket
    owner: int
    finish: Callable[[], object] = field(init=False)

    def __post_init__(self) -> None:
        self.control.settimeout(START_S)
        self.finish = weakref.finalize(self, _finish, self.pid, self.control, self.owner)

    @classmethod
    def start(cls, shared: Sequence[Any]) -> _Nursery:
        ours, theirs = socket.socketpair()
        steady = threading.current_thread() is threading.main_thread()
        owner = os.getpid()
        pid = _fork(partial(_nurse, theirs, shared, owner if steady else 0), theirs)
        theirs.close()
        return cls(pid, ours, owner)

    def fork(self) -> tuple[int, socket.socket]:
        """A new process and the connection to it."""
        ours, theirs = socket.socketpair()
        socket.send_fds(self.control, [NUMBER.pack(0)], [theirs.fileno()])
        theirs.close()
        ours.settimeout(POLL_S)
        return self._answer(), ours

    def end(self, pid: int) -> int:
        """Kill a process; returns its wait status."""
        self.control.sendall(NUMBER.pack(pid))
        return self._answer()

    def _answer(self) -> int:
        data = self.control.recv(NUMBER.size)
        if len(data) < NUMBER.size:
            raise ConnectionError("it was killed")
        return int(NUMBER.unpack(data)[0])


def _finish(pid: int, control: socket.socket, owner: int) -> None:
    """Kill a nursery; the kernel kills its process then."""
    control.close()
    if os.getpid() == owner:
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def _fork(body: Callable[[], object], kept: socket.socket) -> int:
    """Fork a process that runs `body` whose only files are `kept` and the standard ones; returns its process id."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns where there are threads
        pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        gc.freeze()  # nothing of the parent is finalised here
        for number in (signal.SIGINT, signal.SIGTERM):  # the parent ends this process
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.set_wakeup_fd(-1)
        _let_go_of_files(kept.fileno())
        body()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def _let_go_of_files(kept: int) -> None:
    """Point all descriptors but the standard ones and `kept` to /dev/null.

    A copy of a pipe would keep its reader from seeing the end. The numbers stay open, because libraries close their own
    ones in a forked process, and Arrow aborts where that fails.
    """
    null = os.open(os.devnull, os.O_RDWR)
    for number in map(int, os.listdir("/dev/fd")):
        if number > 2 and number not in (kept, null):
            with contextlib.suppress(OSError):  # that of the listing
                os.fstat(number)
                os.dup2(null, number)
    os.close(null)


def _nurse(control: socket.socket, shared: Sequence[Any], parent: int) -> None:
    """Body of the nursery: a number other than 0 is a process to kill; with a connection, one is to be forked."""
    if parent:
        end_with_parent(parent=parent)
    workers: set[int] = set()
    while True:
        data, connections, _, _ = socket.recv_fds(control, NUMBER.size, 1)
        if not data:
            break
        (number,) = NUMBER.unpack(data)
        if connections:
            connection = socket.socket(fileno=connections[0])
            number = _fork(partial(_work, connection, shared, os.getpid()), connection)
            connection.close()
            workers.add(number)
        elif number in workers:
            os.kill(number, signal.SIGKILL)
            workers.remove(number)
            number = os.waitpid(number, 0)[1]
        control.sendall(NUMBER.pack(number))
    for number in workers:
        os.kill(number, signal.SIGKILL)


def _work(connection: socket.socket, shared: Sequence[Any], parent: int) -> None:
    """Body of the process that works."""
    end_with_parent(parent=parent)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core would have all memory of the parent
    with contextlib.suppress(OSError):  # where memory is over, the kernel ends this process and not the parent
        Path("/proc/self/oom_score_adj").write_text("500")
    torch.set_num_threads(1)  # the threads of the parent's pool are not copied
    connection.setblocking(True)
    while True:
        try:
            request = _read(connection, lambda: None)
        except EOFError:
            return
        try:
            function, args, kwargs = _load(request, shared)
            answer = _dump((True, function(*args, **kwargs)), ())
        except Exception as error:
            answer = _failure(error)
        for part in answer:
            connection.sendall(part)


def _failure(error: Exception) -> list[Any]:
    try:
        answer = _dump((False, error), ())
        _load(answer[1:], ())
        return answer
    except Exception:  # some exceptions cannot be rebuilt in another process
        return _dump((False, RuntimeError(f"{type(error).__name__}: {error}")), ())


def _ending(status: int) -> str:
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        try:
            return signal.Signals(number).name
        except ValueError:  # a real-time signal
            return f"signal {number}"
    return f"exit status {os.waitstatus_to_exitcode(status)}"


# ------------------------------------------------------------------------------------------------------------- hangs


class _Watch:
    """Looks whether a process works on a call."""

    def __init__(self, pid: int, still_s: float, processor_s: float) -> None:
        self.pid = pid
        self.still_s = still_s
        self.processor_s = processor_s
        self.begun = self.worked = processor_seconds(pid)
        self.since = time.monotonic()

    def check(self) -> None:
        """Raise HelperLost if it hangs."""
        worked = processor_seconds(self.pid)
        if worked - self.begun > self.processor_s:
            raise HelperLost("worker_hung", f"it took more than {self.processor_s:g} s of processor time")
        if worked - self.worked > LEAST_WORK_S:
            self.worked = worked
            self.since = time.monotonic()
        elif time.monotonic() - self.since > self.still_s:
            raise HelperLost("worker_hung", f"nothing moved for {self.still_s:g} s")


# ------------------------------------------------------------------------------------------------------------ messages


class _Pickler(pickle.Pickler):
    """Shared objects are sent as their number; arrays and tensors follow the message, without a copy."""

    def __init__(
        self, file: io.BytesIO, shared: Sequence[Any], beside: Callable[[pickle.PickleBuffer], object]
    ) -> None:
        super().__init__(file, protocol=5, buffer_callback=beside)
        self.numbers = {id(one): number for number, one in enumerate(shared)}

    def persistent_id(self, value: Any) -> int | None:
        return self.numbers.get(id(value))

    def reducer_override(self, value: Any) -> Any:
        if type(value) is Tensor and value.device.type == "cpu" and not value.requires_grad:
            with contextlib.suppress(TypeError):  # bfloat16 has no array
                return torch.from_numpy, (value.numpy(),)
        return NotImplemented


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: Any, buffers: Sequence[Any], shared: Sequence[Any]) -> None:
        super().__init__(io.BytesIO(data), buffers=buffers)
        self.shared = shared

    def persistent_load(self, number: Any) -> Any:
        return self.shared[number]


def _dump(value: Any, shared: Sequence[Any]) -> list[Any]:
    """A message: the number of its parts and their lengths, then the parts."""
    file = io.BytesIO()
    beside: list[pickle.PickleBuffer] = []
    _Pickler(file, shared, beside.append).dump(value)
    parts = [file.getbuffer(), *(one.raw() for one in beside)]
    head = struct.pack(f"<{1 + len(parts)}Q", len(parts), *(len(part) for part in parts))
    return [head, *parts]


def _load(parts: Sequence[Any], shared: Sequence[Any]) -> Any:
    return _Unpickler(parts[0], parts[1:], shared).load()


def _write(connection: socket.socket, part: Any, waiting: Callable[[], None]) -> None:
    left = memoryview(part)
    while left:
        try:
            left = left[connection.send(left) :]
        except TimeoutError:
            waiting()


def _read(connection: socket.socket, waiting: Callable[[], None]) -> list[bytearray]:
    """The parts of a message. Raises EOFError if the other side has ended."""
    (count,) = struct.unpack("<Q", _exactly(connection, 8, waiting))
    lengths = struct.unpack(f"<{count}Q", _exactly(connection, 8 * count, waiting))
    return [_exactly(connection, length, waiting) for length in lengths]


def _exactly(connection: socket.socket, length: int, waiting: Callable[[], None]) -> bytearray:
    data = bytearray(length)
    view = memoryview(data)
    while view:
        try:
            count = connection.recv_into(view)
        except TimeoutError:
            waiting()
            continue
        if not count:
            raise EOFError
        view = view[count:]
    return data
