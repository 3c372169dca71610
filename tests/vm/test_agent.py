"""hostd's agent client against the mini guest, and against what is no agent."""

import pytest

from handlers.errors import Unavailable
from tests.vm import payload
from tests.vm.rig import Rig

PORT = 5252


async def test_a_booting_guest_answers_ping_and_its_address_carries_traffic(rig: Rig) -> None:
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


async def test_a_guest_without_an_agent_is_unavailable_when_the_time_is_up(rig: Rig) -> None:
    spec = await rig.prepare()
    await rig.vmms.ensure(spec)
    api = rig.vmms.api(spec.jail_id)
    await api.configure(rig.boot_config(spec, payload.HALT))
    await api.start()
    await api.close()

    with pytest.raises(Unavailable, match="silence"):
        await rig.agents.ping(spec.jail_id, PORT, timeout_s=0.3)
