"""What an operator installs agrees with the code: the unit, the example settings, their page."""

from pathlib import Path

import msgspec

from schemas.settings import Settings
from worker.reload import RELOADED
from worker.settings import keys, load_with_origins
from worker.supervision.watchdog import EVERY_S, FEEDS

ROOT = Path(__file__).parents[3]
DEPLOY = ROOT / "deploy"
UNIT = (DEPLOY / "hostd.service").read_text()


def directives() -> list[tuple[str, str]]:
    lines = [line for line in UNIT.splitlines() if "=" in line and not line.startswith("#")]
    return [(name, value) for name, _, value in (line.partition("=") for line in lines)]


def test_the_example_names_every_setting_with_its_default() -> None:
    path = str(DEPLOY / "config/hostd.toml")

    loaded = load_with_origins(path, {"HOSTD_HOST_ID": "h1"})

    missing = {key.dotted for key in keys() if loaded.origins[key.dotted] == "default"}
    assert missing == set()
    assert msgspec.structs.replace(loaded.settings, host=Settings().host) == Settings()


def test_every_setting_is_on_the_settings_page_with_variable_default_and_unit() -> None:
    rows = [
        [cell.strip(" `") for cell in line.strip("|").split(" | ")]
        for line in (ROOT / "docs/settings.md").read_text().splitlines()
        if line.startswith("| `") and "HOSTD_" in line
    ]

    shown = {row[0]: tuple(row[1:4]) for row in rows}
    defaults = {
        key.dotted: (key.env, msgspec.json.encode(key.default).decode(), key.unit) for key in keys()
    }
    assert shown == defaults


def test_vms_outlive_the_unit_and_its_python_is_isolated() -> None:
    unit = dict(directives())

    assert unit["KillMode"] == "process"
    assert unit["ExecStart"].split()[1:4] == ["-I", "-m", "worker"]
    assert unit["Restart"] == "always"
    assert int(unit["TimeoutStopSec"].rstrip("s")) > Settings().limits.shutdown_s


def test_systemd_waits_for_the_worker_and_restarts_one_that_hangs() -> None:
    unit = dict(directives())

    assert (unit["Type"], unit["NotifyAccess"]) == ("notify", "main")
    assert int(unit["WatchdogSec"].rstrip("s")) >= FEEDS * EVERY_S  # or it would feed more often
    # What the watchdog ends is the main process (KillMode=process), and it is started again.
    assert (unit["KillMode"], unit["Restart"]) == ("process", "always")


def test_a_reload_sends_sighup_and_finds_rotated_credentials() -> None:
    unit = dict(directives())

    assert unit["ExecReload"] == "/bin/kill -HUP $MAINPID"
    assert "LoadCredential" not in unit


def test_the_unit_has_no_mount_namespace_and_no_filter_that_vmms_would_inherit() -> None:
    prefixes = ("Protect", "Private", "ReadOnly", "ReadWrite", "Inaccessible", "Bind", "Temporary")
    filters = ("SystemCall", "Restrict", "LockPersonality", "NoNewPrivileges", "MemoryDeny")

    names = [name for name, _ in directives() if name not in {"Restart", "RestartSec"}]
    assert [name for name in names if name.startswith((*prefixes, *filters))] == []


def test_the_unit_names_all_that_a_reload_reads_again() -> None:
    before, _, _ = UNIT.partition("ExecReload=")
    comment = before.rpartition("\n\n")[2].rpartition("Environment=")[2]
    names = {"log.level": "log level", "nats.url": "servers", "nats.creds": "credentials"} | {
        "nats.tls": "CA file",
        "vmm.version": "[vmm] version",
        "vmm.allow_untested": "allow_untested",
    }

    assert {*RELOADED} == {*names}
    for name in (*names.values(), "versions_dir"):
        assert name in comment
