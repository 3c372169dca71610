"""Kernel settings below /proc/sys/net of the calling thread's network namespace; no other part.

Source: Documentation/networking/ip-sysctl.rst. Needs: CAP_NET_ADMIN. procfs shows each thread the
settings of its own namespace, so these run in the thread that does the netlink work.
"""

import os

from handlers.errors import HostFault, of_os_error

ROOT = "/proc/sys/net"


def read_sysctl(name: str) -> str | None:
    """The value of e.g. `ipv4/ip_forward`, or None where this kernel has no such setting."""
    try:
        with open(f"{ROOT}/{name}", encoding="ascii") as file:
            return file.read().strip()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise of_os_error(error, f"cannot read sysctl {name}") from error


def ensure_sysctl(name: str, value: str) -> bool:
    """Set and read back; true if it had another value. Absent (IPv6 off, no br_netfilter): false.

    Raises:
        HostFault: it cannot be written, or the read-back differs.
    """
    before = read_sysctl(name)
    if before is None or before == value:
        return False
    try:
        descriptor = os.open(f"{ROOT}/{name}", os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(descriptor, value.encode())
        finally:
            os.close(descriptor)
    except OSError as error:
        raise of_os_error(error, f"cannot set sysctl {name} to {value}") from error
    if (now := read_sysctl(name)) != value:
        raise HostFault(f"sysctl {name} read-back mismatch: set to {value}, reads {now}")
    return True
