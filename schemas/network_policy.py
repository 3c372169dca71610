"""What guests may not reach: by `[network] denied` and, for single tenants, by a file. No I/O.

The file is the operator's and TOML, one table per tenant: `[acme]` with `allowed` and `denied`,
each a list of IPv4 networks. For a packet of a tenant its `allowed` comes first, then its `denied`,
then `[network] denied`, which applies to all tenants; everything else is reachable.
"""

import tomllib
from collections.abc import Iterable
from ipaddress import IPv4Network, collapse_addresses

import msgspec

from schemas.decode_error import DecodeError, child, quoted
from schemas.naming import ID_PATTERN
from schemas.settings import NetworkSettings

LINK_LOCAL = IPv4Network("169.254.0.0/16")
POLICY_BYTES, TENANTS_MAX, NETWORKS_MAX = 1 << 20, 10_000, 256


class TenantPolicy(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one tenant reaches although it is denied to all, and does not reach in addition."""

    allowed: tuple[str, ...] = ()
    denied: tuple[str, ...] = ()


class NetworkPolicy(msgspec.Struct, frozen=True):
    """Networks by tenant, none of them within another of its list."""

    allowed: dict[str, tuple[str, ...]] = {}
    denied: dict[str, tuple[str, ...]] = {}


def decode_policy(text: str) -> NetworkPolicy:
    """The policy in the text of a file.

    Raises:
        DecodeError: with the path of the first field that breaks a rule.
    """
    if len(text) > POLICY_BYTES:
        raise DecodeError("$", f"got {len(text)} characters, want at most {POLICY_BYTES}")
    try:
        tables = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise DecodeError("$", f"not TOML: {error}") from error
    if len(tables) > TENANTS_MAX:
        raise DecodeError("$", f"got {len(tables)} tenants, want at most {TENANTS_MAX}")
    allowed: dict[str, tuple[str, ...]] = {}
    denied: dict[str, tuple[str, ...]] = {}
    for tenant, table in tables.items():
        path = child("$", tenant)
        if not ID_PATTERN.fullmatch(tenant):
            raise DecodeError(path, "invalid tenant ID: use 1-63 characters a-z, 0-9 or '-'")
        try:
            policy = msgspec.convert(table, TenantPolicy)
        except msgspec.ValidationError as error:
            raise DecodeError(path, f"{error}") from error
        allowed[tenant] = _networks(policy.allowed, f"{path}.allowed", reachable=True)
        denied[tenant] = _networks(policy.denied, f"{path}.denied")
    return NetworkPolicy(allowed, denied)


def denied_networks(settings: NetworkSettings) -> tuple[str, ...]:
    """What no guest reaches unless its tenant's policy allows it: `denied`, and always `allowed`,
    the range of all tenants, and the link-local addresses with the clouds' metadata."""
    networks = map(IPv4Network, (*settings.denied, *settings.allowed))
    return _spelled((*networks, LINK_LOCAL))


def _networks(texts: tuple[str, ...], path: str, *, reachable: bool = False) -> tuple[str, ...]:
    if len(texts) > NETWORKS_MAX:
        raise DecodeError(path, f"got {len(texts)} networks, want at most {NETWORKS_MAX}")
    found: list[IPv4Network] = []
    for number, text in enumerate(texts):
        try:
            network = IPv4Network(text)
        except ValueError:
            raise DecodeError(
                f"{path}[{number}]", f"got {quoted(text)}, want an IPv4 network, e.g. 10.0.5.0/24"
            ) from None
        if reachable and network.overlaps(LINK_LOCAL):
            raise DecodeError(
                f"{path}[{number}]",
                f"got {network}, which has addresses of {LINK_LOCAL}: these "
                "are the clouds' metadata and never allowed",
            )
        found.append(network)
    return _spelled(found)


def _spelled(networks: Iterable[IPv4Network]) -> tuple[str, ...]:
    """Without overlaps, each as nft lists it."""
    return tuple(
        str(network.network_address if network.prefixlen == 32 else network)
        for network in collapse_addresses(networks)
    )
