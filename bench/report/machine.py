"""The measured machine; a number without it is meaningless."""

import os
import platform
import sqlite3
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

from tests.guests.firecracker import VERSION


def describe() -> list[str]:
    """Facts, one per line."""
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    pairs = (line.partition(":") for line in info.splitlines())
    fields = {name.strip(): value.strip() for name, _, value in pairs}
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20
    system = platform.freedesktop_os_release()["PRETTY_NAME"]
    virtual = ", itself a virtual machine" if "hypervisor" in fields.get("flags", "") else ""
    model = fields.get("model name", platform.machine())
    versions = (
        f"Firecracker {VERSION}",
        nats_version(),
        f"SQLite {sqlite3.sqlite_version}",
        f"nats-py {version('nats-py')}",
    )
    at = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    return [
        f"CPU: {model}, {os.cpu_count()} cores, {memory / 1024:.0f} GiB{virtual}",
        f"kernel {platform.release()}, {system}, Python {platform.python_version()}",
        ", ".join(versions),
        f"load average at the start {os.getloadavg()[0]:.2f}; {at}",
    ]


def nats_version() -> str:
    beside = Path(os.path.dirname(sys.executable), "nats-server")
    program = str(beside) if beside.exists() else "nats-server"
    done = subprocess.run([program, "--version"], check=True, capture_output=True, text=True)
    return done.stdout.strip().replace(": v", " ")
