"""Functions in a process of its own: results, errors, death, hangs, and what is left of it."""

from __future__ import annotations

import os
import pickle
import resource
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from fastvst import helper
from fastvst.data.media_cache import Cache
from fastvst.helper import Helper, HelperLost


def add(a: int, b: int) -> int:
    return a + b


def pid() -> int:
    return os.getpid()


def die(number: int) -> None:
    os.kill(os.getpid(), number)


def die_once(mark: Path) -> int:
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return 7


def sleep(seconds: float) -> None:
    time.sleep(seconds)


def compute() -> None:
    while True:
        pass


def fail() -> None:
    raise FileNotFoundError(2, "no such thing", "here")


class Odd(Exception):
    def __init__(self, a: int, b: int) -> None:
        super().__init__("odd")


def fail_oddly() -> None:
    raise Odd(1, 2)


def arrays() -> tuple[torch.Tensor, np.ndarray, torch.Tensor]:
    return torch.arange(1 << 20), np.arange(6, dtype=np.uint8).reshape(2, 3), torch.ones(2, dtype=torch.bfloat16)


def descriptors() -> list[str]:
    places = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd") if int(number) > 2]
    return [os.readlink(place) for place in places if os.path.lexists(place)]


def threads() -> int:
    return len(os.listdir("/proc/self/task"))


class Counter:
    """An object that is not pickled."""

    def __init__(self) -> None:
        self.count = 0
        self.lock = threading.Lock()

    def next(self) -> int:
        self.count += 1
        return self.count


def is_alive(number: int) -> bool:
    try:
        return Path(f"/proc/{number}/stat").read_bytes().rpartition(b")")[2].split()[0] != b"Z"
    except OSError:
        return False


def wait_until_gone(number: int) -> None:
    end = time.monotonic() + 100
    while is_alive(number):
        assert time.monotonic() < end
        time.sleep(0.01)


def test_results_errors_and_a_process_of_its_own() -> None:
    with Helper() as one:
        assert one.call(add, 2, b=3) == 5
        number = one.call(pid)
        assert number != os.getpid() == int(Path(f"/proc/{one.call(os.getppid)}/stat").read_text().split()[3])
        with pytest.raises(FileNotFoundError, match="no such thing"):
            one.call(fail)
        with pytest.raises(RuntimeError, match="Odd: odd"):
            one.call(fail_oddly)
        long, small, half = one.call(arrays)
        assert torch.equal(long, torch.arange(1 << 20)) and small.tolist() == [[0, 1, 2], [3, 4, 5]]
        long += 1  # both can be written
        small[0] = 9
        assert half.dtype == torch.bfloat16 and half.tolist() == [1, 1]
        assert one.call(pid) == number  # one process for all of them
        assert one.call(threads) == 1
        assert one.call(resource.getrlimit, resource.RLIMIT_CORE) == (0, 0)
        left = [name for name in one.call(descriptors) if name != "/dev/null" and "/proc/" not in name]
        assert len(left) == 1 and left[0].startswith("socket:"), left  # its connection
    wait_until_gone(number)


def test_shared_objects_are_not_sent_and_keep_their_state() -> None:
    counter = Counter()
    with pytest.raises(TypeError, match="pickle"):
        pickle.dumps(counter)
    with Helper(counter) as one:
        assert [one.call(counter.next) for _ in range(3)] == [1, 2, 3]
    assert counter.count == 0


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT])
def test_a_death_is_named_and_the_next_call_works(number: int) -> None:
    with Helper() as one:
        with pytest.raises(HelperLost, match=f"two processes ended .* {signal.Signals(number).name}") as lost:
            one.call(die, int(number))
        assert lost.value.reason == "worker_died"
        assert one.call(add, 1, 1) == 2


def test_an_exit_is_a_death_and_one_death_is_forgiven(tmp_path: Path) -> None:
    with Helper() as one:
        with pytest.raises(HelperLost, match="exit status 3"):
            one.call(os._exit, 3)
        assert one.call(die_once, tmp_path / "mark") == 7


@pytest.mark.parametrize(("function", "arguments"), [(sleep, (1000.0,)), (compute, ()), (die, (int(signal.SIGSTOP),))])
def test_a_hang_ends(function, arguments, monkeypatch) -> None:
    monkeypatch.setattr(helper, "POLL_S", 0.05)
    with Helper(still_s=0.5, processor_s=0.5) as one:
        with pytest.raises(HelperLost, match="nothing moved|processor time") as lost:
            one.call(function, *arguments)
        assert lost.value.reason == "worker_hung"
        one.still_s = 100.0  # a busy machine may take its time
        assert one.call(add, 1, 1) == 2


def test_a_busy_process_is_not_said_to_hang(monkeypatch) -> None:
    monkeypatch.setattr(helper, "POLL_S", 0.01)
    seconds = iter(range(0, 10000, 2))
    monkeypatch.setattr(helper, "processor_seconds", lambda number: float(next(seconds)))  # much at every look
    with Helper(still_s=0.2, processor_s=1e9) as one:
        one.call(sleep, 0.6)


def test_a_killed_nursery_is_replaced_and_takes_its_process_with_it() -> None:
    with Helper() as one:
        worker = one.call(pid)
        os.kill(one.call(os.getppid), signal.SIGKILL)
        wait_until_gone(worker)
        assert one.call(add, 1, 1) == 2


def test_a_stopped_nursery_is_replaced() -> None:
    with Helper() as one:
        worker = one.call(pid)
        os.kill(one.call(os.getppid), signal.SIGSTOP)
        one._nursery.control.settimeout(0.2)  # of this one only
        os.kill(worker, signal.SIGKILL)
        assert one.call(add, 1, 1) == 2


def test_nothing_is_left_when_the_owner_is_killed() -> None:
    reader, writer = os.pipe()
    owner = os.fork()
    if not owner:
        one = Helper()
        os.write(writer, f"{one.call(pid)} {one.call(os.getppid)} ".encode())
        os._exit(0)
    os.waitpid(owner, 0)
    for number in os.read(reader, 100).split():
        wait_until_gone(int(number))


def test_an_object_that_was_copied_by_a_fork_starts_its_own_process() -> None:
    with Helper() as one:
        first = one.call(pid)
        child = os.fork()
        if not child:
            os._exit(one.call(pid) == first)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert one.call(pid) == first  # still there, and the answers are not mixed


def test_a_lock_that_another_thread_holds_does_not_stop_a_replacement() -> None:
    """A class of the standard library whose lock every instance shares, as that of functools.cached_property was."""
    lock = threading.Lock()
    counter = Counter()
    counter.lock = lock
    with Helper(counter) as one:
        one.start()  # before the thread has the lock
        held = threading.Event()
        release = threading.Event()

        def hold() -> None:
            with lock:
                held.set()
                release.wait(100)

        thread = threading.Thread(target=hold)
        thread.start()
        held.wait(100)
        with pytest.raises(HelperLost):
            one.call(die, int(signal.SIGKILL))
        assert one.call(take_lock, counter)
        release.set()
        thread.join()


def take_lock(counter: Counter) -> bool:
    return counter.lock.acquire(blocking=False)


def test_a_cache_that_another_thread_is_using_can_be_used_after_a_fork() -> None:
    cache: Cache[int] = Cache(8)
    cache.put("a", 1)
    with cache._lock(), Helper(cache, still_s=100.0) as one:  # as if another thread had it
        assert one.call(cache.get, "a") == 1


def test_nothing_of_the_loader_has_a_lock_that_all_instances_share() -> None:
    """functools.cached_property of Python 3.11 has one for each class: a forked planner waited for ever."""
    root = Path(helper.__file__).parent
    sources = [*root.glob("*.py"), *(root / "data").rglob("*.py"), *(root / "model").rglob("*.py")]
    assert len(sources) > 50
    assert [path.name for path in sources if "cached_property" in path.read_text()] == []


def test_it_can_be_sent_to_another_process() -> None:
    found = pickle.loads(pickle.dumps(Helper(1, 2, still_s=3.0)))
    assert (found.shared, found.still_s) == ((1, 2), 3.0)
    assert pickle.loads(pickle.dumps(HelperLost("worker_died", "x"))).detail == "x"
