"""Settings: the file, the environment which takes precedence, errors that name file and key."""

import json
import re
from pathlib import Path

import pytest

from schemas.settings import Settings, without_password
from worker import settings as settings_module
from worker.settings import SettingsError, keys, load, load_with_origins

HOST = {"HOSTD_HOST_ID": "h1"}
MACHINE_ID = "0123456789abcdef0123456789abcdef"
ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/settings.md").read_text()


def write(tmp_path: Path, text: str) -> str:
    path = tmp_path / "hostd.toml"
    path.write_text(text)
    return str(path)


@pytest.fixture
def machine_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file in place of /etc/machine-id, which a container may not have; it holds MACHINE_ID."""
    path = tmp_path / "machine-id"
    path.write_text(f"{MACHINE_ID}\n")
    monkeypatch.setattr(settings_module, "MACHINE_ID_FILE", str(path))
    return path


def test_without_a_file_the_defaults_are_in_effect() -> None:
    settings = load(None, HOST)

    assert settings.host.id == "h1"
    assert settings.nats == Settings().nats
    assert settings.root == "hostd.v1.default"
    assert settings.jail_base == "/var/lib/hostd/jails"


def test_an_empty_host_id_is_the_machine_id(machine_id: Path) -> None:
    loaded = load_with_origins(None, {})

    assert loaded.settings.host.id == MACHINE_ID
    assert loaded.origins["host.id"] == str(machine_id)


@pytest.mark.parametrize("text", [None, "", "uninitialized\n", "0123\n"])
def test_without_a_machine_id_the_host_id_must_be_set(machine_id: Path, text: str | None) -> None:
    machine_id.unlink()
    if text is not None:
        machine_id.write_text(text)

    assert settings_module.machine_id() == ""
    with pytest.raises(SettingsError, match=r"host\.id: not set") as caught:
        load(None, {})

    assert (caught.value.source, caught.value.key) == (str(machine_id), "host.id")
    assert load(None, HOST).host.id == "h1"


def test_the_file_beats_the_default_and_the_environment_beats_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, '[host]\nid = "filed"\ncell = "c1"\n[limits]\nmax_drain_s = 10\n')

    loaded = load_with_origins(path, {"HOSTD_HOST_ID": "env"})

    assert loaded.settings.host.id == "env"
    assert loaded.settings.host.cell == "c1"
    assert loaded.settings.limits.max_drain_s == 10
    assert loaded.origins["host.id"] == "HOSTD_HOST_ID"
    assert loaded.origins["host.cell"] == path
    assert loaded.origins["nats.url"] == "default"


def test_the_environment_reads_booleans_lists_and_numbers() -> None:
    settings = load(
        None,
        {
            **HOST,
            "HOSTD_HOST_PRODUCTION": "false",
            "HOSTD_NETWORK_ALLOWED": '["10.240.0.0/13", "10.248.0.0/13"]',
            "HOSTD_LIMITS_BOOTS": "3",
            "HOSTD_VMM_API_TIMEOUT_S": "2.5",
            "HOSTD_METRICS_LISTEN": "127.0.0.1:0",
        },
    )

    assert settings.host.production is False
    assert settings.network.allowed == ("10.240.0.0/13", "10.248.0.0/13")
    assert settings.limits.boots == 3
    assert settings.vmm.api_timeout_s == 2.5
    assert settings.metrics.listen == "127.0.0.1:0"


def test_every_setting_can_be_set_from_the_environment_and_keeps_its_default(
    machine_id: Path,
) -> None:
    for key in keys():
        default = key.default
        if isinstance(default, bool):
            text = str(default).lower()
        elif isinstance(default, tuple):
            text = json.dumps(default)
        else:
            text = str(default)
        settings = load(None, {**HOST, key.env: text or ""})
        value = getattr(getattr(settings, key.table), key.name)
        assert value == (default or value), key.dotted


@pytest.mark.parametrize(
    ("text", "key", "says"),
    [
        ('[host]\nidd = "x"', "host.idd", "no such setting"),
        ("[hosts]\n", "hosts", "no such table"),
        ("host = 1", "host", "expected a table"),
        ('[host]\nproduction = "yes"', "host.production", 'expected true or false, found "yes"'),
        ("[limits]\nboots = true", "limits.boots", "expected a whole number, found true"),
        ("[limits]\nboots = 1.5", "limits.boots", "expected a whole number, found 1.5"),
        ("[limits]\nboots = 0", "limits.boots", "0 is not in 1..1000000"),
        ("[host]\nid = 7", "host.id", "expected a string, found 7"),
        ("[limits]\nmax_drain_s = -1", "limits.max_drain_s", "not in 0..86400"),
        (
            '[network]\nallowed = ["10.240.0.1/12"]',
            "network.allowed",
            "the network is 10.240.0.0/12",
        ),
        ('[network]\nallowed = ["10.240/12"]', "network.allowed", "not an IPv4 network"),
        ("[network]\nallowed = []", "network.allowed", "at least one IPv4 network"),
        ("[network]\nallowed = [1]", "network.allowed", "expected a list of strings, found [1]"),
        ('[network]\nhost_services = ["tcp/0"]', "network.host_services", "tcp/<port>"),
        ('[host]\nid = "a.b"', "host.id", "1 to 63 of"),
        ('[host]\nid = "a\\n"', "host.id", "1 to 63 of"),
        ('[host]\ncell = ""', "host.cell", "1 to 32 of"),
        ('[nats]\nroot = "a.>"', "nats.root", "without wildcards"),
        ('[nats]\ninbox_prefixes = ["_INBOX"]', "nats.inbox_prefixes", "ends in a dot"),
        ('[nats]\nurl = "http://x"', "nats.url", "nats://host:port"),
        ('[nats]\nurl = "tls://[::1:4222"', "nats.url", "nats://host:port"),
        ('[nats]\nurl = "tls://[nats]:4222"', "nats.url", "nats://host:port"),
        ('[nats]\nurl = "nats://h:99999"', "nats.url", "nats://host:port"),
        ('[nats]\nurl = "nats://h:abc"', "nats.url", "nats://host:port"),
        ('[nats]\nurl = "nats://h,nats://:4222"', "nats.url", "nats://host:port"),
        ("[nats]\ninbox_prefixes = []", "nats.inbox_prefixes", "is empty"),
        ('[metrics]\nlisten = "9464"', "metrics.listen", "host:port"),
        ('[paths]\nstate = "var"', "paths.state", "absolute path"),
        ('[paths]\nstate = "/var/../x"', "paths.state", "absolute path"),
        ("[vmm]\nuid_base = 0", "vmm.uid_base", "not in 65536.."),
        ("[vmm]\nuid_base = 4294967000", "vmm.uid_count", "exceeds 4294967294"),
        ("[vmm]\nprobe_interval_s = 0.5", "vmm.probe_interval_s", "not in 1..86400"),
        ('[vmm]\non_hang = "restart"', "vmm.on_hang", "not one of report, kill"),
        ("[vmm]\nwarm_pool = 257", "vmm.warm_pool", "not in 0..256"),
        ("[vmm]\nuid_count = 8\nwarm_pool = 8", "vmm.warm_pool", "not below uid_count (8)"),
        ('[limits]\ncgroup = "/hostd"', "limits.cgroup", "below the cgroup2 mount"),
        ('[vmm]\nboot_args = "a\\n"', "vmm.boot_args", "printable ASCII"),
        ('[vmm]\nboot_args = "\u00e4"', "vmm.boot_args", "printable ASCII"),
        (f'[vmm]\nboot_args = "{"x" * 1025}"', "vmm.boot_args", "at most 1024"),
        ('[network]\nuplinks = ["eth 0"]', "network.uplinks", "not an interface name"),
        ('[network]\nuplinks = ["sixteen-letters-"]', "network.uplinks", "not an interface name"),
        ('[log]\nlevel = "loud"', "log.level", "not one of debug, info, warning, error"),
    ],
)
def test_a_wrong_file_names_itself_the_key_and_the_fault(
    tmp_path: Path, text: str, key: str, says: str
) -> None:
    path = write(tmp_path, text)

    with pytest.raises(SettingsError) as caught:
        load(path, {} if "id =" in text else HOST)

    assert caught.value.key == key
    assert says in caught.value.message
    if "uid_count" not in key:
        assert caught.value.source == path


def test_a_file_that_is_not_toml_or_not_there_says_so(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"hostd.toml: not TOML: Invalid value"):
        load(write(tmp_path, "a = "), HOST)
    with pytest.raises(SettingsError, match="cannot read the settings file: No such file"):
        load(str(tmp_path / "none"), HOST)


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("HOSTD_LIMITS_ENFORCE", "yes", "'yes' is not true or false"),
        ("HOSTD_LIMITS_BOOTS", "many", "not a whole number"),
        ("HOSTD_NETWORK_ALLOWED", "10.0.0.0/8", "not a JSON list"),
        ("HOSTD_NETWORK_ALLOWED", '{"a": 1}', 'expected a list of strings, found {"a": 1}'),
        ("HOSTD_LIMITS_BOOT", "1", "no such setting"),
    ],
)
def test_a_wrong_variable_names_itself(name: str, text: str, says: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load(None, {**HOST, name: text})

    assert caught.value.source == name
    assert says in caught.value.message


def test_other_variables_are_ignored() -> None:
    others = dict.fromkeys([*settings_module.OTHER_VARIABLES, "HOSTDISH"], "1")

    assert load(None, {**HOST, **others}).host.id == "h1"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("HOSTD_LIMIT_BOOTS", "no such setting; did you mean HOSTD_LIMITS_BOOTS?"),
        ("HOSTD_XYZ", "no such setting"),
    ],
)
def test_a_variable_of_a_mistyped_table_is_refused(name: str, says: str) -> None:
    with pytest.raises(SettingsError, match=f"^{name}: {re.escape(says)}$"):
        load(None, {**HOST, name: "1"})


def test_an_unknown_setting_is_refused_with_the_nearest_name(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"limits\.boot: no such setting; .* limits\.boots\?"):
        load(write(tmp_path, "[limits]\nboot = 1\n"), HOST)
    with pytest.raises(SettingsError, match=r"limit: no such table; did you mean limits\?"):
        load(write(tmp_path, "[limit]\nboots = 1\n"), HOST)


def test_a_production_host_without_limits_is_refused_by_the_settings() -> None:
    off = {**HOST, "HOSTD_LIMITS_ENFORCE": "false"}
    with pytest.raises(SettingsError, match=r"HOSTD_LIMITS_ENFORCE: limits.enforce: false is for"):
        load(None, off)

    assert not load(None, {**off, "HOSTD_HOST_PRODUCTION": "false"}).limits.enforce


def test_every_setting_but_true_or_false_has_a_rule() -> None:
    assert {key.dotted for key in keys() if key.type is not bool} == set(settings_module.RULES)


def test_the_settings_page_and_the_example_file_explain_each_setting_in_the_same_words() -> None:
    table = ""
    explained: dict[str, str] = {}
    for line in (ROOT / "deploy/config/hostd.toml").read_text().splitlines():
        if header := re.fullmatch(r"\[(\w+)\]", line):
            table = header[1]
        elif setting := re.match(r"(\w+) = .* # (?:(?:s|MiB|bytes|percent): )?(.*)", line):
            explained[f"{table}.{setting[1]}"] = setting[2]
    page = dict(re.findall(r"^\| `([a-z_.]+)` \| `HOSTD_.*\| ([^|]*) \|$", PAGE, re.MULTILINE))

    assert explained == page


@pytest.mark.parametrize(
    "text",
    [
        "x = " + "[" * 100_000,
        "[limits]\nlane_depth = " + "9" * 5000,
        "[limits]\nlane_depth = " + "9" * 400,
        "[limits]\nboots = 1" + "0" * 400 + ".0",
        '[host]\nid = "\\ud800"',
        "x = \x00",
    ],
)
def test_a_hostile_settings_file_is_an_error_that_names_it(tmp_path: Path, text: str) -> None:
    file = tmp_path / "hostd.toml"
    file.write_bytes(text.encode("utf-8", "surrogatepass"))

    with pytest.raises(SettingsError, match=str(file)):
        load(str(file), {})


@pytest.mark.parametrize("value", ["[" * 100_000, "9" * 5000, "9" * 400, "\ud800", "1e400"])
@pytest.mark.parametrize("name", ["HOSTD_LIMITS_LANE_DEPTH", "HOSTD_NETWORK_ALLOWED"])
def test_a_hostile_variable_is_an_error_that_names_it(name: str, value: str) -> None:
    with pytest.raises(SettingsError, match=name):
        load(None, {name: value})


@pytest.mark.parametrize(
    ("urls", "shown"),
    [
        ("nats://host:secret@10.0.0.1:4222", "nats://10.0.0.1:4222"),
        ("nats://u:se@cret@h1,tls://secret@h2", "nats://h1,tls://h2"),
        ("u:secret@h", "h"),
        ("nats://h:4222", "nats://h:4222"),
    ],
)
def test_no_message_has_the_password_of_a_url(urls: str, shown: str) -> None:
    assert without_password(urls) == shown


@pytest.mark.parametrize("url", ["nat://u:secret@h", "nats://h,u:sec@ret@h", "nats://u:secret@h:x"])
def test_a_refused_url_is_shown_without_its_password(url: str) -> None:
    with pytest.raises(SettingsError) as refused:
        load(None, {**HOST, "HOSTD_NATS_URL": url})

    assert "nats.url" in str(refused.value)
    assert "ret@" not in str(refused.value)
    assert "secret" not in str(refused.value)
