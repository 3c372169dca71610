"""Signals to a running worker: only SIGTERM and SIGINT end it; SIGHUP reloads; VMs see none."""

import signal
from pathlib import Path

from tests.constants import START
from tests.crash.kills import until
from tests.live_host import LiveHost, live_host
from worker.signals import ignored, name_of


async def send(host: LiveHost, number: int) -> None:
    assert host.worker is not None
    host.worker.send_signal(number)


async def test_every_signal_that_can_be_caught_leaves_worker_and_vm_running() -> None:
    async with live_host() as host:
        await host.net_up(host.seed())
        await host.run(START)
        (pid,) = host.vm_pids()

        for number in sorted(ignored()):
            await send(host, number)
            line = f'"signal":"{name_of(number)}"'
            await until(lambda line=line: line in host.log(), line)  # type: ignore[misc]
        await send(host, signal.SIGHUP)
        await until(lambda: "settings.reloaded" in host.log(), "the reload")

        # A signal that a VMM inherited as ignored could not end it any more.
        ignored_by_vmm = int(
            next(
                line.split()[1]
                for line in Path(f"/proc/{pid}/status").read_text().splitlines()
                if line.startswith("SigIgn")
            ),
            16,
        )
        assert not ignored_by_vmm & sum(1 << (number - 1) for number in ignored())
        assert host.vm_pids() == [pid]
        assert host.worker is not None
        assert host.worker.returncode is None
        assert (await host.describe())["pid"] == pid


async def test_a_reload_uses_the_new_log_level_and_the_rotated_credential(tmp_path: Path) -> None:
    async with live_host() as host:
        await host.stop_worker()
        config = tmp_path / "hostd.toml"
        creds = tmp_path / "creds"
        creds.write_text("host:one")
        creds.chmod(0o600)
        config.write_text('[log]\nlevel = "error"\n')
        await host.start_worker(
            environment={
                "HOSTD_LOG_LEVEL": None,
                "HOSTD_CONFIG": str(config),
                "HOSTD_NATS_CREDS": str(creds),
            }
        )
        before = host.log().count("bus.connected")

        config.write_text('[log]\nlevel = "info"\n')
        creds.write_text("host:two")
        await send(host, signal.SIGHUP)

        await until(lambda: host.log().count("bus.connected") > before, "a connection")
        assert '"reconnects":true' in host.log()
        await host.wait_ready()
        await host.net_up(host.seed())
        assert (await host.run(START))["code"] == "ok"
