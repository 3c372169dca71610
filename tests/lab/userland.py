"""A Debian userland, copied from the packages installed on this machine. Nothing is downloaded.

Maintainer scripts do not run: the directory contains the files, a linker cache, byte code and
the few files of /etc that programs need.
"""

import os
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

PACKAGES = (
    "base-files",
    "bash",
    "busybox-static",
    "coreutils",
    "dash",
    "diffutils",
    "dpkg",
    "e2fsprogs",
    "findutils",
    "grep",
    "iproute2",
    "kmod",
    "libc-bin",
    "libnftables1",
    "mount",
    "nftables",
    "procps",
    "python3.11",
    "sed",
    "systemd",
    "tar",
    "util-linux",
)
UNWANTED = ("/usr/share/doc", "/usr/share/man", "/usr/share/locale", "/usr/share/bash-completion")
UNWANTED_PACKAGES = {"perl-base", "debconf", "libpam-modules"}
MERGED = ("bin", "sbin", "lib", "lib64")  # symlinks into usr/, as on every Debian since 12
ETC = {
    "passwd": "root:x:0:0:root:/root:/bin/bash\nnobody:x:65534:65534::/nonexistent:/bin/false\n",
    "group": "root:x:0:\nnogroup:x:65534:\n",
    "hosts": "127.0.0.1 localhost lab\n::1 localhost\n",
    "hostname": "lab\n",
    "machine-id": "6c6162006c6162006c6162006c616200\n",
    "nsswitch.conf": "passwd: files\ngroup: files\nhosts: files\n",
}


def versions() -> str:
    """The packages of the userland, each with its version."""
    facts = _installed()
    return "\n".join(f"{name} {facts[name][0]}" for name in _closure(facts))


def make_userland(tree: Path) -> None:
    """Fill an empty directory."""
    for name in MERGED:
        (tree / "usr" / name).mkdir(parents=True)
        (tree / name).symlink_to(f"usr/{name}")
    for directory in ("dev", "proc", "sys", "run", "root", "payload", "var/lib", "etc"):
        (tree / directory).mkdir(parents=True, exist_ok=True)
    for directory in ("tmp", "var/tmp"):
        (tree / directory).mkdir(parents=True)
        (tree / directory).chmod(0o1777)
    packages = _closure(_installed())
    for package in packages:
        _copy_package(package, tree)
    _write_package_database(packages, tree / "var/lib/dpkg")
    for name, content in ETC.items():
        (tree / "etc" / name).write_text(content)
    subprocess.run(["ldconfig", "-r", str(tree)], check=True)
    library = tree / "usr/lib/python3.11"
    compileall = ["/usr/bin/python3.11", "-m", "compileall", "-q", "-s", str(tree), "-p", "/"]
    subprocess.run([*compileall, str(library)], check=True)


def _installed() -> dict[str, tuple[str, list[str]]]:
    """Package name -> (version, names it depends on), for all installed packages."""
    fields = (
        "${Package}\t${Version}\t${Pre-Depends}, ${Depends}\t${Provides}\t${db:Status-Status}\n"
    )
    listing = subprocess.run(
        ["dpkg-query", "-W", "-f", fields], check=True, capture_output=True, text=True
    ).stdout
    facts: dict[str, tuple[str, list[str]]] = {}
    for line in listing.splitlines():
        name, version, depends, _, status = line.split("\t")
        if status == "installed":
            facts[name] = (version, list(_names(depends)))
    return facts


def _names(depends: str) -> Iterable[str]:
    for alternatives in depends.split(","):
        for alternative in alternatives.split("|"):
            words = alternative.split()
            if words:
                yield words[0].split(":")[0]


def _closure(facts: dict[str, tuple[str, list[str]]]) -> list[str]:
    missing = [name for name in PACKAGES if name not in facts]
    if missing:
        raise SystemExit(f"the lab is made of installed packages; missing: {' '.join(missing)}")
    wanted: set[str] = set(PACKAGES)
    todo: list[str] = list(PACKAGES)
    while todo:
        for name in facts[todo.pop()][1]:
            if name in facts and name not in wanted | UNWANTED_PACKAGES:
                wanted.add(name)
                todo.append(name)
    return sorted(wanted)


def _write_package_database(packages: list[str], directory: Path) -> None:
    """So that dpkg there knows what is installed; the files of packages are not listed."""
    for name in ("info", "updates", "triggers", "parts"):
        (directory / name).mkdir(parents=True, exist_ok=True)
    for name in ("available", "diversions", "statoverride"):
        (directory / name).touch()
    status = subprocess.run(["dpkg-query", "-s", *packages], check=True, capture_output=True)
    (directory / "status").write_bytes(status.stdout)
    for package in packages:
        (directory / "info" / f"{package}.list").touch()


def _copy_package(package: str, tree: Path) -> None:
    listing = subprocess.run(
        ["dpkg-query", "-L", package], check=True, capture_output=True, text=True
    ).stdout
    for line in listing.splitlines():
        source = Path(line)
        if line.startswith(UNWANTED) or not line.startswith("/") or not os.path.lexists(source):
            continue
        target = tree / line.lstrip("/")
        if source.is_dir() and not source.is_symlink():
            target.mkdir(parents=True, exist_ok=True)
        elif not os.path.lexists(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target, follow_symlinks=False)
