"""Fill a Triton cache with every kernel that the lease's blocks launch, without a GPU.

    python -m bench.gpu.prebuild --out bench/gpu/cache.tar.xz      # then carry that file with the checkout

The blocks run on tensors without memory on a GPU that is pretended: a launch compiles for sm_90 and goes nowhere. Run
it with the Python, torch and triton of the GPU machine, because the keys of the cache hash triton's files, which differ
by version and by Python, and for the checkout that will be measured: an edit above a kernel changes the kernel's key.
The keys hold for PyPI's wheel of triton only. On the machine itself `lease.py` compares the hashes and, where they
differ, runs this file in many processes (`--shard`).

The cache is always made where the lease unpacks it, because the group files of Triton hold absolute paths.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.nvidia import driver as nvidia
from triton.runtime import build
from triton.runtime.cache import get_cache_manager, triton_key

import fastvst_kernels
from bench.gpu import attention, lm_head, places, pointwise, rollout, smoke, step
from bench.gpu.block import Cases, Figures, Options, compilations
from fastvst_kernels.tuning.tune import MOST_SPILLED, PUBLISHED, classes, spilled
from launches import FakeDriver
from pretended_gpu import CAPABILITY, NAME, pretended_gpu

ARCH = 10 * CAPABILITY[0] + CAPABILITY[1]
# What the key of a C module says of the platform, where the program `file` is installed and where it is not.
PLATFORMS = ("x86_64,Linux,64bit,ELF", "x86_64,Linux,64bit,")


def tuning_cases(options: Options) -> Cases:
    """Every candidate of the published models' shapes: its variants, compiled for their spills, and its launch."""
    for kernel, tunable, shape in classes():
        if shape not in PUBLISHED:
            continue
        run = tunable.problem(shape, options.device)
        for numbers in tunable.candidates(shape, ARCH):

            def work(kernel=kernel, tunable=tunable, shape=shape, run=run, numbers=numbers) -> Figures:
                spill = spilled(tunable, shape, numbers, ARCH)
                if spill is not None and spill <= MOST_SPILLED:
                    run(numbers)
                return {}

            yield f"{kernel} {shape} {numbers}", work


BLOCKS: dict[str, Callable[[Options], Cases]] = {
    "smoke": smoke.cases,
    "step": step.cases,
    "attention": attention.cases,
    "lm_head": lm_head.cases,
    "pointwise": pointwise.cases,
    "rollout": rollout.cases,
    "tune": tuning_cases,
}


def hashes() -> dict[str, Any]:
    """What the keys of the cache depend on: triton, its files, and the package's sources."""
    root = Path(fastvst_kernels.__file__).parent
    sources = {str(p.relative_to(root)): _digest(p.read_bytes()) for p in sorted(root.rglob("*.py"))}
    key = hashlib.sha256(triton_key().encode()).hexdigest()
    return {"python": platform.python_version(), "triton": triton.__version__, "key": key, "sources": sources}


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def all_cases(blocks: list[str], only: str) -> Iterator[tuple[str, Callable[[], Figures]]]:
    """The cases of the blocks on CUDA, and the smoke cases at the sizes of the memory checker."""
    options = Options(Path(tempfile.mkdtemp()) / "results.jsonl", compile_only=True)
    small = Options(options.out, compile_only=True, small=True)
    for block in blocks:
        for name, work in BLOCKS[block](options):
            if only in name:
                yield f"{block} / {name}", work
        if block == "smoke":
            for name, work in BLOCKS[block](small):
                if only in name:
                    yield f"{block}, small / {name}", work


def compile_cases(blocks: list[str], only: str, shard: tuple[int, int], gpu: str) -> tuple[int, int, list[str]]:
    """Run every N-th case from the I-th on; (compiled, cached, cases that failed)."""
    failed: list[str] = []
    with compilations() as kernels, pretended_gpu(compiles=True, name=gpu) as seen:
        torch.manual_seed(0)
        for number, (name, work) in enumerate(all_cases(blocks, only)):
            if number % shard[1] != shard[0]:
                continue
            begin = time.perf_counter()
            try:
                work()
            except Exception as error:  # the other cases still need their kernels
                traceback.print_exc()
                failed.append(f"{name}: {type(error).__name__}: {error}"[:300])
            print(f"{name}: {time.perf_counter() - begin:.1f} s, {dict(kernels)}", flush=True)
            torch.cuda.empty_cache()
    if shard == (0, 1):
        make_stubs(seen.driver)
    return kernels["compiled"], kernels["cached"], failed


# -------------------------------------------------------------------------------------------------------- launch stubs


def make_stubs(driver: FakeDriver) -> None:
    """The C modules that launch kernels, one for each signature, and triton's own; triton 3.7 needs none."""
    if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7):
        return
    sources = {_stub_source(src, metadata) for src, metadata in driver.kernels}
    for source in sorted(sources):
        make_module(source, "__triton_launcher")
    make_module(Path(nvidia.dirname, "driver.c").read_text(), "cuda_utils")
    print(f"{len(sources)} launch stubs", flush=True)


def _stub_source(src: Any, metadata: Any) -> str:
    constants = {(src.fn.arg_names.index(i),) if isinstance(i, str) else i: v for i, v in src.constants.items()}
    return nvidia.make_launcher(constants, dict(src.signature), getattr(metadata, "tensordesc_meta", None))


def make_module(source: str, name: str) -> None:
    """Compile a C module and file it under the keys of all `PLATFORMS`. It is not loaded: there is no driver."""
    file = name + sysconfig.get_config_var("EXT_SUFFIX")
    keys = {hashlib.sha256((source + p).encode()).hexdigest() for p in (build.platform_key(), *PLATFORMS)}
    missing = [key for key in sorted(keys) if get_cache_manager(key).get_file(file) is None]
    if not missing:
        return
    with tempfile.TemporaryDirectory() as folder:
        empty = Path(folder, "libcuda.so.1")  # to link against
        flags = ("-shared", "-x", "c", "/dev/null", "-Wl,-soname,libcuda.so.1", "-o", str(empty))
        subprocess.run(["gcc", *flags], check=True)
        text = Path(folder, f"{name}.c")
        text.write_text(source)
        libraries = [nvidia.libdevice_dir, folder]
        made = build._build(name, str(text), folder, libraries, nvidia.include_dirs, nvidia.libraries, [])
        data = Path(made).read_bytes()
    for key in missing:
        get_cache_manager(key).put(data, file, binary=True)


# --------------------------------------------------------------------------------------------------------- the command


def pack(cache: Path, out: Path) -> None:
    """Write the cache and what its keys depend on as one archive."""
    (cache / places.NOTE).write_text(json.dumps(hashes(), indent=1))
    partial = out.with_suffix(".partial")
    with tarfile.open(partial, "w:xz", preset=6) as tar:
        tar.add(cache, arcname=cache.name)
    partial.replace(out)


def main(argv: list[str] | None = None) -> int:
    """The command line; 1 if a case failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="the archive; without it only the folder is filled")
    parser.add_argument("--cache", type=Path, default=places.CACHE, help="the folder")
    parser.add_argument("--blocks", default=",".join(BLOCKS), help="names by comma")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--shard", default="0/1", help="I/N: every N-th case from the I-th on")
    parser.add_argument("--gpu", default=NAME, help="its name, which chooses the table of tiles (default %(default)s)")
    parser.add_argument("--fresh", action="store_true", help="empty the folder first: kernels of older sources")
    arguments = parser.parse_args(argv)
    blocks = arguments.blocks.split(",")
    if unknown := sorted(set(blocks) - set(BLOCKS)):
        parser.error(f"--blocks names {unknown}; the blocks are {', '.join(BLOCKS)}")
    index, count = map(int, arguments.shard.split("/"))
    if arguments.fresh:
        shutil.rmtree(arguments.cache, ignore_errors=True)
    arguments.cache.mkdir(parents=True, exist_ok=True)
    triton.knobs.cache.dir = str(arguments.cache)
    triton.knobs.compilation.store_binary_only = True
    compiled, cached, failed = compile_cases(blocks, arguments.only, (index, count), arguments.gpu)
    print(*failed, f"{compiled} compiled, {cached} in the cache, {len(failed)} cases failed", sep="\n", flush=True)
    if arguments.out is not None:
        pack(arguments.cache, arguments.out)
        print(f"{arguments.out}: {arguments.out.stat().st_size / 1e6:.1f} MB", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
