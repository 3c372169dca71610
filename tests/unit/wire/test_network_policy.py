"""The operator's file of what single tenants reach, and what all are denied."""

import pytest

from schemas.decode_error import DecodeError
from schemas.network_policy import NETWORKS_MAX, TENANTS_MAX, decode_policy, denied_networks
from schemas.settings import NetworkSettings


def test_networks_are_listed_without_overlaps_and_as_nft_spells_them() -> None:
    policy = decode_policy(
        "[acme]\nallowed = ['10.0.5.0/24', '10.0.5.7', '10.0.4.0/24']\ndenied = ['0.0.0.0/0']\n"
        "[umbra]\ndenied = ['192.0.2.1/32']\n"
    )

    assert policy.allowed == {"acme": ("10.0.4.0/23",), "umbra": ()}
    assert policy.denied == {"acme": ("0.0.0.0/0",), "umbra": ("192.0.2.1",)}


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("acme", r"^\$: not TOML"),
        ("[Acme]", r"^\$.Acme: invalid tenant ID"),
        ("acme = 1", r"^\$.acme: Expected `object`"),
        ("[acme]\nallow = []", r"^\$.acme: Object contains unknown field `allow`"),
        ("[acme]\nallowed = '10.0.0.0/8'", r"^\$.acme: Expected `array`"),
        ("[acme]\nallowed = ['10.0.0.1/8']", r"^\$.acme.allowed\[0\]: .*want an IPv4 network"),
        ("[acme]\ndenied = ['::/0']", r"^\$.acme.denied\[0\]: .*want an IPv4 network"),
        ("[acme]\nallowed = ['169.254.169.254']", r"^\$.acme.allowed\[0\]: .*never allowed"),
        ("[acme]\nallowed = ['0.0.0.0/0']", r"^\$.acme.allowed\[0\]: .*never allowed"),
        (f"[acme]\ndenied = {['10.0.0.1'] * (NETWORKS_MAX + 1)}", r"^\$.acme.denied: got 257"),
        ("\n".join(f"[t{n}]" for n in range(TENANTS_MAX + 1)), r"^\$: got 10001 tenants"),
        ("#" * ((1 << 20) + 1), r"^\$: got 1048577 characters"),
    ],
    ids=range(12),
)
def test_what_breaks_a_rule_is_refused_with_its_field(text: str, error: str) -> None:
    with pytest.raises(DecodeError, match=error):
        decode_policy(text)


def test_tenants_ranges_and_link_local_are_always_denied() -> None:
    settings = NetworkSettings(allowed=("10.240.0.0/12", "10.16.0.0/12"), denied=())

    assert denied_networks(settings) == ("10.16.0.0/12", "10.240.0.0/12", "169.254.0.0/16")


def test_by_default_the_metadata_services_of_the_clouds_are_denied() -> None:
    assert set(denied_networks(NetworkSettings())) == {
        "10.240.0.0/12",
        "169.254.0.0/16",
        "168.63.129.16",
        "100.100.100.200",
        "192.0.0.192",
    }
