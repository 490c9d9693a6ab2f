"""Compile Triton kernels for any GPU on any machine, and read registers, spills, shared memory and instructions.

The wheels of triton contain ptxas, cuobjdump and nvdisasm. The process must not have TRITON_INTERPRET=1.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# Shared memory of one block at most, in bytes (CUDA programming guide, table "technical specifications").
SHARED_LIMIT = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
TENSOR_CORE = {"HMMA": r"\bHMMA\.", "HGMMA": r"\bHGMMA\.", "UTCHMMA": r"\bUTCHMMA\b|\bUTC\w*MMA\b"}


@dataclass(frozen=True)
class Compiled:
    """One kernel, compiled for one architecture.

    Attributes:
        registers: of each thread.
        spill_bytes: of each thread's stack.
        shared_bytes: shared memory of each program.
        shared_limit: shared memory that a program may have.
        instructions: length of the machine code; 0 if it was not disassembled.
        tensor_core: number of matrix instructions by kind (HMMA: mma.sync, HGMMA: wgmma, UTCHMMA: tcgen05).
        descriptor_loads: number of loads by tensor descriptors (TMA).
    """

    registers: int
    spill_bytes: int
    shared_bytes: int
    shared_limit: int
    instructions: int
    tensor_core: Mapping[str, int]
    descriptor_loads: int = 0

    @property
    def fits(self) -> bool:
        return self.shared_bytes <= self.shared_limit


def compile_kernel(
    kernel: Any,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    *,
    arch: int,
    num_warps: int,
    num_stages: int,
    maxnreg: int | None = None,
    unaligned: Sequence[str] = (),
    disassemble: bool = True,
) -> Compiled:
    """Compile `kernel` for sm_`arch` and inspect the result.

    Args:
        disassemble: read the instructions too, which takes a quarter of a second. The others are those of `build`.

    Raises:
        RuntimeError: the kernel does not compile for that architecture; with triton's message.
    """
    made = build(
        kernel,
        types,
        constants,
        arch=arch,
        num_warps=num_warps,
        num_stages=num_stages,
        maxnreg=maxnreg,
        unaligned=unaligned,
    )
    return inspect_cubin(made.asm["cubin"], shared_bytes=made.metadata.shared, arch=arch, disassemble=disassemble)


def build(
    kernel: Any,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    *,
    arch: int,
    num_warps: int,
    num_stages: int,
    maxnreg: int | None = None,
    unaligned: Sequence[str] = (),
) -> Any:
    """Compile `kernel` for sm_`arch`; returns triton's compiled kernel.

    Args:
        kernel: a `triton.jit` or `gluon.jit` function.
        types: the type of every other argument: "*bf16", "i32", "fp32", ...; of a Gluon descriptor its box and layout.
        constants: the value of every `tl.constexpr`.
        maxnreg: registers of a thread at most, as at the launch.
        unaligned: arguments that need not be multiples of 16. All other pointers and integers are multiples of 16, as
            at a launch with ordinary shapes; otherwise loads would not be vectorized.

    Raises:
        RuntimeError: the kernel does not compile for that architecture; with triton's message.
    """
    index = {name: i for i, name in enumerate(kernel.arg_names)}
    if missing := [n for n in kernel.arg_names if n not in types and n not in constants]:
        raise ValueError(f"arguments {missing} of {kernel.__name__} have neither a type nor a value")
    aligned = [n for n, t in types.items() if (t[0] == "*" or t in ("i32", "i64")) and n not in unaligned]
    source_class: Any = ASTSource
    if kernel.is_gluon():  # imported here, because its place may move and the other kernels do not need it
        from triton.experimental.gluon._runtime import GluonASTSource

        source_class = GluonASTSource
    source = source_class(
        kernel,
        {name: types.get(name, "constexpr") for name in kernel.arg_names},
        constexprs={(index[name],): value for name, value in constants.items()},
        attrs={(index[name],): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": num_warps, "num_stages": num_stages, "maxnreg": maxnreg}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def inspect_cubin(cubin: bytes, *, shared_bytes: int, arch: int, disassemble: bool = True) -> Compiled:
    """Registers, spills and, if it is disassembled, instructions of one compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _run("cuobjdump", "--dump-resource-usage", file.name)
        code = _run("nvdisasm", "-c", file.name) if disassemble else ""
    found = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump reports no resources: {usage[:500]}")
    registers, stack, local = map(int, found.groups())
    lines = [line for line in code.splitlines() if line.rstrip().endswith(";") or "/*0" in line]
    counts = {kind: len(re.findall(pattern, code)) for kind, pattern in TENSOR_CORE.items()}
    return Compiled(
        registers=registers,
        spill_bytes=stack + local,  # spills appear as stack
        shared_bytes=shared_bytes,
        shared_limit=SHARED_LIMIT[arch],
        instructions=len(lines),
        tensor_core={kind: n for kind, n in counts.items() if n},
        descriptor_loads=len(re.findall(r"\bUTMALDG\b", code)),
    )


def machine_code(cubin: bytes) -> str:
    """The machine code as text."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return _run("nvdisasm", "-c", file.name)


def memory_bits(cubin: bytes) -> dict[str, set[int]]:
    """Widths in bits of the accesses to global memory: {"load": {128, 32}, "store": {128}}."""
    code = machine_code(cubin)
    found: dict[str, set[int]] = {"load": set(), "store": set()}
    for kind, options in re.findall(r"\b(LDGSTS|LDG|STG)\b((?:\.\w+)*)", code):  # LDGSTS: cp.async
        width = next((int(o) for o in re.findall(r"\.[US]?(64|128|16|8)\b", options)), 32)
        found["store" if kind == "STG" else "load"].add(width)
    return found


def _run(tool: str, *arguments: str) -> str:
    done = subprocess.run([str(BINARIES / tool), *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{tool} failed: {done.stderr.strip()}")
    return done.stdout
