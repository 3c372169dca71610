"""A line per jailer execution in `<state>/launches.log`: what was started, and how often."""

import os
import time

LOG_BYTES = 1_048_576


class LaunchLog:
    """Root-only and bounded: past 1 MiB the file becomes `launches.log.1`, replacing the last."""

    def __init__(self, state_dir: str) -> None:
        self._path = f"{state_dir}/launches.log"

    def record(self, jail_id: str, uid: int) -> None:
        """Append `<unix ms> <jail id> <uid>`, before the jailer is executed.

        Raises:
            OSError: the state directory cannot be written; then nothing may be started.
        """
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        fd = os.open(self._path, flags, 0o600)
        try:
            os.write(fd, f"{time.time_ns() // 1_000_000} {jail_id} {uid}\n".encode())
            full = os.fstat(fd).st_size >= LOG_BYTES
        finally:
            os.close(fd)
        if full:
            os.replace(self._path, f"{self._path}.1")
