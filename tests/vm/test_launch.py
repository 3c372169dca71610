"""A launch through the jailer: what it makes, what it proves, what it leaves."""

import os
from pathlib import Path

from tests.vm import payload
from tests.vm.rig import Rig


async def test_a_launched_vmm_runs_jailed_in_its_cgroup_and_its_api_listens(rig: Rig) -> None:
    spec = await rig.prepare()

    identity = await rig.vmms.ensure(spec)

    assert identity.cgroup == spec.cgroup
    assert rig.tree.pids(spec.cgroup) == [identity.pid]
    assert await rig.vmms.alive(identity)
    api = rig.vmms.api(spec.jail_id)
    assert await api.state() == "Not started"
    await api.close()


async def test_the_whole_life_of_a_vmm(rig: Rig) -> None:
    spec = await rig.prepare()
    identity = await rig.vmms.ensure(spec)
    api = rig.vmms.api(spec.jail_id)
    await api.configure(rig.boot_config(spec, payload.HALT))
    await api.start()
    assert await api.state() == "Running"

    await rig.vmms.check_confinement(identity, spec)
    await api.close()
    await rig.vmms.remove(spec.jail_id)

    assert not await rig.vmms.alive(identity)
    assert not await rig.vmms.exists(spec.jail_id)
    assert await rig.vmms.find(spec.jail_id) is None
    log = Path(rig.settings.paths.state, "launches.log")
    assert [line.split()[1] for line in log.read_text().splitlines()] == [spec.jail_id]
    assert os.stat(log).st_mode & 0o777 == 0o600
