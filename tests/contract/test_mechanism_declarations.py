"""A fake mechanism declares the same name, durability and sweep rule as the real one."""

from dataclasses import fields
from typing import Any, cast

import pytest

from handlers.host.jail.jails import Jails
from handlers.host.net.antispoof import Pins
from handlers.host.net.bridges import Bridges
from handlers.host.net.taps import Taps
from handlers.host.net.tenant_rules import TenantRules
from handlers.host.storage.artifacts import Artifacts
from handlers.host.storage.data_disks import DataDisks
from handlers.host.vmm.cgroups import Cgroups
from handlers.host.vmm.vmms import Vmms
from handlers.interfaces import Host
from handlers.mechanism import Removable
from handlers.registry import mechanisms
from tests.fakes.host import FakeHost

REAL: dict[str, type[Removable]] = {
    "bridges": Bridges,
    "tenant_rules": TenantRules,
    "pins": Pins,
    "taps": Taps,
    "artifacts": Artifacts,
    "data_disks": DataDisks,
    "cgroups": Cgroups,
    "jails": Jails,
    "vmms": Vmms,
}


def fake_host() -> Host:
    return FakeHost().host(cast("Any", None))


@pytest.mark.parametrize("field", REAL)
def test_a_fake_declares_what_the_real_mechanism_declares(field: str) -> None:
    fake, real = getattr(fake_host(), field), REAL[field]

    assert (fake.name, fake.durability, fake.swept) == (real.name, real.durability, real.swept)


def test_every_mechanism_of_a_host_is_compared() -> None:
    host = fake_host()

    declaring = {f.name for f in fields(host) if hasattr(getattr(host, f.name), "durability")}

    assert declaring == REAL.keys()


def test_names_of_mechanisms_are_unique() -> None:
    host = fake_host()

    assert len(mechanisms(host)) == len(REAL) + 6
