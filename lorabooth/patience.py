"""A limit on how slow a server may be, whatever it sends: the time-outs of a socket begin again with each byte."""

import socket
import threading
import time
from contextlib import suppress
from types import TracebackType
from typing import Any

SLOW_BYTES, SLOW_SECONDS = 64 << 10, 120
"""A server that gives less than this in this time will not finish in this life."""


class Patience:
    """Cuts a connection over which too little comes, be it of the headers or of the body; a `with` block lasts as long as the request.

    The connection is read by a thread that waits in the kernel, so that another one has to look at the clock.
    """

    def __init__(self) -> None:
        self.over = False
        """Whether the connection was cut, which may look like the end of a body."""
        self._arrived, self._until = 0, time.monotonic() + SLOW_SECONDS
        self._socket: socket.socket | None = None
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def trace(self, event: str, told: dict[str, Any]) -> None:
        """Learn of the connection; the HTTP client calls this as its extension `trace`."""
        if event.endswith(("connect_tcp.complete", "start_tls.complete")):
            self._socket = told["return_value"].get_extra_info("socket")
            if self.over:
                self._cut()

    def arrived(self, count_bytes: int) -> None:
        """So much of the body came: where it is enough, the time begins again."""
        self._arrived += count_bytes
        if self._arrived >= SLOW_BYTES:
            self._arrived, self._until = 0, time.monotonic() + SLOW_SECONDS

    def _watch(self) -> None:
        while (left := self._until - time.monotonic()) > 0:
            if self._done.wait(left):
                return
        self.over = True
        self._cut()

    def _cut(self) -> None:
        with suppress(OSError):  # it is closed already, or TLS is about to take it over
            if self._socket is not None:
                # Of the plain socket: TLS would forget its state, which the other thread is reading with.
                socket.socket.shutdown(self._socket, socket.SHUT_RDWR)

    def __enter__(self) -> "Patience":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._done.set()
        self._thread.join()
