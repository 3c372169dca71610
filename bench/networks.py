"""SetupNetwork of a new tenant against `ip` and `nft` processes that do and read back the same."""

import asyncio
import subprocess
import time

from bench.bench_host import BenchHost
from bench.report.budgets import at_most, faster
from bench.report.rows import Measured, p99, row
from handlers.host.net.bridges import GATEWAY_OFFSET, SYSCTLS
from handlers.host.net.chains import base_script
from handlers.host.net.tenant_rules import tenant_members
from handlers.specs import TenantRulesSpec
from schemas import naming
from schemas.requests import SetupNetwork, TeardownNetwork, TenantNet
from worker.cli.seed import net_of

ROUNDS = 25
SETTLE_S = 0.15
LIMIT_MS = 8.0
FASTER = 3.0
FIRST_ID, FIRST_RAW_ID = 100, 200


async def measure(bench: BenchHost, rounds: int = ROUNDS) -> Measured:
    """Both in turns; each network is removed again."""
    mine: list[float] = []
    raw: list[float] = []
    nft(base_script(16_384).replace(" hostd", " bench"))
    try:
        for number in range(rounds + 1):
            tenant = f"net-{number}"
            seeded = bench.seed("i-0", tenant=tenant, net_id=FIRST_ID + number)
            net = net_of(FIRST_RAW_ID + number)
            hostd_first = bool(number % 2)
            for hostd in (hostd_first, not hostd_first):
                if hostd:
                    mine.append((await bench.sender.send(SetupNetwork(tenant, seeded.net))).took_ms)
                    await asyncio.sleep(SETTLE_S)
                    await bench.sender.send(TeardownNetwork(tenant, seeded.net))
                else:
                    raw.append(await asyncio.to_thread(set_up_by_processes, net) * 1e3)
                    await asyncio.sleep(SETTLE_S)
                    await asyncio.to_thread(run, "ip", "link", "delete", net.bridge_name)
                await asyncio.sleep(SETTLE_S)
            if number == 0:
                mine.clear()
                raw.clear()
    finally:
        nft("delete table inet bench\ndelete table bridge bench\n")
    name = "SetupNetwork, new tenant"
    budget = at_most(LIMIT_MS) & faster(FASTER)
    return Measured(
        [
            row(f"{name}, p50", "ms", mine, raw, budget=budget),
            row(f"{name}, p99", "ms", mine, raw, stat=p99),
        ]
    )


def set_up_by_processes(net: TenantNet) -> float:
    """Seconds, with one process per operation as in a shell script; everything is read back."""
    bridge = net.bridge_name
    members = tenant_members(TenantRulesSpec("raw", net).key)
    named = [(name.replace(" hostd ", " bench "), element) for name, element in members]
    elements = [
        f"{name} {{ {' . '.join([f'{chr(34)}{first}{chr(34)}', *rest])} }}"
        for name, (first, *rest) in named
    ]
    sysctls = [f"net/{name.format(bridge)}" for name in SYSCTLS]
    mac = naming.mac_address(net.tenant_net_id, GATEWAY_OFFSET)
    began = time.perf_counter()
    assert bridge not in run("ip", "-j", "link", "show", "type", "bridge")
    run("ip", "-j", "route", "show", "table", "all")
    nft("".join(f"add element {element}\n" for element in elements))
    nft("".join(f"get element {element}\n" for element in elements))
    options = ("stp_state", "0", "forward_delay", "0", "mcast_snooping", "0")
    run("ip", "link", "add", bridge, "address", mac, "type", "bridge", *options)
    run("sysctl", "-q", "-w", *(f"{n}={v}" for n, v in zip(sysctls, SYSCTLS.values(), strict=True)))
    gateway = f"{net.gateway_ip}/{naming.prefix_len(net)}"
    run("ip", "address", "add", gateway, "dev", bridge)
    run("ip", "link", "set", bridge, "alias", "raw", "up")
    assert mac in run("ip", "-j", "-d", "link", "show", "dev", bridge)
    assert net.gateway_ip in run("ip", "-j", "address", "show", "dev", bridge)
    assert net.ipv4_subnet in run("ip", "-j", "route", "show", "dev", bridge)
    assert run("sysctl", "-n", *sysctls).split() == list(SYSCTLS.values())
    return time.perf_counter() - began


def run(*argv: str) -> str:
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout


def nft(text: str) -> None:
    subprocess.run(["nft", "-f", "-"], input=text, check=True, capture_output=True, text=True)
