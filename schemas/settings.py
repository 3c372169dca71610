"""All settings of hostd with defaults and units. Types only; `worker/settings.py` reads them."""

from typing import Final

import msgspec

IMPORTS_MAX: Final = 16  # as many threads as there are for imports
WARM_POOL_MAX: Final = 256


class HostSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[host]`. `id` empty means the machine id; `production` refuses to run with limits off."""

    id: str = ""
    cell: str = "default"
    production: bool = True


class NatsSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[nats]`. `root` empty means `hostd.v1.<cell>`; `creds` and `tls` (a CA file) are paths.

    `js_domain` names the imported JetStream API `$JS.<js_domain>.API`; empty means `$JS.API`.
    """

    url: str = "nats://127.0.0.1:4222"
    creds: str = ""
    tls: str = ""
    root: str = ""
    js_domain: str = ""
    inbox_prefixes: tuple[str, ...] = ("_INBOX.",)


class PathSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[paths]`: shared with agentd, hostd's own, volatile."""

    data: str = "/var/lib/mvm"
    state: str = "/var/lib/hostd"
    run: str = "/run/hostd"


class VmmSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[vmm]`. `jail_base` empty means `<state>/jails`; times in seconds, sizes in bytes.

    `versions_dir` has several versions side by side, and replaces `firecracker` and `jailer`; of
    these Start uses `version`, empty: the newest. `allow_untested` also allows versions newer than
    hostd knows. `warm_pool` is how many idle VMMs are launched ahead; 0 turns it off.
    Each running VMM is asked every `probe_interval_s` whether it answers (0: never); `on_hang` is
    report or kill.
    """

    firecracker: str = "/usr/local/bin/firecracker"
    jailer: str = "/usr/local/bin/jailer"
    versions_dir: str = ""
    version: str = ""
    allow_untested: bool = False
    jail_base: str = ""
    uid_base: int = 2_000_000_000
    uid_count: int = 65_536
    boot_args: str = ""
    ready_timeout_s: float = 60.0
    api_timeout_s: float = 10.0
    snapshot_timeout_s: float = 300.0
    log_bytes: int = 1_048_576
    max_file_mib: int = 1_048_576
    warm_pool: int = 0
    probe_interval_s: float = 60.0
    on_hang: str = "report"


class MetricsSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[metrics]`: `host:port` of `/metrics`, `/livez`, `/readyz`; empty turns it off."""

    listen: str = "127.0.0.1:9464"


class NetworkSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[network]`. `uplinks` empty means the interfaces of the default routes.

    `host_services` are `tcp/<port>` or `udp/<port>` that guests may reach on their gateway.
    `denied` are CIDRs that no guest reaches, in addition to `allowed` and 169.254.0.0/16; by
    default the metadata services of Azure, Alibaba Cloud and Oracle Cloud. `policy` is a file with
    exceptions of single tenants.
    `exempt_routes` are CIDRs of host routes that a tenant's subnet may overlap. `max_flows` is the
    maximum of a tenant's flows to the outside, so that one cannot fill the host's conntrack table.
    """

    allowed: tuple[str, ...] = ("10.240.0.0/12",)
    uplinks: tuple[str, ...] = ()
    host_services: tuple[str, ...] = ()
    isolate_guests: bool = False
    denied: tuple[str, ...] = ("168.63.129.16/32", "100.100.100.200/32", "192.0.0.192/32")
    policy: str = ""
    exempt_routes: tuple[str, ...] = ()
    max_flows: int = 16_384


class LimitSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[limits]`: concurrency and quotas.

    After `quarantine_after` launches in a row that failed by the host's fault no Start is taken; 0
    turns that off.

    Of each kind of slot one tenant holds at most half. `mem_reserve_mib`, `disk_reserve_mib` and
    `cpu_reserve` (CPUs) are kept for the host; a part of the disk's is the ballast file. Of the
    other CPUs each carries `vcpu_overcommit` vCPUs. From `disk_high_percent` of the file system
    used until `disk_low_percent`, what takes more space is refused; 100 turns that off.
    """

    enforce: bool = True
    cgroup: str = "hostd"
    max_drain_s: int = 3600
    max_stop_s: int = 300
    lane_depth: int = 100
    tenant_depth: int = 1000
    host_depth: int = 5000
    imports: int = 4
    boots: int = 8
    restores: int = 16
    snapshots: int = 2
    networks: int = 4
    max_artifact_mib: int = 65_536
    mem_reserve_mib: int = 512
    cpu_reserve: float = 0.0
    vcpu_overcommit: float = 256.0
    disk_reserve_mib: int = 1024
    disk_high_percent: float = 98.0
    disk_low_percent: float = 96.0
    vmm_overhead_mib: int = 64
    shutdown_s: float = 20.0
    retry_budget_s: float = 30.0
    quarantine_after: int = 10


class SweepSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[sweep]`: orphans are removed (`remove`) or only counted (`report`).

    One is removed once it was seen twice, 60 s apart, and then for another `grace_s`.
    """

    mode: str = "remove"
    per_hour: int = 5
    grace_s: float = 600.0


class LogSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[log]`: `level` is debug, info, warning or error."""

    level: str = "info"


class TraceSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[trace]`: spans go to `endpoint`, an OTLP/HTTP base URL (`/v1/traces` is added); empty: off.

    `ca` is a file with the authorities of an https endpoint; empty: the system's. `sample_ratio` is
    the part of the traces that begin on this host; of others the sender decides.
    """

    endpoint: str = ""
    ca: str = ""
    sample_ratio: float = 1.0


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole file; each key `a.b` is also `HOSTD_A_B` in the environment, which overrides it."""

    host: HostSettings = HostSettings()
    nats: NatsSettings = NatsSettings()
    paths: PathSettings = PathSettings()
    vmm: VmmSettings = VmmSettings()
    metrics: MetricsSettings = MetricsSettings()
    network: NetworkSettings = NetworkSettings()
    limits: LimitSettings = LimitSettings()
    sweep: SweepSettings = SweepSettings()
    log: LogSettings = LogSettings()
    trace: TraceSettings = TraceSettings()

    @property
    def root(self) -> str:
        """The subject root, e.g. `hostd.v1.default`."""
        return self.nats.root or f"hostd.v1.{self.host.cell}"

    @property
    def jail_base(self) -> str:
        return self.vmm.jail_base or f"{self.paths.state}/jails"


def without_password(urls: str) -> str:
    """`[nats] url` for a message: without user, password or token, which is all up to the last `@`
    of each, even if it is not a URL."""
    return ",".join(map(_without_password, urls.split(",")))


def _without_password(url: str) -> str:
    credential, at, host = url.rpartition("@")
    scheme, mark, _ = credential.partition("://")
    return f"{scheme}{mark}{host}" if at and mark and scheme.strip().isalpha() else host
