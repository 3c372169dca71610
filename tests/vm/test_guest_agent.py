"""hostd's agent client against the mini guest, and against a guest without an agent."""

import os

import pytest

from handlers.errors import Unavailable
from tests.vm import payload
from tests.vm.vmm_rig import VmmRig

PORT = 5252


async def test_a_booting_guest_answers_ping_and_its_address_carries_traffic(rig: VmmRig) -> None:
    spec = await rig.prepare()
    await rig.vmms.ensure(spec)
    api = rig.vmms.api(spec.jail_id)
    await api.configure(rig.boot_config(spec))
    await api.start()

    await rig.agents.ping(spec.jail_id, PORT, timeout_s=10)

    ack = await rig.agents.sleep_prep(spec.jail_id, PORT, drain_timeout_s=2, timeout_s=5)
    assert ack.success
    assert (await rig.agents.wake(spec.jail_id, PORT, timeout_s=5)).success
    assert isinstance(await rig.agents.set_clock(spec.jail_id, PORT, timeout_s=5), float)
    await api.close()


async def test_a_guest_without_an_agent_is_unavailable_when_the_time_is_up(rig: VmmRig) -> None:
    spec = await rig.prepare()
    await rig.vmms.ensure(spec)
    api = rig.vmms.api(spec.jail_id)
    await api.configure(rig.boot_config(spec, payload.HALT))
    await api.start()
    await api.close()

    with pytest.raises(Unavailable, match="no reply"):
        await rig.agents.ping(spec.jail_id, PORT, timeout_s=0.3)


async def test_a_paused_guest_is_silent_and_one_loaded_elsewhere_answers_with_its_clock_right(
    rig: VmmRig,
) -> None:
    slept = await rig.prepare()
    await rig.vmms.ensure(slept)
    api = rig.vmms.api(slept.jail_id)
    await api.configure(rig.boot_config(slept))
    await api.start()
    await rig.agents.ping(slept.jail_id, PORT, timeout_s=10)
    await api.pause()
    with pytest.raises(Unavailable, match="no reply"):
        await rig.agents.ping(slept.jail_id, PORT, timeout_s=0.1)
    await api.create_snapshot("/state", "/mem")
    await api.close()
    await rig.vmms.remove(slept.jail_id)
    woken = await rig.prepare()
    for name in ("state", "mem", "rootfs", "data"):
        os.link(rig.root(slept) / name, rig.root(woken) / name)

    identity = await rig.vmms.ensure(woken)
    api = rig.vmms.api(woken.jail_id)
    await api.load_snapshot("/state", "/mem")
    await rig.vmms.check_confinement(identity, woken)
    await api.resume()
    await api.close()

    await rig.agents.set_clock(woken.jail_id, PORT, timeout_s=10)
    assert abs(await rig.agents.set_clock(woken.jail_id, PORT, timeout_s=10)) < 1
    assert (await rig.agents.wake(woken.jail_id, PORT, timeout_s=10)).success
