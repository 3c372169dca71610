"""The rules of a `TenantNet` that need no host: it is checked, not trusted.

The decoder only checks types and ranges, because what is allowed is a setting: intake and the
network handlers call `check_net`. That a net belongs to one tenant, overlaps nothing and equals
`tenant.json`'s is for the handlers, which know the host.
"""

import ipaddress
from collections.abc import Sequence

from schemas import naming
from schemas.decode_error import DecodeError, quoted
from schemas.requests import TENANT_NET_ID_MAX, TenantNet

PREFIX_MIN, PREFIX_MAX = 8, 29


def check_net(net: TenantNet, allowed: Sequence[str], path: str = "$.net") -> None:
    """That the net is sound in itself and lies in one of the `allowed` CIDRs.

    The subnet is written canonically, /8 to /29; the gateway is a host address in it; the bridge's
    name is the derived one.

    Raises:
        DecodeError: with the path of the first field that breaks a rule, below `path`.
    """
    if not 0 <= net.tenant_net_id <= TENANT_NET_ID_MAX:
        raise DecodeError(f"{path}.tenant_net_id", f"is not 0 to {TENANT_NET_ID_MAX}")
    subnet = _subnet(net.ipv4_subnet, f"{path}.ipv4_subnet")
    if not any(subnet.subnet_of(ipaddress.IPv4Network(each)) for each in allowed):
        raise DecodeError(f"{path}.ipv4_subnet", f"{subnet} is not in {', '.join(allowed)}")
    gateway = address_of(net.gateway_ip, f"{path}.gateway_ip")
    if gateway not in subnet:
        raise DecodeError(f"{path}.gateway_ip", f"{gateway} is not in {subnet}")
    if gateway in (subnet.network_address, subnet.broadcast_address):
        raise DecodeError(f"{path}.gateway_ip", f"{gateway} is no host address of {subnet}")
    derived = naming.bridge_name(net.tenant_net_id)
    if net.bridge_name != derived:
        raise DecodeError(f"{path}.bridge_name", f"is {quoted(net.bridge_name)}, not {derived}")


def address_of(text: str, path: str) -> ipaddress.IPv4Address:
    """An IPv4 address in its one canonical spelling.

    Raises:
        DecodeError: it is not.
    """
    try:
        return ipaddress.IPv4Address(text)
    except ValueError:
        raise DecodeError(path, f"{quoted(text)} is no IPv4 address") from None


def _subnet(text: str, path: str) -> ipaddress.IPv4Network:
    try:
        subnet = ipaddress.IPv4Network(text)
    except ValueError:
        raise DecodeError(path, f"{quoted(text)} is no IPv4 subnet without host bits") from None
    if str(subnet) != text:
        raise DecodeError(path, f"{quoted(text)} is not written as {subnet}")
    if not PREFIX_MIN <= subnet.prefixlen <= PREFIX_MAX:
        raise DecodeError(path, f"/{subnet.prefixlen} is not /{PREFIX_MIN} to /{PREFIX_MAX}")
    return subnet
