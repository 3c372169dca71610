"""What others change of an instance that runs is found by the periodic check, on a whole host."""

import json
import os
from pathlib import Path
from typing import Any

from tests.constants import REF, START, STOP
from tests.crash.kills import events, wait_event
from tests.live_host import live_host


async def test_a_changed_instance_file_is_restored_and_a_removed_socket_is_announced() -> None:
    async with live_host() as host:
        await host.net_up(host.seed())
        assert (await host.run(START))["code"] == "ok"
        path = Path(
            host.settings.paths.data,
            f"tenants/{REF.tenant_id}/pools/{REF.pool_id}/instances/{REF.instance_id}/instance.json",
        )
        before: dict[str, Any] = json.loads(path.read_text())
        owner = path.stat()
        path.write_text(json.dumps(before | {"status": "stopped", "firecracker_pid": None}))
        os.chown(path, owner.st_uid, owner.st_gid)
        os.unlink(f"{await host.jail_root()}/api.sock")

        await host.stop_worker()  # its first pass is at once
        await host.start_worker()
        event = await wait_event(host, lambda e: e["kind"] == "drift" and "instance_id" in e)

        assert event["detail"]["repaired"] == [
            f"instance.json {REF} status",
            f"instance.json {REF} firecracker_pid",
        ]
        assert [each.split()[-1] for each in event["detail"]["lost"]] == ["api.sock"]
        assert json.loads(path.read_text()) == before
        # What was announced as lost ends with the launch: a Stop needs no API.
        assert (await host.run(STOP))["code"] == "ok"
        assert (await host.run(START))["code"] == "ok"
        assert len([e for e in await events(host) if e["kind"] == "drift"]) == 1
