"""Read back the confinement of a VMM: IDs, cgroup, root, namespaces, capabilities, seccomp.

Source: proc_pid_status(5), proc_pid_limits(5), docs/jailer.md of Firecracker.
Needs: CAP_SYS_PTRACE.
"""

import os

from handlers.errors import HostFault
from handlers.host.linux.file_id import FileId
from handlers.host.linux.procfs import read_status, read_text
from handlers.host.vmm.processes import read_cgroup

NO_FILE = 2048
LIMIT_NAME_CHARS = 26  # of a line of /proc/<pid>/limits: "%-25s %-20s %-20s %-10s"
NO_CAPABILITIES = "0" * 16
THREAD_STATUS = (
    ("CapEff", NO_CAPABILITIES),
    ("CapPrm", NO_CAPABILITIES),
    ("CapInh", NO_CAPABILITIES),
    ("CapAmb", NO_CAPABILITIES),
    ("NoNewPrivs", "1"),
    ("Seccomp", "2"),
)
THREAD_FIELDS = frozenset({"Name", *(name for name, _ in THREAD_STATUS)})
PROCESS_FIELDS = frozenset({"Uid", "Gid", "Groups", "NSpid"})

Fact = tuple[str, object, object]


def read_uid(pid: int) -> int | None:
    """The real uid of a process; None if it is gone."""
    try:
        return int(read_status(f"/proc/{pid}/status", ("Uid",))["Uid"].split()[0])
    except (FileNotFoundError, ProcessLookupError, KeyError):
        return None


def check_process(pid: int, *, uid: int, cgroup: str, root: str, file_bytes: int) -> None:
    """Check what the jailer, and hostd before it, set before the VMM was executed.

    Raises:
        HostFault: names the first property that differs, the expected and the found value.
        OSError: the process exited while it was read.
    """
    status = read_status(f"/proc/{pid}/status", PROCESS_FIELDS)
    limits = _limits(pid)
    same_id = " ".join([str(uid)] * 4)
    in_namespaces = status["NSpid"].split()
    facts: list[Fact] = [
        ("uid", same_id, status["Uid"]),
        ("gid", same_id, status["Gid"]),
        ("groups", "", status["Groups"]),
        ("pid in its pid namespace", "1", in_namespaces[-1] if in_namespaces[1:] else "none"),
        ("cgroup", cgroup, read_cgroup(pid)),
        ("root", FileId.at(root), FileId.at(f"/proc/{pid}/root")),
        ("open files limit", str(NO_FILE), limits.get("Max open files")),
        ("file size limit", str(file_bytes), limits.get("Max file size")),
        ("core file limit", "0", limits.get("Max core file size")),
    ]
    _require(pid, facts)


def check_threads(pid: int) -> None:
    """Check the capabilities, no_new_privs and seccomp of every thread of a running VMM.

    A vCPU thread installs its own filter when it starts, which may be just after the API replied.

    Raises:
        HostFault, OSError: as `check_process`.
    """
    for thread in os.listdir(f"/proc/{pid}/task"):
        status = read_status(f"/proc/{pid}/task/{thread}/status", THREAD_FIELDS)
        name = status["Name"]
        _require(pid, [(f"{of} of thread {name}", want, status[of]) for of, want in THREAD_STATUS])


def _require(pid: int, facts: list[Fact]) -> None:
    for fact, expected, found in facts:
        if expected != found:
            raise HostFault(
                f"VMM process {pid} is not confined: {fact} is {found}, expected {expected}",
                detail={"fact": fact, "expected": str(expected), "found": str(found)},
            )


def _limits(pid: int) -> dict[str, str]:
    """Each limit's soft value, if the hard one is the same; else both."""
    found: dict[str, str] = {}
    for line in read_text(f"/proc/{pid}/limits").splitlines()[1:]:
        soft, hard = line[LIMIT_NAME_CHARS:].split()[:2]
        found[line[:LIMIT_NAME_CHARS].rstrip()] = soft if soft == hard else f"{soft}/{hard}"
    return found
