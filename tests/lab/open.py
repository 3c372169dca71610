"""Open a shell in the lab: `make lab`. Leave it with `exit`, or kill it with Ctrl-A X."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.guests import cache
from tests.lab import qemu
from tests.lab.build import ensure_lab


def main() -> None:
    if not sys.stdin.isatty():
        sys.exit("the lab's shell needs a terminal; to run a command: python -m tests.lab.run")
    ensure_lab()
    size = os.get_terminal_size()
    environment = {
        "TERM": os.environ.get("TERM", "linux"),
        "LAB_TERMINAL": f"rows {size.lines} cols {size.columns}",  # unknown to a serial line
    }
    with tempfile.TemporaryDirectory(prefix="lab-", dir=cache.BUILD) as scratch:
        source = Path(scratch) / "source.tar"
        qemu.write_source(source, [], {}, environment)
        command = qemu.command_line(source, mem_mib=3072, shell=True)
        subprocess.run(command, check=False, env={**os.environ, "TMPDIR": scratch})


if __name__ == "__main__":
    main()
