"""A host's packets to its guests, from the namespace that the calling thread is in."""

import os
import socket
import struct

ECHO_PORT = 7
ICMP_ECHO, IPV4_HEADER = 8, 20


def ping(address: str, timeout_s: float = 5.0) -> bool:
    """Whether it answers an echo request."""
    body = os.urandom(16)
    request = struct.pack("!BBHHH", ICMP_ECHO, 0, 0, os.getpid() & 0xFFFF, 1) + body
    request = request[:2] + struct.pack("!H", checksum(request)) + request[4:]
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as packets:
        packets.settimeout(timeout_s)
        packets.sendto(request, (address, 0))
        try:
            while True:
                answer = packets.recv(65536)[IPV4_HEADER:]
                if answer[0] == 0 and answer[4:] == request[4:]:
                    return True
        except TimeoutError:
            return False


def udp_echo(address: str, text: bytes, timeout_s: float = 5.0) -> bytes:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams:
        datagrams.settimeout(timeout_s)
        datagrams.sendto(text, (address, ECHO_PORT))
        return datagrams.recv(65536)


def tcp_connect(address: str, timeout_s: float = 5.0) -> socket.socket:
    stream = socket.create_connection((address, ECHO_PORT), timeout_s)
    stream.settimeout(timeout_s)
    return stream


def tcp_echo(stream: socket.socket, text: bytes) -> bytes:
    stream.sendall(text)
    answer = b""
    while len(answer) < len(text):
        part = stream.recv(65536)
        if not part:
            raise ConnectionResetError(f"closed after {len(answer)} of {len(text)} bytes")
        answer += part
    return answer


def flows(address: str) -> bool:
    """Whether ping, UDP and TCP come back as they were sent."""
    text = os.urandom(64)
    with tcp_connect(address) as stream:
        return ping(address) and udp_echo(address, text) == tcp_echo(stream, text) == text


def checksum(data: bytes) -> int:
    """RFC 1071, of an even number of bytes."""
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF
