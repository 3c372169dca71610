"""NATS subjects, stream and bucket names, and lanes. Builds and parses text; no NATS client.

Every token comes from a checked ID, so no tenant's name can widen a subject.
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
NO_SUBJECT = re.compile(r"[*>]|\.\.|^\.|\.$")  # a wildcard or an empty token in it
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
            DecodeError: not a lane, or an invalid ID in it; path `subject`.
        """
        kind, *ids = tokens.split(".")
        if kind not in LANE_IDS or len(ids) != len(LANE_IDS[kind]):
            raise DecodeError(
                "subject",
                f"got {quoted(tokens)}, want instance.<tenant>.<pool>.<instance>, "
                "network.<tenant> or host",
            )
        for token in ids:
            if not naming.ID_PATTERN.fullmatch(token):
                raise DecodeError("subject", f"got {quoted(token)}, want {naming.ID_RULE}")
        return cls(kind, tuple(ids))

    def check(self, request: Request) -> None:
        """Check that the request belongs to this lane.

        Raises:
            DecodeError: it does not; the path names the first ID that differs.
        """
        own = Lane.of_request(request)
        if own == self:
            return
        path = f"$.request.{type(request).__name__}"
        if own.kind == self.kind:
            pairs = zip(LANE_IDS[self.kind], self.ids, own.ids, strict=True)
            path += next(f".{name}" for name, here, there in pairs if here != there)
        raise DecodeError(path, f"the request belongs to lane {own}, was sent to {self}")

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
        ValueError: root, host ID or cell is not valid in a subject or the name of a stream.
    """

    root: str
    host_id: str
    cell: str

    def __post_init__(self) -> None:
        if not ROOT_PATTERN.fullmatch(self.root):
            raise ValueError(
                f"invalid subject root {quoted(self.root)}: want up to 8 tokens A-Z a-z 0-9 _ -"
            )
        if not naming.HOST_ID_PATTERN.fullmatch(self.host_id):
            raise ValueError(
                f"invalid host ID {quoted(self.host_id)}: want 1 to 63 of A-Z a-z 0-9 _ -"
            )
        if not CELL_PATTERN.fullmatch(self.cell):
            raise ValueError(f"invalid cell {quoted(self.cell)}: want 1 to 32 of A-Z a-z 0-9 _ -")

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
        """The filter subject of this host's consumer."""
        return f"{self.root}.{self.host_id}.cmd.>"

    def of_all_hosts(self, kind: str) -> str:
        """The subjects of a stream of the cell; `kind` is `cmd`, `evt`, `reply` or `dead`."""
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
        """The key of the host's value, the lease."""
        return self.state_key(Lane.host())

    def parse_command(self, subject: str) -> Lane:
        """The lane of a command's subject.

        Raises:
            DecodeError: another host's subject, or no lane after `cmd`; path `subject`.
        """
        own = f"{self.root}.{self.host_id}.cmd."
        if not subject.startswith(own):
            raise DecodeError("subject", f"got {quoted(subject)}, want a subject below {own[:-1]}")
        return Lane.parse(subject[len(own) :])


def lane_of_any(subject: str, kind: str) -> Lane:
    """The lane of a subject of any host below any root; `kind` is `cmd`, `reply`, `evt`, `dead`.

    Raises:
        DecodeError: it is not such a subject; path `subject`.
    """
    tokens = subject.split(".")
    # Root, host, kind, lane; a cell or an ID may be `cmd`, too.
    for at in range(2, len(tokens) - 1):
        if tokens[at] == kind and tokens[at + 1] in LANE_IDS:
            end = len(tokens) - 1 if kind == "evt" else len(tokens)
            return Lane.parse(".".join(tokens[at + 1 : end]))
    raise DecodeError("subject", f"got {quoted(subject)}, want <root>.<host>.{kind}.<lane>")


def check_reply_to(reply_to: str, prefixes: Sequence[str]) -> None:
    """Check that hostd may publish there: below an allowed prefix, one subject, no wildcard.

    Raises:
        DecodeError: it must not publish there.
    """
    path = "$.reply_to"
    if not REPLY_TO_PATTERN.fullmatch(reply_to):
        raise DecodeError(path, "want 1 to 255 printable ASCII characters without blanks")
    if not any(reply_to.startswith(prefix) for prefix in prefixes):
        raise DecodeError(path, f"got {quoted(reply_to)}, want one below {' or '.join(prefixes)}")
    if NO_SUBJECT.search(reply_to):
        raise DecodeError(path, f"got {quoted(reply_to)}, want no empty token and no wildcard")
