"""Frames as a guest may craft them, honest or not."""

import socket
import struct

BROADCAST = "ff:ff:ff:ff:ff:ff"
IPV4, ARP, IPV6, VLAN, QINQ, EAPOL = 0x0800, 0x0806, 0x86DD, 0x8100, 0x88A8, 0x888E
REQUEST, REPLY = 1, 2


def mac(text: str) -> bytes:
    return bytes.fromhex(text.replace(":", ""))


def ethernet(src: str, dst: str, protocol: int, payload: bytes) -> bytes:
    return (mac(dst) + mac(src) + struct.pack("!H", protocol) + payload).ljust(60, b"\0")


def checksum(data: bytes) -> int:
    data += bytes(len(data) % 2)
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def ipv4(src: str, dst: str, protocol: int, payload: bytes) -> bytes:
    head = struct.pack(
        "!BBHHHBBH4s4s",
        0x45,
        0,
        20 + len(payload),
        0,
        0,
        64,
        protocol,
        0,
        socket.inet_aton(src),
        socket.inet_aton(dst),
    )
    return head[:10] + struct.pack("!H", checksum(head)) + head[12:] + payload


def udp(src: str, dst: str, sport: int, dport: int, payload: bytes) -> bytes:
    """An IPv4 packet; UDP's own checksum is left out, which is allowed."""
    body = struct.pack("!HHHH", sport, dport, 8 + len(payload), 0) + payload
    return ipv4(src, dst, socket.IPPROTO_UDP, body)


def tcp_syn(src: str, dst: str, sport: int, dport: int) -> bytes:
    body = struct.pack("!HHIIBBHHH", sport, dport, 1, 0, 0x50, 0x02, 65535, 0, 0)
    pseudo = socket.inet_aton(src) + socket.inet_aton(dst) + struct.pack("!HH", 6, len(body))
    body = body[:16] + struct.pack("!H", checksum(pseudo + body)) + body[18:]
    return ipv4(src, dst, socket.IPPROTO_TCP, body)


def echo_request(src: str, dst: str, payload: bytes) -> bytes:
    body = struct.pack("!BBHHH", 8, 0, 0, 7, 1) + payload
    body = body[:2] + struct.pack("!H", checksum(body)) + body[4:]
    return ipv4(src, dst, socket.IPPROTO_ICMP, body)


def arp(operation: int, sender_mac: str, sender: str, target_mac: str, target: str) -> bytes:
    return (
        struct.pack("!HHBBH", 1, IPV4, 6, 4, operation)
        + mac(sender_mac)
        + socket.inet_aton(sender)
        + mac(target_mac)
        + socket.inet_aton(target)
    )


def ipv6(payload: bytes) -> bytes:
    """To all nodes, of a protocol that nobody has."""
    source, target = "fe80::1", "ff02::1"
    head = struct.pack("!IHBB", 0x60000000, len(payload), 59, 255)
    return (
        head
        + socket.inet_pton(socket.AF_INET6, source)
        + socket.inet_pton(socket.AF_INET6, target)
        + payload
    )
