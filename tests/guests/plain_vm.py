"""Real Firecracker without a jail or hostd: what tests of the guests themselves run on.

Standard library only, so that it also runs in the lab before anything of hostd's is installed.
"""

import http.client
import json
import os
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from tests.guests import agent
from tests.guests.firecracker import FIRECRACKER


class ApiError(Exception):
    """Firecracker refused a request."""


class PlainVm:
    """One Firecracker process with its files in `directory`; killed at the end of its `with`."""

    def __init__(
        self,
        directory: Path,
        *,
        netns: str | None = None,
        firecracker: Path = FIRECRACKER,
        serial: bool = False,
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.vsock = directory / "v.sock"
        self._serial = (directory / "serial").open("wb") if serial else None
        enter = ["ip", "netns", "exec", netns] if netns else []
        enter += ["setpriv", "--pdeathsig", "KILL"]  # a test that is killed leaves no VM behind
        self.process = subprocess.Popen(
            [*enter, str(firecracker), "--api-sock", "api.sock", "--id", "plain"],
            cwd=directory,
            stdin=subprocess.DEVNULL,
            stdout=self._serial or subprocess.DEVNULL,
            stderr=subprocess.STDOUT,
        )

    def __enter__(self) -> Self:
        self._wait_for_api()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        if self._serial:
            self._serial.close()

    def wait(self, timeout_s: float = 10.0) -> int:
        """The exit code, once the VMM ended by itself."""
        return self.process.wait(timeout_s)

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """One API request.

        Raises:
            ApiError: any status but 200 and 204, with Firecracker's own words.
        """
        connection = _Connection(self.directory / "api.sock")
        try:
            content = None if body is None else json.dumps(body)
            connection.request(method, path, content, {"Content-Type": "application/json"})
            response = connection.getresponse()
            text = response.read().decode(errors="replace")
            if response.status not in (200, 204):
                raise ApiError(f"{method} {path}: {response.status} {text}")
            return json.loads(text) if text else None
        finally:
            connection.close()

    def boot(
        self,
        kernel: Path,
        *,
        boot_args: str,
        drives: Sequence[tuple[Path, bool]] = (),
        initrd: Path | None = None,
        tap: str | None = None,
        mac: str = "02:fc:00:00:00:02",
        mem_mib: int = 64,
    ) -> None:
        """Configure and start. `drives` are (image, read only), in their order."""
        machine = {"vcpu_count": 1, "mem_size_mib": mem_mib}
        self.call("PUT", "/machine-config", machine)
        source = {"kernel_image_path": str(kernel), "boot_args": boot_args}
        if initrd:
            source["initrd_path"] = str(initrd)
        self.call("PUT", "/boot-source", source)
        for number, (image, read_only) in enumerate(drives):
            drive = {
                "drive_id": f"d{number}",
                "path_on_host": str(image),
                "is_root_device": False,
                "is_read_only": read_only,
            }
            self.call("PUT", f"/drives/d{number}", drive)
        if tap:
            network = {"iface_id": "eth0", "host_dev_name": tap, "guest_mac": mac}
            self.call("PUT", "/network-interfaces/eth0", network)
        self.call("PUT", "/vsock", {"guest_cid": 3, "uds_path": "v.sock"})
        self.call("PUT", "/actions", {"action_type": "InstanceStart"})

    def snapshot(self, state: Path, mem: Path) -> None:
        """Pause and write a full snapshot; the VM stays paused."""
        self.call("PATCH", "/vm", {"state": "Paused"})
        paths = {"snapshot_path": str(state), "mem_file_path": str(mem)}
        self.call("PUT", "/snapshot/create", {"snapshot_type": "Full", **paths})

    def load(self, state: Path, mem: Path) -> None:
        """Restore a snapshot and let it run."""
        backend = {"backend_path": str(mem), "backend_type": "File"}
        body = {"snapshot_path": str(state), "mem_backend": backend, "resume_vm": True}
        self.call("PUT", "/snapshot/load", body)

    def send_ctrl_alt_del(self) -> None:
        self.call("PUT", "/actions", {"action_type": "SendCtrlAltDel"})

    def ask(self, request: Any, *, within_s: float = 10.0) -> Any:
        """The guest agent's answer, asked anew until there is one."""
        return agent.ask_until_answered(self.vsock, request, within_s=within_s)

    def _wait_for_api(self, within_s: float = 10.0) -> None:
        deadline = time.monotonic() + within_s
        while True:
            try:
                _Connection(self.directory / "api.sock").connect_and_close()
                return
            except OSError:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    self.kill()
                    raise
                time.sleep(0.001)


class _Connection(http.client.HTTPConnection):
    """HTTP over a Unix socket, whose path may be longer than 107 bytes."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=60)
        self._path = path

    def connect(self) -> None:
        directory = os.open(self._path.parent, os.O_PATH)
        try:
            self.sock = socket.socket(socket.AF_UNIX)
            self.sock.settimeout(self.timeout)
            self.sock.connect(f"/proc/self/fd/{directory}/{self._path.name}")
        finally:
            os.close(directory)

    def connect_and_close(self) -> None:
        try:
            self.connect()
        finally:
            self.close()
