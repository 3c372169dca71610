"""Derived names: an instance key parses back, and jail IDs have one shape and one prefix."""

import pytest

from schemas import naming
from schemas.decode_error import DecodeError
from schemas.requests import InstanceRef

REF = InstanceRef("acme", "web", "i-1")


def test_an_instance_key_parses_back_to_its_reference() -> None:
    assert naming.parse_ref(str(REF)) == REF


@pytest.mark.parametrize(
    "text", ["", "acme/web", "acme/web/i-1/x", "acme/../i-1", "acme//i-1", "acme/web/A", "a/b/c\n"]
)
def test_an_invalid_instance_key_is_refused_and_quoted(text: str) -> None:
    with pytest.raises(DecodeError, match="want t/p/i") as caught:
        naming.parse_ref(text)

    assert caught.value.path == "key"
    assert ascii(text) in caught.value.message


@pytest.mark.parametrize("launch", [0, 1, 2**40])
def test_each_jail_id_of_an_instance_matches_the_pattern_and_has_the_prefix(launch: int) -> None:
    jail_id = naming.jail_id(REF, launch)

    assert naming.JAIL_ID_PATTERN.fullmatch(jail_id)
    assert jail_id == f"{naming.jail_id_prefix(REF)}{launch}"


def test_jail_id_prefixes_of_two_instances_differ() -> None:
    other = InstanceRef("acme", "web", "i-2")

    assert naming.jail_id_prefix(REF) != naming.jail_id_prefix(other)
