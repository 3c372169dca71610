"""Build everything that the tests and the demo need below build/: `python -m tests.guests.build`.

Idempotent: what was made from the same inputs is left alone. Needs the packages of packages.txt.
"""

import time
from collections.abc import Callable

from tests.guests.firecracker import ensure_firecracker
from tests.guests.kernel import ensure_kernel
from tests.guests.linux.build import ensure_linux_guest
from tests.guests.mini.build import ensure_mini_guest
from tests.lab.build import ensure_lab

TARGETS: dict[str, Callable[[], bool]] = {
    "firecracker and jailer": ensure_firecracker,
    "mini guest": ensure_mini_guest,
    "kernel": ensure_kernel,
    "Linux guest": ensure_linux_guest,
    "lab": ensure_lab,
}


def main() -> None:
    for name, ensure in TARGETS.items():
        started = time.monotonic()
        built = ensure()
        took = f"built in {time.monotonic() - started:.1f} s" if built else "up to date"
        print(f"{name}: {took}", flush=True)


if __name__ == "__main__":
    main()
