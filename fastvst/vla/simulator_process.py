"""The process of a simulator and its two pipes; see children/serve.py for the messages."""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
from collections.abc import Sequence
from typing import Any, BinaryIO

from fastvst.processes import Supervised
from fastvst.vla.children.serve import HEAD, MAGIC
from fastvst.vla.replies import ARRAY_BYTES, HEADER_BYTES, SimulatorError, read_header

REQUEST_BYTES = 1 << 15  # fits into an empty pipe, so that a write never waits
OUTPUT_TAIL = 1000  # bytes of a dead simulator's output in the message
PIECE = 1 << 20  # bytes of a read
STATUS_SECONDS = 10.0  # for the supervisor of a dead process to pass on its last output


class SimulatorProcess:
    """A process that answers requests, under a supervisor that leaves nothing of it (see supervisor.py)."""

    def __init__(self, command: Sequence[str], variables: dict[str, str]) -> None:
        """Start it.

        Args:
            variables: all environment variables of the process.
        """
        with contextlib.ExitStack() as stack:
            self._output: BinaryIO = stack.enter_context(tempfile.TemporaryFile())
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._output}
            self._supervised = Supervised.start(command, variables, **pipes)
            self._closing = stack.pop_all()
        self._received = bytearray()
        os.set_blocking(self.fileno(), False)

    def fileno(self) -> int:
        """Descriptor of the replies."""
        assert self._supervised.process.stdout is not None
        return self._supervised.process.stdout.fileno()

    def send(self, header: bytes, body: bytes) -> None:
        """Send a request. The process must wait for it; a process that is dead is noticed by `receive`.

        Raises:
            ValueError: it is too long.
        """
        message = HEAD.pack(MAGIC, len(header), len(body)) + header + body
        if len(message) > REQUEST_BYTES:
            raise ValueError(f"a request of {len(message)} bytes; expected at most {REQUEST_BYTES}")
        assert self._supervised.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._supervised.process.stdin.write(message)

    def receive(self) -> tuple[dict[str, Any], bytes] | None:
        """The header and the arrays' bytes of the next reply; None if it is not there yet.

        Raises:
            SimulatorError: "died", "protocol".
        """
        while (found := self._message()) is None:
            try:
                piece = os.read(self.fileno(), PIECE)
            except BlockingIOError:
                return None
            if not piece:
                self._raise_dead()
            self._received += piece
        return found

    def tail(self) -> str:
        """The end of what the process has printed, for a message."""
        size = self._output.seek(0, os.SEEK_END)
        self._output.seek(max(0, size - OUTPUT_TAIL))
        text = self._output.read().decode(errors="replace").strip()
        return f"; its last output:\n{text}" if text else ""

    def end(self) -> None:
        """Kill the process and all that it started."""
        self._supervised.end()
        self._closing.close()

    def _raise_dead(self) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._supervised.process.wait(STATUS_SECONDS)
        status = self._supervised.process.returncode
        raise SimulatorError("died", f"its process ended with status {status}{self.tail()}")

    def _message(self) -> tuple[dict[str, Any], bytes] | None:
        data = self._received
        if len(data) < HEAD.size:
            return None
        magic, header_bytes, array_bytes = HEAD.unpack_from(data)
        if magic != MAGIC:
            raise SimulatorError("protocol", f"the reply begins with {bytes(data[:16])!r}")
        if header_bytes > HEADER_BYTES or array_bytes > ARRAY_BYTES:
            raise SimulatorError("protocol", f"a header of {header_bytes} bytes and arrays of {array_bytes} bytes")
        body = HEAD.size + header_bytes
        end = body + array_bytes
        if len(data) < end:
            return None
        header = read_header(bytes(data[HEAD.size : body]))
        arrays = bytes(data[body:end])
        del data[:end]
        return header, arrays
