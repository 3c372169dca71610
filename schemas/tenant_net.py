"""The rules of a `TenantNet` that need no host: it is checked, not trusted.

The decoder only checks types and ranges, because the allowed range is a setting; the network
handlers and `hostd decode` call `check_net_of`. The handlers also check that a net belongs to one
tenant, overlaps nothing and equals that of `tenant.json`, since they know the host.
"""

import ipaddress
from collections.abc import Sequence

from schemas import naming
from schemas.decode_error import DecodeError, quoted
from schemas.requests import TENANT_NET_ID_MAX, NetworkRequest, TenantNet

PREFIX_MIN, PREFIX_MAX = 8, 29


def check_net_of(request: NetworkRequest, allowed: Sequence[str]) -> None:
    """As `check_net`, for the net of a command.

    Raises:
        DecodeError: with the path in its envelope.
    """
    check_net(request.net, allowed, f"$.request.{request.kind}.net")


def check_net(net: TenantNet, allowed: Sequence[str], path: str = "$.net") -> None:
    """Check that the net is consistent and lies in one of the `allowed` CIDRs.

    The subnet is written canonically, /8 to /29; the gateway is a host address in it; the bridge's
    name is the derived one.

    Raises:
        DecodeError: with the path of the first field that breaks a rule, below `path`.
    """
    if not 0 <= net.tenant_net_id <= TENANT_NET_ID_MAX:
        raise DecodeError(
            f"{path}.tenant_net_id", f"got {net.tenant_net_id}, want 0 to {TENANT_NET_ID_MAX}"
        )
    subnet = _subnet(net.ipv4_subnet, f"{path}.ipv4_subnet")
    if not any(subnet.subnet_of(naming.subnet_of(each)) for each in allowed):
        raise DecodeError(
            f"{path}.ipv4_subnet",
            f"got {subnet}, want a subnet within [network] allowed: {', '.join(allowed)}",
        )
    gateway = address_of(net.gateway_ip, f"{path}.gateway_ip")
    if gateway not in subnet:
        raise DecodeError(
            f"{path}.gateway_ip", f"got gateway_ip {gateway}, want an address in {subnet}"
        )
    if gateway in (subnet.network_address, subnet.broadcast_address):
        raise DecodeError(
            f"{path}.gateway_ip", f"got gateway_ip {gateway}, want a host address of {subnet}"
        )
    derived = naming.bridge_name(net.tenant_net_id)
    if net.bridge_name != derived:
        raise DecodeError(f"{path}.bridge_name", f"got {quoted(net.bridge_name)}, want {derived}")


def address_of(text: str, path: str) -> ipaddress.IPv4Address:
    """An IPv4 address in its canonical spelling.

    Raises:
        DecodeError: it is not.
    """
    try:
        return ipaddress.IPv4Address(text)
    except ValueError:
        raise DecodeError(path, f"got {quoted(text)}, want an IPv4 address") from None


def _subnet(text: str, path: str) -> ipaddress.IPv4Network:
    try:
        subnet = ipaddress.IPv4Network(text)
    except ValueError:
        raise DecodeError(
            path, f"got {quoted(text)}, want an IPv4 subnet without host bits"
        ) from None
    if str(subnet) != text:
        raise DecodeError(path, f"got {quoted(text)}, want it written as {subnet}")
    if not PREFIX_MIN <= subnet.prefixlen <= PREFIX_MAX:
        raise DecodeError(path, f"got /{subnet.prefixlen}, want /{PREFIX_MIN} to /{PREFIX_MAX}")
    return subnet
