"""`HostdRequest` and `HostdResponse` as serde writes them, and the rules of a request.

Types, ranges and IDs only; checks that need settings or the host come later, see `codec.py`.
"""

from schemas import naming
from schemas.codes import Code
from schemas.decode_error import DecodeError, child, quoted
from schemas.requests import (
    PROTOCOL_MAX,
    PROTOCOL_MIN,
    DestroyInstance,
    Error,
    InstanceRequest,
    NetworkRequest,
    Ok,
    Ping,
    Pong,
    Request,
    Response,
    SetupNetwork,
    SleepInstance,
    StartInstance,
    StopInstance,
    TeardownNetwork,
    WakeInstance,
)
from schemas.subjects import LANE_IDS, Lane
from schemas.tagged import Tag, Tagged

LINE_MAX = 512
U64_MAX = 2**64 - 1
SUPPORTED = tuple(str(each) for each in range(PROTOCOL_MIN, PROTOCOL_MAX + 1))
RANGE = f"hostd speaks protocol {PROTOCOL_MIN} to {PROTOCOL_MAX}"

REQUEST: Tagged[Request] = Tagged(
    "HostdRequest",
    (
        StartInstance,
        StopInstance,
        SleepInstance,
        WakeInstance,
        DestroyInstance,
        SetupNetwork,
        TeardownNetwork,
        Ping,
    ),
    later=frozenset({"workspace_id", "volumes"}),
)
RESPONSE: Tagged[Response] = Tagged("HostdResponse", (Ok, Error, Pong))


def read_request(raw: object, path: str = "$") -> Tag[Request]:
    """A request in plain objects, with the rules that need no settings.

    Raises:
        DecodeError: with the path below `path`; `unsupported` also for non-empty `volumes`.
    """
    try:
        tag = REQUEST.read(raw, path)
    except DecodeError as error:
        if error.code is not Code.UNSUPPORTED:
            raise
        message = f"{error.message}; {RANGE}"
        raise DecodeError(error.path, message, code=error.code) from None
    request = tag.value
    if not isinstance(request, Ping):
        _check_request(request, child(path, type(request).__name__))
    return tag


def _check_request(request: InstanceRequest | NetworkRequest, path: str) -> None:
    """IDs and ranges that the types cannot express."""
    for name in LANE_IDS[Lane.of_request(request).kind]:
        value: str = getattr(request, name)
        if not naming.ID_PATTERN.fullmatch(value):
            raise DecodeError(child(path, name), f"got {quoted(value)}, want {naming.ID_RULE}")
    if isinstance(request, SetupNetwork | TeardownNetwork):
        return
    if isinstance(request, SleepInstance):
        check_u64(f"{path}.drain_timeout_secs", request.drain_timeout_secs)
    if isinstance(request, StartInstance) and request.volumes:
        message = f"volumes are not supported; {RANGE}, without them"
        raise DecodeError(f"{path}.volumes", message, code=Code.UNSUPPORTED)
    if request.workspace_id is not None and len(request.workspace_id) > LINE_MAX:
        size = len(request.workspace_id)
        raise DecodeError(f"{path}.workspace_id", f"got {size} characters, want at most {LINE_MAX}")


def check_u64(path: str, value: int | None) -> None:
    """Check that a number fits 64 bits, a bound that msgspec cannot express.

    Raises:
        DecodeError: it does not.
    """
    if value is not None and not 0 <= value <= U64_MAX:
        raise DecodeError(path, "want an unsigned 64-bit integer")
