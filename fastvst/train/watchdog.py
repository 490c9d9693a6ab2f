"""When one rank dies, the other ranks end within seconds and name it.

Every rank keeps a TCP connection to rank 0. The kernel closes the connection when the process dies, in any state, so no
heartbeats are needed and a slow rank is never mistaken for a dead one. TCP keep-alive detects a machine that disappears
without closing its connections after about 30 seconds. A process that hangs is ended by the timeout of the collectives.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import sys
import threading
import weakref
from types import TracebackType

import torch.distributed as dist

from fastvst.train.distributed import World

EXIT_STATUS = 17  # exit status of a rank that ends because another rank died
_SETTLE = 5.0  # seconds that a failed collective waits for the name of the dead rank
_FAILED = "it failed with"
_OWN_ERROR = 2.0  # seconds in which this rank may raise the error that another rank has just raised


class Watchdog:
    """Context manager around a whole distributed run; does nothing with one process.

    A normal exit is announced to the other ranks, and an exception is sent to them. When another rank dies, this
    process prints its number and ends with status 17, without cleaning up: its collectives would never finish.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self._sockets: list[socket.socket] = []
        self._names: dict[int, str] = {}
        self._links: dict[int, socket.socket] = {}  # rank 0: every other rank; others: rank 0
        self._lock = threading.Lock()
        self._closing = False
        self._verdict = threading.Event()
        self._leaving = threading.Event()
        if world.store is not None:
            self._connect(dist.PrefixStore("watchdog", world.store))

    def __enter__(self) -> Watchdog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self._links:
            return
        if error is not None and _from_another_rank(error):
            # Probably another rank is dead; the connections report it now, and `_end` exits during the wait.
            print(f"rank {self.world.rank}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            self._verdict.wait(_SETTLE)
        clean = error is None or (isinstance(error, SystemExit) and not error.code)
        text = "" if clean else " ".join(f"{type(error).__name__}: {error}".split())[:2000]
        with self._lock:
            self._closing = True
            self._leaving.set()
            self._send_all("bye" if clean else f"dead {self.world.rank} {_FAILED} {text}")
        for link in self._sockets:
            with contextlib.suppress(OSError):
                link.shutdown(socket.SHUT_WR)

    def _connect(self, store: dist.Store) -> None:
        rank = self.world.rank
        size = self.world.size
        me = f"{socket.gethostname()} (pid {os.getpid()})"
        if rank == 0:
            everywhere = self.world.local_size < size
            server = socket.create_server(("" if everywhere else "127.0.0.1", 0), backlog=size)
            key = os.urandom(16).hex()
            store.set("address", f"{self.world.host if everywhere else '127.0.0.1'} {server.getsockname()[1]} {key}")
            while len(self._links) < size - 1:
                link, _ = server.accept()
                link.settimeout(60)
                words = _read_line(link).split(" ", 2)
                if len(words) != 3 or words[0] != key:  # not a rank of this run
                    link.close()
                    continue
                self._links[int(words[1])] = link
                self._names[int(words[1])] = words[2]
            server.close()
            for link in self._links.values():
                link.sendall(f"{me}\n".encode())
        else:
            host, port, key = store.get("address").decode().split(" ")
            link = socket.create_connection((host, int(port)), timeout=60)
            link.sendall(f"{key} {rank} {me}\n".encode())
            link.settimeout(None)
            self._links[0] = link
            self._names[0] = _read_line(link)
        for link in self._links.values():
            link.settimeout(None)
            _keep_alive(link)
        self._sockets = list(self._links.values())
        # Loader workers are forks: a copy of a connection in a worker would stay open after this process has died.
        alive = weakref.ref(self)
        os.register_at_fork(after_in_child=lambda: _close_copies(alive()))
        threading.Thread(target=self._listen, name="watchdog", daemon=True).start()

    def _listen(self) -> None:
        selector = selectors.DefaultSelector()
        for rank, link in self._links.items():
            selector.register(link, selectors.EVENT_READ, [rank, b""])
        while selector.get_map():
            for key, _ in selector.select():
                rank, text = key.data
                link = self._links[rank]
                try:
                    data = link.recv(4096)
                except OSError:
                    data = b""
                text += data
                if b"\n" in text:
                    selector.unregister(link)
                    line = text.split(b"\n")[0].decode(errors="replace")
                    if line != "bye":
                        _, dead, reason = line.split(" ", 2)
                        self._end(int(dead), reason)
                elif not data:
                    selector.unregister(link)
                    self._end(rank, "its connection ended: the process was killed or its machine went down")
                else:
                    key.data[1] = text

    def _end(self, dead: int, reason: str) -> None:
        if reason.startswith(_FAILED):
            self._leaving.wait(_OWN_ERROR)  # some errors occur on all ranks at once; then each rank reports its own
        with self._lock:
            if self.world.rank == 0:
                self._send_all(f"dead {dead} {reason}")
            if self._closing:  # this rank has finished and is exiting
                return
            self._verdict.set()
            name = f" on {self._names[dead]}" if dead in self._names else ""
            print(
                f"rank {self.world.rank}: rank {dead}{name} is gone; {reason}. Ending this rank too. Start the run "
                "again with --resume auto to continue from the last complete checkpoint",
                file=sys.stderr,
                flush=True,
            )
            sys.stdout.flush()
            os._exit(EXIT_STATUS)

    def _send_all(self, line: str) -> None:
        for link in self._sockets:
            with contextlib.suppress(OSError):
                link.sendall(f"{line}\n".encode())


def _close_copies(watchdog: Watchdog | None) -> None:
    for link in watchdog._sockets if watchdog is not None else ():
        link.close()


def _from_another_rank(error: BaseException) -> bool:
    """True if a collective raises this error when its peer is gone."""
    text = str(error).lower()
    words = ("gloo", "nccl", "connection", "timed out", "timeout")
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and any(w in text for w in words))


def _read_line(link: socket.socket) -> str:
    text = b""
    while not text.endswith(b"\n"):
        byte = link.recv(1)
        if not byte:
            return ""
        text += byte
    return text.decode(errors="replace").rstrip("\n")


def _keep_alive(link: socket.socket) -> None:
    """Probe the connection every 5 s after 10 s of silence; after four probes without a reply (30 s) it is closed."""
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in ((socket.TCP_KEEPIDLE, 10), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 4)):
        link.setsockopt(socket.IPPROTO_TCP, option, value)
