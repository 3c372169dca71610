"""Names, addresses and IDs that are derived, never read from a file or a request. Pure."""

import hashlib
import ipaddress
import re
from functools import lru_cache
from typing import Final

from schemas.decode_error import DecodeError, quoted
from schemas.requests import InstanceRef, TenantNet

ID_PATTERN = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
ID_RULE = "1 to 63 characters a-z, 0-9 or '-', not at the ends"
HOST_ID_PATTERN = re.compile(r"[A-Za-z0-9_-]{1,63}")
COMMAND_ID_PATTERN = re.compile(r"[A-Za-z0-9_-]{1,64}")
REVISION_PATTERN = re.compile(r"[0-9a-z]{1,64}")
JAIL_ID_PATTERN = re.compile(r"[0-9a-f]{12}-[0-9]{1,18}")
VERSION_PATTERN = re.compile(r"v?([0-9]{1,9})\.([0-9]{1,9})\.([0-9]{1,9})(?![0-9])")
WARM_ID_PATTERN = re.compile(r"warm-[0-9a-f]{12}")
WARM_CGROUP = "warm_pool"  # in the place of a tenant, and no valid tenant ID
BRIDGE_NAME_PATTERN = re.compile(r"br-tenant-([0-9]{1,4})")
TAP_NAME_PATTERN = re.compile(r"tn([0-9]{1,4})i([0-9]{1,3})")
ALIAS_PREFIX = "hostd:"
OFFSET_MIN, OFFSET_MAX = 3, 254
CACHED: Final = 4096  # some more than a host has instances; each entry is some 300 bytes


def bridge_name(tenant_net_id: int) -> str:
    """`br-tenant-<id>`; at most 14 characters."""
    return f"br-tenant-{tenant_net_id}"


def tap_name(tenant_net_id: int, offset: int) -> str:
    """`tn<net>i<off>`; at most 10 characters."""
    return f"{tap_name_prefix(tenant_net_id)}{offset}"


def tap_name_prefix(tenant_net_id: int) -> str:
    """The start of the name of each TAP of a tenant, up to and including the `i`."""
    return f"tn{tenant_net_id}i"


def interface_alias(owner: str) -> str:
    """The alias (IFLA_IFALIAS) of an interface of hostd's: of a tenant's bridge, or of the TAP of
    an instance `t/p/i`."""
    return f"{ALIAS_PREFIX}{owner}"


def mac_address(tenant_net_id: int, offset: int) -> str:
    """`02:fc:<net hi>:<net lo>:00:<off>`, lower-case hex."""
    return f"02:fc:{tenant_net_id >> 8:02x}:{tenant_net_id & 255:02x}:00:{offset:02x}"


@lru_cache(CACHED)
def subnet_of(text: str) -> ipaddress.IPv4Network:
    """The network of a checked CIDR; kept, since one command of a network asks some ten times.

    Not for texts from outside: `10.0.0.0/0...024` is valid at any length.
    """
    return ipaddress.IPv4Network(text)


def guest_ip(net: TenantNet, offset: int) -> str:
    """The subnet's base address plus the offset."""
    return _address(net.ipv4_subnet, offset)


@lru_cache(CACHED)
def _address(subnet: str, offset: int) -> str:
    """Kept: one launch asks five times."""
    return str(subnet_of(subnet).network_address + offset)


def prefix_len(net: TenantNet) -> int:
    return subnet_of(net.ipv4_subnet).prefixlen


def address_count(net: TenantNet) -> int:
    """How many addresses a checked net has for instances."""
    return _address_count(net.ipv4_subnet, net.gateway_ip)


@lru_cache(CACHED)
def _address_count(ipv4_subnet: str, gateway_ip: str) -> int:
    subnet = subnet_of(ipv4_subnet)
    last = min(OFFSET_MAX, subnet.num_addresses - 2)  # the broadcast address is none
    gateway = int(ipaddress.IPv4Address(gateway_ip)) - int(subnet.network_address)
    return max(0, last - OFFSET_MIN + 1) - (OFFSET_MIN <= gateway <= last)


def netmask(net: TenantNet) -> str:
    return str(subnet_of(net.ipv4_subnet).netmask)


def jail_id(ref: InstanceRef, launch: int) -> str:
    """First 12 hex of sha256 of `t/p/i`, `-`, the launch number; also the VMM's `--id`."""
    return f"{jail_id_prefix(ref)}{launch}"


@lru_cache(CACHED)
def jail_id_prefix(ref: InstanceRef) -> str:
    """The start of every jail ID of this instance, up to and including the `-`."""
    return f"{hashlib.sha256(str(ref).encode()).hexdigest()[:12]}-"


def parse_ref(text: str) -> InstanceRef:
    """The inverse of `str(InstanceRef)`, e.g. of a step's key `t/p/i`.

    Raises:
        DecodeError: not three valid IDs; path `key`.
    """
    ids = text.split("/")
    if len(ids) != 3 or not all(ID_PATTERN.fullmatch(each) for each in ids):
        raise DecodeError("key", f"got {quoted(text)}, want t/p/i, each {ID_RULE}")
    return InstanceRef(*ids)


def version_text(text: str) -> str:
    """The version of Firecracker that a text from outside names, as records have it: `1.12.1`, also
    of `v1.12.1-dev`. Empty if it names none; at most 29 characters."""
    match = VERSION_PATTERN.match(text)
    return "" if match is None else ".".join(str(int(number)) for number in match.groups())


def cgroup_key(tenant_id: str, jail_id: str) -> str:
    """What names a VMM's cgroup in the journal: its path below `[limits] cgroup`."""
    return f"{tenant_id}/{jail_id}"


def cgroup_name(base: str, key: str) -> str:
    """Its path relative to the cgroup2 mount, as /proc/<pid>/cgroup has it; `base`: the setting."""
    return f"{base}/{key}"
