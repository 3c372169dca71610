"""A shell on a machine of its own, as far as a page's commands can tell.

Network, processes, mounts and cgroups are those of the sandbox; `/run`, `/var/lib`, `/var/tmp` and
`/etc/hostd` are empty directories, and what is written into the clone, `/root`, `/etc`, `/opt` and
`/usr/local` goes elsewhere. All that is left in the end is killed with it.
Source: unshare(1), cgroup_namespaces(7).
"""

import contextlib
import os
import re
from collections.abc import AsyncGenerator, Mapping
from pathlib import Path
from typing import Final

from handlers.host.vmm.cgroups import CONTROLLERS, find_mount
from tests.crash.kills import until
from tests.guests.cache import REPOSITORY
from tests.guests.namespace import own_network
from tests.shell import BASH, Shell, shell

PATHS: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
INDEX: Final = re.compile(r"(?i)pip_|ssl_cert|requests_ca|.*_proxy$")
UNSHARED: Final = ("--mount", "--pid", "--cgroup", "--fork", "--kill-child", "--mount-proc")
# The cgroup namespace begins at $1; its processes are one level below, as the controllers want it.
MADE: Final = """
set -e
echo $$ > $1/cgroup.procs
exec unshare {unshared} bash -c '
set -e
umount -lR /sys/fs/cgroup
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mkdir /sys/fs/cgroup/shell
echo $$ > /sys/fs/cgroup/shell/cgroup.procs
mkdir -p $2/lib/dpkg $2/tmp $2/empty
mount --bind /var/lib/dpkg $2/lib/dpkg
mount --rbind $2/lib /var/lib
mount --bind $2/tmp /var/tmp
mount -t tmpfs sandbox /run
mkdir $2/written
mount -t tmpfs sandbox $2/written
for place in /root $PWD /etc /opt /usr/local; do
    mkdir -p $2/written$place/upper $2/written$place/work
    above=upperdir=$2/written$place/upper,workdir=$2/written$place/work
    mount -t overlay -o lowerdir=$place,$above sandbox $place
done
cd $PWD
[ ! -d /etc/hostd ] || mount --bind $2/empty /etc/hostd
exec {bash}' sandbox "$@"
"""


def limits_here() -> bool:
    """Whether the cgroup2 tree of this machine has the controllers that limits need."""
    controllers = Path(find_mount(), "cgroup.controllers").read_text(encoding="ascii").split()
    return set(CONTROLLERS) <= set(controllers)


@contextlib.asynccontextmanager
async def sandbox(
    directory: Path, environment: Mapping[str, str] | None = None, *, online: bool = False
) -> AsyncGenerator[Shell]:
    """A shell in the clone; its files are below `directory`, its network is also the test's.

    With `online` the network is this machine's, with its way to a package index.
    """
    cgroup = Path(find_mount(), f"hostd-documents-{os.getpid()}")
    variables = {
        "PATH": PATHS,
        "HOME": "/root",
        "LANG": "C.UTF-8",
        "PIP_RETRIES": "0",
        **(environment or {}),
    }
    if online:
        variables |= {name: text for name, text in os.environ.items() if INDEX.match(name)}
    with contextlib.nullcontext() if online else own_network():
        cgroup.mkdir()
        try:
            if limits_here():
                wanted = " ".join(f"+{name}" for name in CONTROLLERS)
                cgroup.parent.joinpath("cgroup.subtree_control").write_text(wanted)
            made = MADE.format(unshared=" ".join(UNSHARED), bash=" ".join(BASH))
            command = ("bash", "-c", made, "sandbox", str(cgroup), str(directory))
            async with shell(variables, command=command, directory=str(REPOSITORY)) as opened:
                yield opened
        finally:
            await _remove(cgroup)


async def _remove(cgroup: Path) -> None:
    """Once the processes of the sandbox, which are killed with its first one, have ended."""
    events = cgroup / "cgroup.events"
    await until(lambda: "populated 0" in events.read_text(encoding="ascii"), "the sandbox's end")
    for path, _, _ in os.walk(cgroup, topdown=False):
        os.rmdir(path)
