"""A private network namespace for the demo: it never touches the machine's interfaces.

Source: unshare(2), CLONE_NEWNET; netdevice(7), SIOCSIFFLAGS. Needs: CAP_SYS_ADMIN, CAP_NET_ADMIN.
"""

import ctypes
import fcntl
import os
import socket
import struct

from handlers.errors import HostFault

CLONE_NEWNET = 0x40000000
SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 0x1


def enter_new_network() -> None:
    """Move this process into a new network namespace with `lo` up. Call before starting threads.

    Raises:
        HostFault: permission denied, or the kernel has no network namespaces.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNET) != 0:
        error = ctypes.get_errno()
        raise HostFault(
            f"cannot create a network namespace: unshare(CLONE_NEWNET): {os.strerror(error)}"
        )
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        request = struct.pack("16sh14x", b"lo", 0)
        (flags,) = struct.unpack_from("h", fcntl.ioctl(control, SIOCGIFFLAGS, request), 16)
        fcntl.ioctl(control, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", flags | IFF_UP))
