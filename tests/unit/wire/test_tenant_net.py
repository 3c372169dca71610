"""A `TenantNet` is checked, not trusted."""

import msgspec
import pytest

from schemas.codes import Code
from schemas.decode_error import DecodeError
from schemas.files import offset_of
from schemas.tenant_net import check_net
from tests.constants import NET

ALLOWED = ("10.240.0.0/12",)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tenant_net_id": 0, "bridge_name": "br-tenant-0"},
        {"tenant_net_id": 4095, "bridge_name": "br-tenant-4095"},
        {"ipv4_subnet": "10.255.255.0/24", "gateway_ip": "10.255.255.254"},
        {"ipv4_subnet": "10.240.3.8/29", "gateway_ip": "10.240.3.9"},
        {"ipv4_subnet": "10.240.0.0/12"},
    ],
)
def test_a_consistent_net_is_accepted(changes: dict[str, object]) -> None:
    check_net(msgspec.structs.replace(NET, **changes), ALLOWED)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tenant_net_id", -1),
        ("tenant_net_id", 4096),
        ("ipv4_subnet", ""),
        ("ipv4_subnet", "10.240.3.0"),
        ("ipv4_subnet", "10.240.3.1/24"),
        ("ipv4_subnet", "10.240.3.0/255.255.255.0"),
        ("ipv4_subnet", "10.240.3.0/24\n"),
        ("ipv4_subnet", "10.240.03.0/24"),
        ("ipv4_subnet", "10.240.3.0/30"),
        ("ipv4_subnet", "10.240.3.0/33"),
        ("ipv4_subnet", "10.0.0.0/7"),
        ("ipv4_subnet", "10.224.0.0/11"),
        ("ipv4_subnet", "192.168.3.0/24"),
        ("ipv4_subnet", "fd00::/64"),
        ("gateway_ip", ""),
        ("gateway_ip", "10.240.4.1"),
        ("gateway_ip", "10.240.3.0"),
        ("gateway_ip", "10.240.3.255"),
        ("gateway_ip", "10.240.3.01"),
        ("gateway_ip", "10.240.3.1/24"),
        ("gateway_ip", "::ffff:10.240.3.1"),
        ("bridge_name", "br-tenant-4"),
        ("bridge_name", "br-tenant-3 "),
        ("bridge_name", "eth0"),
    ],
)
def test_a_broken_rule_is_invalid_and_names_the_field(field: str, value: object) -> None:
    net = msgspec.structs.replace(NET, **{field: value})

    with pytest.raises(DecodeError) as caught:
        check_net(net, ALLOWED, "$.request.SetupNetwork.net")

    assert caught.value.code is Code.INVALID
    assert caught.value.path == f"$.request.SetupNetwork.net.{field}"


def test_the_default_allows_nothing_where_the_operator_allows_nothing() -> None:
    with pytest.raises(DecodeError):
        check_net(NET, ())


@pytest.mark.parametrize(
    ("guest_ip", "subnet", "offset"),
    [
        ("10.240.3.3", "10.240.3.0/24", 3),
        ("10.240.3.254", "10.240.3.0/24", 254),
        ("10.240.3.14", "10.240.3.8/29", 6),
        ("10.240.0.254", "10.240.0.0/12", 254),
    ],
)
def test_an_offset_counts_from_the_subnet(guest_ip: str, subnet: str, offset: int) -> None:
    net = msgspec.structs.replace(NET, ipv4_subnet=subnet)

    assert offset_of(guest_ip, net) == offset


@pytest.mark.parametrize(
    ("guest_ip", "subnet", "gateway"),
    [
        ("10.240.3.2", "10.240.3.0/24", "10.240.3.1"),
        ("10.240.3.255", "10.240.3.0/24", "10.240.3.1"),
        ("10.240.3.0", "10.240.3.0/24", "10.240.3.1"),
        ("10.240.4.3", "10.240.3.0/24", "10.240.3.1"),
        ("10.240.3.15", "10.240.3.8/29", "10.240.3.9"),
        ("10.240.1.3", "10.240.0.0/12", "10.240.0.1"),
        ("10.240.3.7", "10.240.3.0/24", "10.240.3.7"),
        ("nonsense", "10.240.3.0/24", "10.240.3.1"),
        ("10.240.3.3\n", "10.240.3.0/24", "10.240.3.1"),
        ("", "10.240.3.0/24", "10.240.3.1"),
    ],
)
def test_an_address_that_no_guest_can_have_is_invalid(
    guest_ip: str, subnet: str, gateway: str
) -> None:
    net = msgspec.structs.replace(NET, ipv4_subnet=subnet, gateway_ip=gateway)

    with pytest.raises(DecodeError) as caught:
        offset_of(guest_ip, net)

    assert caught.value.path == "instance.json: $.net.guest_ip"
