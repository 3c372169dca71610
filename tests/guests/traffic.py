"""Traffic to a test guest from where this thread is: ping, UDP and TCP echo. Blocks."""

import os
import socket
import struct

ICMP_ECHO = 8
IPV4_HEADER = 20
ECHO_PORT = 7


def ping(address: str, timeout_s: float = 2.0) -> bool:
    """Whether it answers one ICMP echo request. Needs: CAP_NET_RAW."""
    request = struct.pack(">BBHHH8s", ICMP_ECHO, 0, 0, os.getpid() & 0xFFFF, 1, os.urandom(8))
    request = request[:2] + struct.pack(">H", _checksum(request)) + request[4:]
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as packets:
        packets.settimeout(timeout_s)
        packets.sendto(request, (address, 0))
        try:
            while True:
                icmp = packets.recv(65536)[IPV4_HEADER:]
                if icmp[0] == 0 and icmp[4:] == request[4:] and _checksum(icmp) == 0:
                    return True
        except TimeoutError:
            return False


def udp_echo(address: str, payload: bytes, timeout_s: float = 3.0) -> bytes:
    """What comes back from the guest's UDP port 7."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams:
        datagrams.settimeout(timeout_s)
        datagrams.sendto(payload, (address, ECHO_PORT))
        return datagrams.recv(65536)


def tcp_connect(address: str, timeout_s: float = 3.0) -> socket.socket:
    """A stream to the guest's TCP port 7."""
    return socket.create_connection((address, ECHO_PORT), timeout_s)


def tcp_echo(address: str, payload: bytes, timeout_s: float = 5.0) -> bytes:
    """What comes back of it when this side has said all."""
    with tcp_connect(address, timeout_s) as stream:
        stream.sendall(payload)
        stream.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: stream.recv(65536), b""))


def _checksum(data: bytes) -> int:
    """RFC 1071, of an even number of bytes."""
    total: int = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF
