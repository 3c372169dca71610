"""Reads the settings: one TOML file, each key `a.b` also as `HOSTD_A_B`, which takes precedence.

Types, defaults and units are in `schemas/settings.py`. An unknown key, a wrong type or a value that
breaks a rule stops the start with an error that names the file and the key.
"""

import difflib
import ipaddress
import json
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import msgspec

from schemas.naming import HOST_ID_PATTERN
from schemas.settings import IMPORTS_MAX, WARM_POOL_MAX, Settings, without_password
from schemas.subjects import CELL_PATTERN, ROOT_PATTERN

MACHINE_ID_FILE = "/etc/machine-id"
DEFAULT_FILE = "/etc/hostd/hostd.toml"
ENV_PREFIX = "HOSTD_"
DEFAULT = "default"
# Of this prefix, but not settings: the build's commit, the file, the failpoints, the tests' own.
OTHER_VARIABLES = frozenset(
    {
        "HOSTD_COMMIT",
        "HOSTD_CONFIG",
        "HOSTD_FAILPOINT",
        "HOSTD_FAILPOINT_FILE",
        "HOSTD_FAILPOINT_ARM",
        "HOSTD_LAB",
        "HOSTD_TEST_FIRECRACKER_DIR",
    }
)

_PORT = re.compile(r"[0-9]{1,5}")
_SERVICE = re.compile(r"(tcp|udp)/([0-9]{1,5})")
_URL = re.compile(r"(nats|tls|ws|wss)://[^\s,]+")
_COLLECTOR = re.compile(
    r"https?://(?:[A-Za-z0-9.-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\])(?::([0-9]{1,5}))?(?:/[!-~]*)?"
)
_EXAMPLE = "http://127.0.0.1:4318"
_UID_MIN, _UID_MAX = 65_536, 2**32 - 2
_INTERFACE = re.compile(r"[^\s/:]{1,15}")
_VERSION = re.compile(r"[0-9]{1,4}\.[0-9]{1,4}\.[0-9]{1,4}")
_BOOT_ARGS_MAX = 1024
_WANTED: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a string",
}
UNITS = {"_s": "seconds", "_mib": "MiB", "_bytes": "bytes", "_percent": "percent"}
SWEEP_MODES = ("remove", "report")
LEVELS = ("debug", "info", "warning", "error")


class SettingsError(Exception):
    """A setting is invalid.

    Args:
        source: the file, or the name of the environment variable.
        key: `table.key`, or empty when the file as a whole is invalid.
        message: what was found and what is expected.
    """

    def __init__(self, source: str, key: str, message: str) -> None:
        super().__init__(f"{source}: {key}: {message}" if key else f"{source}: {message}")
        self.source = source
        self.key = key
        self.message = message


@dataclass(frozen=True, slots=True)
class Loaded:
    """The settings, and for each `table.key` the source of its value."""

    settings: Settings
    origins: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Key:
    """One setting as the types declare it."""

    table: str
    name: str
    type: Any
    default: Any

    @property
    def dotted(self) -> str:
        return f"{self.table}.{self.name}"

    @property
    def env(self) -> str:
        return f"{ENV_PREFIX}{self.table}_{self.name}".upper()

    @property
    def unit(self) -> str:
        """The unit of a number, from its name; empty for a count or another type."""
        for suffix, unit in UNITS.items():
            if self.name.endswith(suffix):
                return unit
        return ""


def keys() -> tuple[Key, ...]:
    """Every setting, in the order of the types."""
    return tuple(
        Key(table.name, field.name, field.type, field.default)
        for table in msgspec.structs.fields(Settings)
        for field in msgspec.structs.fields(table.type)
    )


def load(path: str | None, environ: Mapping[str, str]) -> Settings:
    """Read and check the settings; without `path` only from defaults and the environment.

    Raises:
        SettingsError: names the file or variable, the key, and what is invalid.
    """
    return load_with_origins(path, environ).settings


def load_with_origins(path: str | None, environ: Mapping[str, str]) -> Loaded:
    """As `load`, with the source of each value: `default`, the file, or a variable."""
    known = {key.dotted: key for key in keys()}
    values: dict[str, Any] = {}
    origins: dict[str, str] = dict.fromkeys(known, DEFAULT)
    for dotted, value in _read_file(path).items() if path is not None else ():
        if dotted not in known:
            raise SettingsError(str(path), dotted, f"no such setting{nearest(dotted, known)}")
        values[dotted] = _convert(str(path), known[dotted], value)
        origins[dotted] = str(path)
    for dotted, (name, text) in _read_environ(known, environ).items():
        values[dotted] = _convert(name, known[dotted], _parse(name, known[dotted], text))
        origins[dotted] = name
    if not values.get("host.id"):
        if not (machine := machine_id()):
            raise SettingsError(
                MACHINE_ID_FILE,
                "host.id",
                "not set, and this file has no machine ID (32 hex digits) to use instead",
            )
        values["host.id"] = machine
        origins["host.id"] = MACHINE_ID_FILE
    tables: dict[str, dict[str, Any]] = {key.table: {} for key in known.values()}
    for dotted, value in values.items():
        tables[known[dotted].table][known[dotted].name] = value
    settings = msgspec.convert(tables, Settings)
    _check(settings, origins)
    return Loaded(settings, origins)


def _read_file(path: str) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            tables = tomllib.load(file)
    except OSError as error:
        why = error.strerror or "unknown error"
        raise SettingsError(path, "", f"cannot read the settings file: {why}") from error
    except (ValueError, RecursionError) as error:
        raise SettingsError(path, "", f"not TOML: {error}") from error
    found: dict[str, Any] = {}
    for table, content in tables.items():
        if table not in (known := {key.table for key in keys()}):
            raise SettingsError(path, table, f"no such table{nearest(table, sorted(known))}")
        try:
            pairs = msgspec.convert(content, dict[str, Any])
        except msgspec.ValidationError as error:
            raise SettingsError(path, table, "expected a table") from error
        found.update({f"{table}.{name}": value for name, value in pairs.items()})
    return found


def _read_environ(
    known: Mapping[str, Key], environ: Mapping[str, str]
) -> dict[str, tuple[str, str]]:
    by_env = {key.env: key for key in known.values()}
    found: dict[str, tuple[str, str]] = {}
    for name, text in sorted(environ.items()):
        if key := by_env.get(name):
            found[key.dotted] = (name, text)
        elif name.startswith(ENV_PREFIX) and name not in OTHER_VARIABLES:
            raise SettingsError(name, "", f"no such setting{nearest(name, by_env)}")
    return found


def _parse(name: str, key: Key, text: str) -> object:
    """The text of a variable as the value that TOML would give."""
    try:
        if key.type is str:
            return text
        if key.type is bool:
            return {"true": True, "false": False}[text]
        if key.type is int:
            return int(text)
        if key.type is float:
            return float(text)
        return json.loads(text)
    except (ValueError, KeyError, RecursionError) as error:
        wanted = _WANTED.get(key.type, "a JSON list")
        raise SettingsError(name, key.dotted, f"{text[:200]!r} is not {wanted}") from error


def _convert(source: str, key: Key, value: object) -> object:
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise SettingsError(source, key.dotted, "expected a number of at most 64 bits")
    try:
        return msgspec.convert(value, key.type, strict=True)
    except ValueError as error:  # also of text that is not valid Unicode
        wanted = _WANTED.get(key.type, "a list of strings")
        try:
            found = json.dumps(value, ensure_ascii=False, default=str)[:100]
            found.encode()
        except (ValueError, RecursionError):
            found = "a value that cannot be quoted"
        raise SettingsError(source, key.dotted, f"expected {wanted}, found {found}") from error


def nearest(name: str, names: Iterable[str]) -> str:
    """`; did you mean <name>?` for the most similar of these names, or nothing."""
    found = difflib.get_close_matches(name, list(names), n=1, cutoff=0.7)
    return f"; did you mean {found[0]}?" if found else ""


def machine_id() -> str:
    """The ID of this installation, 32 hex digits; empty if it has none. Source: machine-id(5)."""
    try:
        with open(MACHINE_ID_FILE, encoding="ascii", errors="replace") as file:
            text = file.read(32)
    except OSError:
        return ""
    return text if re.fullmatch(r"[0-9a-f]{32}", text) else ""


# -- rules -----------------------------------------------------------------------------------------


def _check(settings: Settings, origins: Mapping[str, str]) -> None:
    for dotted, rule in RULES.items():
        table, name = dotted.split(".")
        value = getattr(getattr(settings, table), name)
        if wrong := rule(value):
            raise SettingsError(origins[dotted], dotted, wrong)
    if settings.host.production and not settings.limits.enforce:
        raise SettingsError(
            origins["limits.enforce"],
            "limits.enforce",
            "false is for development only: also set [host] production = false, or enforce limits",
        )
    if settings.vmm.uid_base + settings.vmm.uid_count - 1 > _UID_MAX:
        raise SettingsError(
            origins["vmm.uid_count"], "vmm.uid_count", f"uid_base + uid_count exceeds {_UID_MAX}"
        )
    if settings.vmm.version and not settings.vmm.versions_dir:
        raise SettingsError(
            origins["vmm.version"], "vmm.version", "chooses one of versions_dir, which is not set"
        )
    if settings.limits.disk_low_percent > settings.limits.disk_high_percent:
        raise SettingsError(
            origins["limits.disk_low_percent"],
            "limits.disk_low_percent",
            f"{settings.limits.disk_low_percent:g} is above disk_high_percent "
            f"({settings.limits.disk_high_percent:g})",
        )
    if settings.vmm.warm_pool >= settings.vmm.uid_count:
        raise SettingsError(
            origins["vmm.warm_pool"],
            "vmm.warm_pool",
            f"{settings.vmm.warm_pool} is not below uid_count ({settings.vmm.uid_count}): "
            "each warm VMM has a uid of its own",
        )


def _matches(pattern: re.Pattern[str], what: str) -> Callable[[str], str]:
    return lambda value: "" if pattern.fullmatch(value) else f"{value!r} is not {what}"


def _absolute(value: str) -> str:
    good = value.startswith("/") and "\0" not in value and "/../" not in f"{value}/"
    return "" if good else f"{value!r} is not an absolute path"


def _or_empty(rule: Callable[[str], str]) -> Callable[[str], str]:
    return lambda value: rule(value) if value else ""


def _each(rule: Callable[[str], str]) -> Callable[[tuple[str, ...]], str]:
    return lambda values: next((wrong for value in values if (wrong := rule(value))), "")


def _between(low: float, high: float) -> Callable[[float], str]:
    return lambda value: "" if low <= value <= high else f"{value} is not in {low}..{high}"


def _cidr(value: str) -> str:
    try:
        network = ipaddress.IPv4Network(value, strict=False)
    except ValueError:
        return f"{value!r} is not an IPv4 network, e.g. 10.240.0.0/12"
    if str(network.network_address) != value.partition("/")[0]:
        return f"{value!r} has host bits set: the network is {network}"
    return ""


def _listen(value: str) -> str:
    host, _, port = value.rpartition(":")
    if not host or not _PORT.fullmatch(port) or int(port) > 65_535:
        return f"{value!r} is not host:port"
    return ""


def _service(value: str) -> str:
    match = _SERVICE.fullmatch(value)
    good = match is not None and 0 < int(match[2]) <= 65_535
    return "" if good else f"{value!r} is not tcp/<port> or udp/<port>"


def _inbox(value: str) -> str:
    good = value.endswith(".") and ROOT_PATTERN.fullmatch(value[:-1])
    return "" if good else f"{value!r} is not a subject prefix that ends in a dot"


def _urls(value: str) -> str:
    if all(_is_url(url.strip()) for url in value.split(",")):
        return ""
    return f"{without_password(value)!r} is not nats://host:port (several with commas)"


def _is_url(text: str) -> bool:
    try:
        url = urlsplit(text)
        return _URL.fullmatch(text) is not None and bool(url.hostname) and url.port != 0
    except ValueError:  # of the brackets, or the port
        return False


def _boot_args(value: str) -> str:
    good = value.isascii() and (value.isprintable() or not value) and len(value) <= _BOOT_ARGS_MAX
    return "" if good else f"{value!r} is not at most {_BOOT_ARGS_MAX} printable ASCII characters"


def _interface(value: str) -> str:
    good = _INTERFACE.fullmatch(value) and value not in {".", ".."}
    return "" if good else f"{value!r} is not an interface name, e.g. eth0"


def _cgroup(value: str) -> str:
    good = all(part not in {"", ".", ".."} for part in value.split("/"))
    return "" if good else f"{value!r} is not a path below the cgroup2 mount, e.g. hostd"


def _collector(value: str) -> str:
    match = _COLLECTOR.fullmatch(value)
    good = match is not None and int(match[1] or 80) <= 65_535
    return "" if good else f"{value!r} is not http(s)://host[:port][/path], e.g. {_EXAMPLE}"


_COUNT = _between(1, 1_000_000)
_SECONDS = _between(0.1, 86_400)
ON_HANG = ("report", "kill")
RULES: dict[str, Callable[[Any], str]] = {  # of every setting but true or false
    "host.id": _matches(HOST_ID_PATTERN, "1 to 63 of A-Z a-z 0-9 _ -"),
    "host.cell": _matches(CELL_PATTERN, "1 to 32 of A-Z a-z 0-9 _ -"),
    "nats.url": _urls,
    "nats.creds": _or_empty(_absolute),
    "nats.tls": _or_empty(_absolute),
    "nats.root": _or_empty(_matches(ROOT_PATTERN, "a subject without wildcards")),
    "nats.js_domain": _or_empty(_matches(CELL_PATTERN, "1 to 32 of A-Z a-z 0-9 _ -")),
    "nats.inbox_prefixes": lambda value: (
        _each(_inbox)(value) if value else "is empty: list at least one, e.g. _INBOX."
    ),
    "paths.data": _absolute,
    "paths.state": _absolute,
    "paths.run": _absolute,
    "vmm.firecracker": _absolute,
    "vmm.jailer": _absolute,
    "vmm.versions_dir": _or_empty(_absolute),
    "vmm.version": _or_empty(_matches(_VERSION, "a version, e.g. 1.12.1")),
    "vmm.jail_base": _or_empty(_absolute),
    "vmm.uid_base": _between(_UID_MIN, _UID_MAX),
    "vmm.uid_count": _between(1, 2**31),
    "vmm.boot_args": _boot_args,
    "vmm.ready_timeout_s": _SECONDS,
    "vmm.api_timeout_s": _SECONDS,
    "vmm.snapshot_timeout_s": _SECONDS,
    "vmm.log_bytes": _between(4096, 2**30),
    "vmm.max_file_mib": _between(64, 2**24),
    "vmm.warm_pool": _between(0, WARM_POOL_MAX),
    "vmm.probe_interval_s": lambda value: "" if value == 0 else _between(1, 86_400)(value),
    "vmm.on_hang": lambda value: (
        "" if value in ON_HANG else f"{value!r} is not one of {', '.join(ON_HANG)}"
    ),
    "metrics.listen": _or_empty(_listen),
    "network.allowed": lambda value: (
        _each(_cidr)(value) if value else "is empty: list at least one IPv4 network"
    ),
    "network.uplinks": _each(_interface),
    "network.host_services": _each(_service),
    "network.denied": _each(_cidr),
    "network.policy": _or_empty(_absolute),
    "network.exempt_routes": _each(_cidr),
    "network.max_flows": _between(1, 2**31),
    "limits.cgroup": _cgroup,
    "limits.max_drain_s": _between(0, 86_400),
    "limits.max_stop_s": _between(0, 86_400),
    "limits.lane_depth": _COUNT,
    "limits.tenant_depth": _COUNT,
    "limits.host_depth": _COUNT,
    "limits.imports": _between(1, IMPORTS_MAX),
    "limits.boots": _COUNT,
    "limits.restores": _COUNT,
    "limits.snapshots": _COUNT,
    "limits.networks": _COUNT,
    "limits.max_artifact_mib": _between(1, 2**24),
    "limits.mem_reserve_mib": _between(0, 2**30),
    "limits.disk_reserve_mib": _between(0, 2**30),
    "limits.cpu_reserve": _between(0, 4096),
    "limits.vcpu_overcommit": _between(0.1, 4096),
    "limits.disk_high_percent": _between(1, 100),
    "limits.disk_low_percent": _between(1, 100),
    "limits.vmm_overhead_mib": _between(0, 2**20),
    "limits.shutdown_s": _SECONDS,
    "limits.retry_budget_s": _SECONDS,
    "sweep.mode": lambda value: (
        "" if value in SWEEP_MODES else f"{value!r} is not one of {', '.join(SWEEP_MODES)}"
    ),
    "sweep.per_hour": _between(1, 1000),
    "sweep.grace_s": _between(0, 86_400),
    "limits.quarantine_after": _between(0, 1_000_000),
    "trace.endpoint": _or_empty(_collector),
    "trace.ca": _or_empty(_absolute),
    "trace.sample_ratio": _between(0, 1),
    "log.level": lambda value: (
        "" if value in LEVELS else f"{value!r} is not one of {', '.join(LEVELS)}"
    ),
}
