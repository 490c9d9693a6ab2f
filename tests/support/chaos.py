"""Small training runs under faults at seeded moments: python tests/support/chaos.py --moments 30 --seed 0

A moment is a step and a part of a step's time. There the trainer stops, suffers one fault and continues if it can.
Whenever it ends, its last words are checked and it is started again with --resume auto. At the end of a job the curve
and the weights must be those of the uninterrupted run, bit for bit, and no process may be left.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import resource
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]  # as a command; pytest has them

from processes import adopt_orphans, children, descendants, in_use, shared_memory  # noqa: E402
from rl_run import REWARD, load_rl, rl_arguments, write_questions  # noqa: E402
from small_run import arguments, load_script, write_data, write_model  # noqa: E402

GONE = 10  # seconds in which the processes of a run that has ended are gone
LIMIT = 300.0  # seconds for a step, or for the end of a process, on a machine with other work
# Kind of fault -> what the last words of a run that it ends must have. "" = it cannot speak.
WORDS = {
    "kill": "",
    "terminate": "stopped by a signal after step",
    "interrupt twice": "interrupted",
    "kill a helper": "worker",
    "stop": "",
    "stop a helper": "",
    "full disk": "File too large",
    "slow disk": "",
}
WRITE = 0.1  # seconds that a write of shards takes at least, so that moments hit it
LISTENERS: dict[Path, threading.Thread] = {}  # folder of a job -> what writes its log, until all its processes ended
SLOW = 1.5  # the same for the first write after a moment "slow disk"


@dataclass(frozen=True)
class Job:
    """A run of a script; `command` resumes from its newest checkpoint."""

    script: str
    out: Path
    command: list[str]
    steps: int


@dataclass(frozen=True)
class Fault:
    """One moment: as soon as `step` rows are written, after `delay` seconds."""

    kind: str
    step: int
    delay: float


@dataclass
class Outcome:
    """What a job went through: (kind, step, "continued" or the end), one for each moment."""

    moments: list[tuple[str, int, str]] = field(default_factory=list)
    starts: int = 1


def make_job(script: str, folder: Path, steps: int) -> Job:
    """A job in an empty folder. Two of its rows are broken: an image is missing, and another one is cut."""
    model = write_model(folder / "model")
    more = [f"steps={steps}", "checkpoint.every=2", "checkpoint.keep=3", "resume=auto"]
    if script == "sft":
        data = write_data(folder / "data", 40)
        break_rows(folder / "data")
        words = arguments(folder / "run", data, model, *more, "loader.num_workers=1", "bad_samples.max_fraction=0.5")
    else:
        (folder / "mine.py").write_text(REWARD, encoding="utf-8")
        data = write_questions(folder / "data")
        break_rows(folder / "data")
        words = rl_arguments(folder / "run", data, model, folder / "mine.py", *more, "bad_samples=0.5")
    return Job(script, folder / "run", words, steps)


def break_rows(folder: Path) -> None:
    (folder / "4.png").unlink()
    whole = (folder / "8.png").read_bytes()
    (folder / "8.png").write_bytes(whole[: len(whole) // 2])


def plan(rng: random.Random, kinds: Sequence[str], count: int, steps: int) -> list[Fault]:
    """`count` moments in the order of their steps; the last five steps are left to the end of the run."""
    chosen = sorted(rng.sample(range(2, steps - 5), count))
    return [Fault(rng.choice(kinds), step, rng.uniform(0, 0.2)) for step in chosen]


def uninterrupted(job: Job, folder: Path) -> Job:
    """The same run in the new folder `folder`, without a fault."""
    folder.mkdir()
    words = [word for word in job.command if not word.startswith("out=")]
    calm = Job(job.script, folder / "run", [f"out={folder / 'run'}", *words], job.steps)
    process = start(calm)
    process.join(LIMIT)
    assert process.exitcode == 0, log_of(calm).read_text()
    return calm


def suffer(job: Job, faults: Sequence[Fault], calm: Job, rng: random.Random) -> Outcome:
    """Run `job` through `faults` to its end, and compare it with the uninterrupted one. Raises AssertionError."""
    adopt_orphans()
    before = set(descendants())
    shared = shared_memory()
    outcome = Outcome()
    process = start(job)
    last = "none"
    for fault in faults:
        while True:
            wait(lambda step=fault.step, p=process: rows(job) >= step or not p.is_alive(), job)
            if process.is_alive():
                break
            process = again(job, process, last, outcome, calm, before)  # an earlier fault has ended it later
        time.sleep(fault.delay)
        strike(fault, process.pid or 0, slow_disk(job), rng)
        last = fault.kind
        ended = ends(process, fault.kind)
        outcome.moments.append((fault.kind, fault.step, "ended" if ended else "continued"))
        if ended:
            process = again(job, process, last, outcome, calm, before)
    for _ in range(3):
        process.join(LIMIT)
        if process.exitcode == 0 and rows(job) == job.steps:
            break
        process = again(job, process, last, outcome, calm, before)
    assert process.exitcode == 0, log_of(job).read_text()
    assert read_curve(job) == read_curve(calm), "the curve is another one"
    for file in sorted((calm.out / "hf").glob("*.safetensors")):
        assert file.read_bytes() == (job.out / "hf" / file.name).read_bytes(), file.name
    assert left(before) == {}
    wait(lambda: not forgotten(shared), job)  # other programs of this machine have some for a moment
    return outcome


def strike(fault: Fault, pid: int, slow: Path, rng: random.Random) -> None:
    """Stop the trainer where it is, let the fault happen, and let it go on."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGSTOP)
        helpers = children(pid)
        helper = rng.choice(helpers) if helpers else 0
        if fault.kind == "kill":
            os.kill(pid, signal.SIGKILL)
        elif fault.kind == "terminate":
            os.kill(pid, signal.SIGTERM)
        elif fault.kind == "interrupt twice":
            os.kill(pid, signal.SIGINT)
            os.kill(pid, signal.SIGCONT)
            time.sleep(0.05)
            os.kill(pid, signal.SIGINT)
        elif fault.kind == "kill a helper" and helper:
            os.kill(helper, signal.SIGKILL)
        elif fault.kind == "stop a helper" and helper:
            os.kill(helper, signal.SIGSTOP)
            os.kill(pid, signal.SIGCONT)
            time.sleep(0.3)
            os.kill(helper, signal.SIGCONT)
        elif fault.kind == "full disk":  # no file can grow beyond 3,000 bytes, for a while
            old = resource.prlimit(pid, resource.RLIMIT_FSIZE, (3000, resource.RLIM_INFINITY))
            os.kill(pid, signal.SIGCONT)
            time.sleep(0.5)
            resource.prlimit(pid, resource.RLIMIT_FSIZE, old)
        elif fault.kind == "slow disk":
            slow.touch()
        else:
            time.sleep(0.3)
        os.kill(pid, signal.SIGCONT)


def ends(process: multiprocessing.process.BaseProcess, kind: str) -> bool:
    """True if the fault has ended the run; some faults must, others may do so at once or later."""
    if kind in ("kill", "terminate", "interrupt twice"):
        process.join(LIMIT)
        assert not process.is_alive(), f"{kind}: the run does not end"
    else:
        process.join(1)
    return not process.is_alive()


def again(
    job: Job,
    process: multiprocessing.process.BaseProcess,
    kind: str,
    outcome: Outcome,
    calm: Job,
    before: set[int],
) -> multiprocessing.process.BaseProcess:
    """Check how the run ended and start it again."""
    wait(lambda: not left(before), job)
    LISTENERS.pop(job.out).join(LIMIT)  # no process is left that could write
    text = log_of(job).read_text(encoding="utf-8", errors="replace")
    if process.exitcode == -signal.SIGTERM:  # a signal in the moment in which it starts
        assert "step" not in text, text
    elif process.exitcode != -signal.SIGKILL:
        # A full disk may end a run later, at its next checkpoint, while another moment has come.
        late = [WORDS[k] for k, _, end in outcome.moments if (k, end) == ("full disk", "continued")]
        told = any(words in text for words in (WORDS[kind], *late))
        assert told, f"{kind}: exit status {process.exitcode}, and its words are:\n{text}"
    seen = read_curve(job)
    assert seen == read_curve(calm)[: len(seen)], f"{kind}: the figures differ"
    outcome.starts += 1
    assert outcome.starts < 100, text
    return start(job)


def left(before: set[int]) -> dict[int, str]:
    """Processes that are not gone within ten seconds, as docs/reliability.md promises."""
    limit = time.monotonic() + GONE
    while (found := {pid: words for pid, words in descendants().items() if pid not in before}) and (
        time.monotonic() < limit
    ):
        time.sleep(0.05)
    return found


def forgotten(before: set[str]) -> set[str]:
    """Names of new shared memory that no living process uses."""
    new = shared_memory() - before
    return (new - in_use(new)) & shared_memory() if new else new


def wait(done: Callable[[], bool], job: Job) -> None:
    limit = time.monotonic() + LIMIT
    while not done():
        assert time.monotonic() < limit, f"nothing happens:\n{log_of(job).read_text()}\n{descendants()}"
        time.sleep(0.005)


def rows(job: Job) -> int:
    file = job.out / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def read_curve(job: Job) -> list[tuple[float, ...]]:
    """The figures of every step, without a torn last line."""
    if not (job.out / "metrics.jsonl").exists():
        return []
    lines = (job.out / "metrics.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    names = ("loss", "grad_norm", "tokens") if job.script == "sft" else ("loss", "grad_norm", "reward", "entropy")
    return [tuple(json.loads(line).get(name, 0.0) for name in names) for line in lines]


def log_of(job: Job) -> Path:
    return job.out.with_suffix(".log")


def slow_disk(job: Job) -> Path:
    """While this file exists, the disk is slow; the next write removes it."""
    return job.out.with_suffix(".slow")


def start(job: Job) -> multiprocessing.process.BaseProcess:
    """Start the job. What it says comes through a pipe, because a full disk would cut its last words in a file."""
    reader, writer = os.pipe()
    process = multiprocessing.get_context("fork").Process(target=_child, args=(job, writer))
    process.start()
    os.close(writer)
    LISTENERS[job.out] = threading.Thread(target=_listen, args=(reader, log_of(job)), daemon=True)
    LISTENERS[job.out].start()
    return process


def _listen(reader: int, log: Path) -> None:
    with open(reader, "rb", buffering=0) as words, open(log, "wb", buffering=0) as file:
        while some := words.read(65536):
            file.write(some)


def _child(job: Job, output: int) -> None:
    """Run the script as `python script.py` does: mistakes and errors of the disk end it with one line."""
    from fastvst.rl.rewards.pool import RewardError
    from fastvst.train import checkpoint
    from fastvst.train.run import run_script

    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115 - pytest has replaced it
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    write = checkpoint.write_tensors

    def slowly(*arguments: Any) -> Any:
        slow = slow_disk(job).exists()
        slow_disk(job).unlink(missing_ok=True)
        time.sleep(SLOW if slow else WRITE)
        return write(*arguments)

    checkpoint.write_tensors = slowly
    sys.argv = [f"{job.script}.py", *job.command]
    module = load_script() if job.script == "sft" else load_rl()
    run_script(module.main, RewardError)


def run(moments: int, seed: int, folder: Path, say: Callable[[str], object] = print) -> dict[str, Any]:
    """Jobs of five moments each, every second one RL; returns the figures. Raises AssertionError."""
    rng = random.Random(seed)
    counts: dict[str, int] = {}
    starts = 0
    left_over = moments
    number = 0
    calm: dict[str, Job] = {}
    while left_over:
        script = "rl" if number % 2 else "sft"
        count = min(5, left_over)
        place = folder / f"{number}-{script}"
        place.mkdir()
        job = make_job(script, place, 24 if script == "sft" else 16)
        if script not in calm:
            calm[script] = uninterrupted(job, folder / f"calm-{script}")
        # A killed reward process costs its rows their reward, as documented; a killed loader worker is replaced.
        kinds = [kind for kind in WORDS if script == "sft" or kind != "kill a helper"]
        faults = plan(rng, kinds, count, job.steps)
        outcome = suffer(job, faults, calm[script], rng)
        for kind, step, end in outcome.moments:
            counts[f"{kind}, {end}"] = counts.get(f"{kind}, {end}", 0) + 1
            say(f"{script}, step {step}: {kind}: {end}")
        starts += outcome.starts
        left_over -= count
        number += 1
    return {"moments": moments, "seed": seed, "starts": starts, "lost": 0, "kinds": dict(sorted(counts.items()))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--moments", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(run(options.moments, options.seed, Path(folder)), indent=2))


if __name__ == "__main__":
    main()
