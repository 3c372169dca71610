"""NATS subjects, stream and bucket names, and lanes. Builds and parses text; knows no NATS.

Every token comes from a checked id, so no subject can be widened by what a tenant calls itself.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from schemas import naming
from schemas.decode_error import DecodeError, quoted
from schemas.requests import InstanceRef, Ping, Request, SetupNetwork, TeardownNetwork

CELL_PATTERN = re.compile(r"[A-Za-z0-9_-]{1,32}")
ROOT_PATTERN = re.compile(r"[A-Za-z0-9_-]{1,63}(\.[A-Za-z0-9_-]{1,63}){0,7}")
REPLY_TO_PATTERN = re.compile(r"[\x21-\x7e]{1,255}")
LANE_IDS: dict[str, tuple[str, ...]] = {
    "instance": ("tenant_id", "pool_id", "instance_id"),
    "network": ("tenant_id",),
    "host": (),
}


@dataclass(frozen=True, slots=True, order=True)
class Lane:
    """The ordering key of commands: one instance, one tenant's network, or the host.

    `str(lane)` is the tokens after `cmd`: `instance.T.P.I`, `network.T`, `host`.
    """

    kind: str
    ids: tuple[str, ...] = ()

    @classmethod
    def instance(cls, ref: InstanceRef) -> "Lane":
        return cls("instance", (ref.tenant_id, ref.pool_id, ref.instance_id))

    @classmethod
    def network(cls, tenant_id: str) -> "Lane":
        return cls("network", (tenant_id,))

    @classmethod
    def host(cls) -> "Lane":
        return cls("host")

    @classmethod
    def of_request(cls, request: Request) -> "Lane":
        """The lane that a request belongs to."""
        if isinstance(request, Ping):
            return cls.host()
        if isinstance(request, SetupNetwork | TeardownNetwork):
            return cls.network(request.tenant_id)
        return cls.instance(request.ref)

    @classmethod
    def parse(cls, tokens: str) -> "Lane":
        """The inverse of `str`.

        Raises:
            DecodeError: not a lane, or an id in it that breaks the rule for ids; path `subject`.
        """
        kind, *ids = tokens.split(".")
        if kind not in LANE_IDS or len(ids) != len(LANE_IDS[kind]):
            raise DecodeError("subject", f"{quoted(tokens)} is no lane")
        for token in ids:
            if not naming.ID_PATTERN.fullmatch(token):
                raise DecodeError("subject", f"{quoted(token)} is no id")
        return cls(kind, tuple(ids))

    def check(self, request: Request) -> None:
        """That the request belongs here.

        Raises:
            DecodeError: it does not; the path names the first id that differs.
        """
        own = Lane.of_request(request)
        if own == self:
            return
        path = f"$.request.{type(request).__name__}"
        if own.kind == self.kind:
            pairs = zip(LANE_IDS[self.kind], self.ids, own.ids, strict=True)
            path += next(f".{name}" for name, here, there in pairs if here != there)
        raise DecodeError(path, f"belongs to the lane {own}, was sent to {self}")

    @property
    def ref(self) -> InstanceRef | None:
        """The instance, if it is an instance's lane."""
        return InstanceRef(*self.ids) if self.kind == "instance" else None

    @property
    def tenant_id(self) -> str | None:
        return self.ids[0] if self.ids else None

    def __str__(self) -> str:
        return ".".join((self.kind, *self.ids))


@dataclass(frozen=True, slots=True)
class Subjects:
    """The names of one host: `root` is e.g. `hostd.v1.<cell>`.

    Raises:
        ValueError: root, host id or cell cannot stand in a subject or a stream's name.
    """

    root: str
    host_id: str
    cell: str

    def __post_init__(self) -> None:
        if not ROOT_PATTERN.fullmatch(self.root):
            raise ValueError(f"{quoted(self.root)} is no subject root")
        if not naming.HOST_ID_PATTERN.fullmatch(self.host_id):
            raise ValueError(f"{quoted(self.host_id)} is no host id")
        if not CELL_PATTERN.fullmatch(self.cell):
            raise ValueError(f"{quoted(self.cell)} is no cell")

    # -- streams, bucket, consumer: the names are the cell's -------------------------------------

    @property
    def commands_stream(self) -> str:
        return f"HOSTD_CMD_{self.cell}"

    @property
    def events_stream(self) -> str:
        return f"HOSTD_EVT_{self.cell}"

    @property
    def replies_stream(self) -> str:
        return f"HOSTD_REPLY_{self.cell}"

    @property
    def dead_stream(self) -> str:
        return f"HOSTD_DEAD_{self.cell}"

    @property
    def state_bucket(self) -> str:
        return f"HOSTD_STATE_{self.cell}"

    @property
    def consumer(self) -> str:
        """The durable consumer's name, one per host."""
        return self.host_id

    @property
    def command_filter(self) -> str:
        """What this host's consumer takes."""
        return f"{self.root}.{self.host_id}.cmd.>"

    def of_all_hosts(self, kind: str) -> str:
        """What a stream of the cell holds; `kind` is `cmd`, `evt`, `reply` or `dead`."""
        return f"{self.root}.*.{kind}.>"

    # -- one subject -----------------------------------------------------------------------------

    def command(self, lane: Lane) -> str:
        return f"{self.root}.{self.host_id}.cmd.{lane}"

    def event(self, lane: Lane, kind: str) -> str:
        return f"{self.root}.{self.host_id}.evt.{lane}.{kind}"

    def reply(self, lane: Lane) -> str:
        return f"{self.root}.{self.host_id}.reply.{lane}"

    def dead(self, lane: Lane) -> str:
        return f"{self.root}.{self.host_id}.dead.{lane}"

    def ask(self, verb: str) -> str:
        return f"{self.root}.{self.host_id}.ask.{verb}"

    def state_key(self, lane: Lane) -> str:
        """The key in the bucket: `<host>.instance.T.P.I`, `<host>.network.T`, `<host>.host`."""
        return f"{self.host_id}.{lane}"

    @property
    def host_key(self) -> str:
        """The key of the host's own value, the lease."""
        return self.state_key(Lane.host())

    def parse_command(self, subject: str) -> Lane:
        """The lane of a command's subject.

        Raises:
            DecodeError: another host's subject, or no lane after `cmd`; path `subject`.
        """
        own = f"{self.root}.{self.host_id}.cmd."
        if not subject.startswith(own):
            raise DecodeError("subject", f"{quoted(subject)} is not below {own[:-1]}")
        return Lane.parse(subject[len(own) :])


def lane_of_any(subject: str, kind: str) -> Lane:
    """The lane of a subject of any host below any root; `kind` is `cmd`, `reply`, `evt`, `dead`.

    Raises:
        DecodeError: it is no such subject; path `subject`.
    """
    tokens = subject.split(".")
    # A root, a host, the kind, the lane; a cell or an id may be called `cmd` too.
    for at in range(2, len(tokens) - 1):
        if tokens[at] == kind and tokens[at + 1] in LANE_IDS:
            end = len(tokens) - 1 if kind == "evt" else len(tokens)
            return Lane.parse(".".join(tokens[at + 1 : end]))
    raise DecodeError("subject", f"{quoted(subject)} is not <root>.<host>.{kind}.<lane>")


def check_reply_to(reply_to: str, prefixes: Sequence[str]) -> None:
    """That hostd may publish there: below an allowed prefix, one subject, no wildcard.

    Raises:
        DecodeError: it may not; nothing must be sent there.
    """
    path = "$.reply_to"
    if not REPLY_TO_PATTERN.fullmatch(reply_to):
        raise DecodeError(path, "is not 1 to 255 printable ASCII characters without blanks")
    if not any(reply_to.startswith(prefix) for prefix in prefixes):
        raise DecodeError(path, f"{quoted(reply_to)} does not begin with {' or '.join(prefixes)}")
    tokens = reply_to.split(".")
    if "" in tokens or any("*" in token or ">" in token for token in tokens):
        raise DecodeError(path, f"{quoted(reply_to)} has an empty token or a wildcard")
