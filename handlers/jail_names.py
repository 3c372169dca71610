"""The names of everything in a jail, in one list. Pure: `handlers/host/jail/layout.py` opens them.

`<jail_base>/firecracker/<jail id>/` belongs to root. `root/` in it belongs to the jail's uid and is
`/` for the VMM, so a name below is relative to `root/` for the host and to `/` for the VMM.

Source: docs/jailer.md of Firecracker.
"""

# The jailer names the directory of all jails, and its copy in each, after the executable.
FIRECRACKER = "firecracker"
ROOT = "root"
METADATA = "hostd.json"  # beside `root/`, where the VMM cannot reach it

# Hard links to the artifacts and to the instance's data disk.
KERNEL = "vmlinux"
INITRD = "initrd"
ROOTFS = "rootfs.ext4"
DATA_DISK = "data.ext4"

# Made by hostd before the jailer runs.
LOG = "log"
SERIAL = "serial"
CONFIG_DRIVE = "config.ext4"
SECRETS_DIR = "secrets"  # a tmpfs
SECRETS_DRIVE = "secrets.ext4"

# Made by the jailer and by the VMM.
DEVICES_DIR = "dev"
RUN_DIR = "run"
PID_FILE = "firecracker.pid"
API_SOCKET = "api.sock"
VSOCK_SOCKET = "v.sock"

# A snapshot's files, by these names in `snap/` while the VMM writes them, in `<state>/snapshots`
# while the instance sleeps, and in `woken/` while a VM runs from them.
SNAPSHOT_DIR = "snap"
WOKEN_DIR = "woken"
STATE = "state"
MEMORY = "mem"


def in_jail(*names: str) -> str:
    """The path as the VMM sees it, e.g. `/secrets/secrets.ext4`."""
    return "/" + "/".join(names)


def jails_dir(jail_base: str) -> str:
    """The directory that has one directory per jail."""
    return f"{jail_base}/{FIRECRACKER}"


def jail_dir(jail_base: str, jail_id: str) -> str:
    """The directory of one jail, root's. `jail_id` must have been checked."""
    return f"{jails_dir(jail_base)}/{jail_id}"


def jail_root(jail_base: str, jail_id: str) -> str:
    """The directory that is `/` for the VMM. `jail_id` must have been checked."""
    return f"{jail_dir(jail_base, jail_id)}/{ROOT}"
