"""systemd's notification protocol: datagrams of `NAME=VALUE` lines to the socket it names.

Source: sd_notify(3), sd_watchdog_enabled(3). Without a service manager nothing is sent.
"""

import os
import re
import socket
from collections.abc import MutableMapping
from typing import Final

import structlog

SOCKET: Final = "NOTIFY_SOCKET"
WATCHDOG: Final = ("WATCHDOG_USEC", "WATCHDOG_PID")
USEC: Final = re.compile(r"[0-9]{1,18}")
STATUS_CHARS: Final = 200

log = structlog.get_logger()


class ServiceManager:
    """Whoever started this process and wants to know how it is.

    A datagram that cannot be delivered is logged once and otherwise ignored: a manager that is
    being restarted must not stop the worker, and one that gets no more signs of life restarts it.

    Args:
        environment: its variables for this process are taken out, so that no child has them.
    """

    def __init__(self, environment: MutableMapping[str, str]) -> None:
        address = environment.pop(SOCKET, "")
        usec, pid = (environment.pop(name, "") for name in WATCHDOG)
        # `@` stands for the zero byte of an abstract address.
        self._address = f"\0{address[1:]}" if address.startswith("@") else address
        self._failed = False
        meant = not pid or pid == str(os.getpid())
        given = USEC.fullmatch(usec) is not None and meant and bool(address)
        self.watchdog_s: float | None = (int(usec) / 1e6 or None) if given else None

    @property
    def listens(self) -> bool:
        """Whether there is one."""
        return bool(self._address)

    def ready(self) -> None:
        """The worker has started."""
        self._send("READY=1")

    def stopping(self) -> None:
        """The worker has begun to shut down."""
        self._send("STOPPING=1")

    def alive(self) -> None:
        """Restart the watchdog's timer."""
        self._send("WATCHDOG=1")

    def status(self, text: str) -> None:
        """One line for `systemctl status`."""
        self._send(f"STATUS={' '.join(text.split())[:STATUS_CHARS]}")

    def _send(self, line: str) -> None:
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
                sender.setblocking(False)
                sender.sendto(line.encode(), self._address)
        except OSError as error:
            if not self._failed:
                log.warning("service_manager.unreachable", sent=line, error=str(error))
            self._failed = True
        else:
            self._failed = False
