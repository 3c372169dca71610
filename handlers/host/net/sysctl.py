"""Kernel settings below /proc/sys/net of the calling thread's network namespace; no other part.

Source: Documentation/networking/ip-sysctl.rst. Needs: CAP_NET_ADMIN. procfs shows each thread the
settings of its own namespace, so these run in the thread that does the netlink work.
"""

import os

from handlers.errors import HostFault, of_os_error

ROOT = "/proc/sys/net"
VALUE_BYTES = 4096


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
    try:
        descriptor = os.open(f"{ROOT}/{name}", os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    except OSError as error:
        if read_sysctl(name) == value:  # a read-only /proc
            return False
        raise of_os_error(error, f"cannot set sysctl {name} to {value}") from error
    try:
        if os.pread(descriptor, VALUE_BYTES, 0).strip() == value.encode():
            return False
        os.pwrite(descriptor, value.encode(), 0)
        now = os.pread(descriptor, VALUE_BYTES, 0).strip()
    except OSError as error:
        raise of_os_error(error, f"cannot set sysctl {name} to {value}") from error
    finally:
        os.close(descriptor)
    if now != value.encode():
        raise HostFault(f"sysctl {name} read-back mismatch: set to {value}, reads {now!r}")
    return True
