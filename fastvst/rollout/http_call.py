"""One HTTP request that another thread can end, with an optional bearer token that no message shows."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
from dataclasses import dataclass
from email.message import Message
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

CONNECT_WAIT = 10.0  # seconds until a server accepts a connection


class CallCancelled(RuntimeError):
    """`Call.cancel` has ended the request."""


@dataclass(frozen=True)
class Reply:
    """What a server has sent: any status, redirects included, because they are not followed."""

    status: int
    headers: Message
    body: bytes


class Call:
    """A request, and its repetitions, that `cancel` ends from any thread. Proxies are not used.

    Closing the connection also tells the server: vLLM stops to sample for a client that has gone.
    """

    def __init__(self) -> None:
        self.cancelled = threading.Event()
        self._lock = threading.Lock()
        self._connection: http.client.HTTPConnection | None = None

    def send(self, method: str, url: str, *, key: str = "", body: Any = None, timeout: float = 600.0) -> Reply:
        """Send a request and wait for all of the response.

        Args:
            url: as `check_url` accepts it, and a path.
            key: sent as a bearer token.
            body: JSON-able; None sends no body.
            timeout: seconds without a byte.

        Raises:
            CallCancelled: `cancel` was called.
            OSError, http.client.HTTPException: there is no response.
        """
        parts = urlsplit(url)
        secure = parts.scheme == "https"
        kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        connection = kind(parts.hostname or "", parts.port, timeout=min(timeout, CONNECT_WAIT))
        headers = {"Accept": "application/json", "Connection": "close"}
        if body is not None:
            headers["Content-Type"] = "application/json"
        if key:
            headers["Authorization"] = f"Bearer {key}"
        with self._lock:
            self._connection = connection
        try:
            connection.connect()
            connection.sock.settimeout(timeout)
            self._check()
            path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            connection.request(method, path, None if body is None else json.dumps(body).encode(), headers)
            response = connection.getresponse()
            reply = Reply(response.status, response.headers, response.read())
            self._check()
            return reply
        except Exception:
            self._check()  # a connection that was shut down fails in many ways
            raise
        finally:
            with self._lock:
                self._connection = None
            connection.close()

    def pause(self, seconds: float) -> None:
        """Wait before the next try. Raises CallCancelled as soon as `cancel` is called."""
        self.cancelled.wait(seconds)
        self._check()

    def cancel(self) -> None:
        """End the request that is in progress, and refuse further ones."""
        self.cancelled.set()
        with self._lock:
            sock = None if self._connection is None else self._connection.sock
            if sock is not None:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)

    def _check(self) -> None:
        if self.cancelled.is_set():
            raise CallCancelled("the request was cancelled")


def check_url(url: str) -> str:
    """The address of a server without a slash at its end.

    Raises:
        ValueError: not http or https, no host, or a user name, a password, a query or a fragment. The message never
            shows what could be a secret.
    """
    parts = urlsplit(url.strip())
    if parts.username is not None or parts.password is not None or "@" in parts.netloc:
        raise ValueError(f"the address of {parts.hostname} has a user name or a password: give an API key by a file")
    if parts.query or parts.fragment:
        raise ValueError(f"the address of {parts.hostname} has a query or a fragment: leave it out")
    try:
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # not a port
        good = False
    if not good:
        raise ValueError(f"{url!r} is no address of a server; expected http://host:port/v1")
    return url.strip().rstrip("/")


def read_key(path: str, otherwise: str = "") -> str:
    """An API key: the content of the file `path`, or without a path `otherwise`.

    Raises:
        ValueError: the file cannot be read, or it holds no key. The message does not show the key.
    """
    name = path or "the environment variable OPENAI_API_KEY"
    try:
        key = (Path(path).read_text(encoding="utf-8") if path else otherwise).strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise ValueError(f"{path} cannot be read: {reason}; expected a file with an API key") from None
    if (path and not key) or not all("!" <= letter <= "~" for letter in key):
        raise ValueError(f"{name} holds no API key; expected one word of visible ASCII characters")
    return key
