"""`underpass trace drops` tells each refusal of the eBPF programs: whose, why, to where; and they
write nothing down while nobody traces."""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from agent.cli.demo.mesh import Mesh
from agent.cli.demo.netns import connect, inside, open_socket
from agent.cli.demo.shop import ECHO_PORT, NAMESPACE
from agent.trace import pinned
from agent.trace.refusals import LEASE, TRACING
from tests.netns.test_lifecycle import dataplane_pid
from tests.support.eventually import eventually
from tests.support.meshes import mesh_of, stocked
from tests.support.trace import Trace

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from agent.cli.demo.manifests import Pod
    from agent.cli.demo.shop import Shop
    from agent.cli.demo.world import World

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.modes("ebpf")]

# Connections of a pod that may wait to be accepted.
PENDING = 32
DENY = f"namespaces: {{{NAMESPACE}: {{udp: deny}}}}\n"
# UDP-Lite, whose sockets aren't made at all.
UDP_LITE = 136
# More than the ring holds.
FLOOD = 6000


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mesh(
    world: World, capture: str, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Mesh]:
    folder, pending = tmp_path_factory.mktemp("mesh"), f"--ebpf-pod-max-pending={PENDING}"
    async with mesh_of(Mesh, world, capture, folder, pending, settings=DENY) as made:
        yield made


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shop(mesh: Mesh) -> Shop:
    made = await stocked(mesh)
    await mesh.start()
    return made


async def test_a_bound_socket_is_told_with_its_process_to_all_who_trace(
    mesh: Mesh, shop: Shop
) -> None:
    where, where6 = shop.db.sandbox.ipv4, shop.db.sandbox.ipv6
    async with (
        Trace(mesh, "drops", "--pod", "web", "--port", str(ECHO_PORT)) as trace,
        Trace(mesh, "drops", "--namespace", NAMESPACE) as beside,
    ):
        await trace.ready()
        await beside.ready()
        leaks(shop.batch, where)
        leaks(shop.web, where, port=ECHO_PORT + 1)
        began = time.monotonic()
        leaks(shop.web, where)
        row = await trace.row(event="refused", reason="bound_device")
        assert time.monotonic() - began < 2
        leaks(shop.web, where6)
        row6 = await trace.row(reason="bound_device", destination=f"[{where6}]:{ECHO_PORT}")
        other = await beside.row(reason="bound_device", pod=f"{NAMESPACE}/batch")
        await beside.row(reason="bound_device", destination=f"{where}:{ECHO_PORT + 1}")
        await beside.row(
            reason="bound_device", pod=f"{NAMESPACE}/web", destination=row["destination"]
        )
    assert (row["pod"], row["pod_uid"]) == (f"{NAMESPACE}/web", shop.web.uid)
    assert (row["number"], row["count"], row["direction"]) == (33, 1, "outbound")
    assert row["text"].startswith("deny: the socket is bound to a device")
    assert (row["protocol"], row["source"]) == ("tcp", shop.web.sandbox.ipv4)
    assert row["destination"] == f"{where}:{ECHO_PORT}"
    assert (row["pid"], row["process"]) == (os.getpid(), comm())
    assert row6["source"] == shop.web.sandbox.ipv6
    assert other["source"] == shop.batch.sandbox.ipv4
    # Neither another pod's nor another port's.
    told = [row for row in trace.rows if row["event"] == "refused"]
    assert [row["destination"] for row in told] == [row["destination"], row6["destination"]]


async def test_a_pod_over_its_budget_is_told_within_two_seconds(mesh: Mesh, shop: Shop) -> None:
    async with Trace(mesh, "drops", "--pod", "web") as trace:
        await trace.ready()
        with unanswered(shop.web), contextlib.ExitStack() as opened:
            began = time.monotonic()
            refused = 0
            for _ in range(PENDING + 3):
                made = opened.enter_context(open_socket(shop.web.sandbox.namespace, socket.AF_INET))
                try:
                    made.connect((shop.db.sandbox.ipv4, ECHO_PORT))
                except BlockingIOError:
                    pass
                except PermissionError:
                    refused += 1
            row = await trace.row(event="refused", reason="budget")
            assert time.monotonic() - began < 2
            assert refused == 3
            await eventually(lambda: len(told(trace, "budget")) == 3, what=lambda: trace.rows)
    assert row["destination"] == f"{shop.db.sandbox.ipv4}:{ECHO_PORT}"
    assert (row["number"], row["pod"]) == (37, f"{NAMESPACE}/web")


async def test_datagrams_are_told_by_what_refused_them(mesh: Mesh, shop: Shop) -> None:
    where = (shop.db.sandbox.ipv4, 9999)

    def send() -> int:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as made:
            made.bind(("0.0.0.0", 0))
            with pytest.raises(PermissionError):
                made.sendto(b"x", where)
            return int(made.getsockname()[1])

    def create() -> None:
        with pytest.raises(PermissionError):
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM, UDP_LITE)

    own = shop.web.sandbox.ipv4
    async with Trace(mesh, "drops", "--pod", "web") as trace:
        await trace.ready()
        port = inside(shop.web.sandbox.namespace, send)
        sent = await trace.row(event="refused", reason="udp_denied", protocol="udp")
        inside(shop.web.sandbox.namespace, create)
        made = await trace.row(event="refused", reason="udp_denied", protocol="udplite")
    assert (sent["source"], sent["destination"]) == (f"{own}:{port}", f"{where[0]}:{where[1]}")
    assert (made["source"], made["destination"], made["pid"]) == (own, "", os.getpid())


@pytest.mark.parametrize(
    ("protocol", "name", "reason"),
    [(socket.IPPROTO_TCP, "tcp", "raw_socket"), (socket.IPPROTO_UDP, "udp", "udp_denied")],
)
async def test_what_a_raw_socket_may_not_send_is_told(
    mesh: Mesh, shop: Shop, protocol: int, name: str, reason: str
) -> None:
    ends = [
        (shop.web.sandbox.ipv4, shop.db.sandbox.ipv4, socket.AF_INET),
        (shop.web.sandbox.ipv6, shop.db.sandbox.ipv6, socket.AF_INET6),
    ]

    def send(family: socket.AddressFamily, where: str) -> None:
        made = socket.socket(family, socket.SOCK_RAW, protocol)
        with made, pytest.raises(PermissionError):
            made.sendto(bytes(20), (where, 0))

    async with Trace(mesh, "drops", "--pod", "web") as trace:
        await trace.ready()
        for source, where, family in ends:
            inside(shop.web.sandbox.namespace, lambda f=family, w=where: send(f, w))  # type: ignore[misc]
            row = await trace.row(event="refused", reason=reason, source=source)
            assert (row["protocol"], row["direction"]) == (name, "outbound")
            assert where in row["destination"]


async def test_a_connection_to_the_proxys_own_port_is_told(mesh: Mesh, shop: Shop) -> None:
    def straight() -> bytes:
        with socket.create_connection(("127.0.0.1", 15001), 5) as made:
            return made.recv(1)

    async with Trace(mesh, "drops", "--pod", "web") as trace:
        await trace.ready()
        with contextlib.suppress(ConnectionResetError):
            assert inside(shop.web.sandbox.namespace, straight) == b""
        row = await trace.row(event="refused", reason="unknown_destination")
    assert row["destination"] == "127.0.0.1:15001"
    assert row["source"].startswith("127.0.0.1:")


async def test_what_was_overwritten_is_told_as_lost(mesh: Mesh, shop: Shop) -> None:
    async with Trace(mesh, "drops", "--pod", "web") as trace:
        await trace.ready()
        trace.process.send_signal(signal.SIGSTOP)
        try:
            leaks(shop.web, shop.db.sandbox.ipv4, times=FLOOD)
        finally:
            trace.process.send_signal(signal.SIGCONT)
        await eventually(lambda: "were lost" in trace.notes, what=lambda: trace.notes)
        lost = int(trace.notes.split(" refusals were lost")[0].split()[-1])
        await eventually(
            lambda: len(told(trace, "bound_device")) + lost == FLOOD,
            what=lambda: (len(trace.rows), trace.notes),
        )


async def test_a_killed_tracer_leaves_nothing_on(mesh: Mesh, shop: Shop) -> None:
    pins = Path((await mesh.admin(shop.web.sandbox.node, "status"))["capture"]["pins"])
    async with Trace(mesh, "drops") as trace:
        await trace.ready()
        before = state(pins)
        assert before.until > time.monotonic_ns()
        leaks(shop.web, shop.db.sandbox.ipv4)
        assert state(pins).told == before.told + 1
        trace.process.kill()
        await trace.process.wait()
    await eventually(lambda: state(pins).until < time.monotonic_ns(), within=LEASE + 1)
    told = state(pins).told
    leaks(shop.web, shop.db.sandbox.ipv4)
    assert state(pins).told == told


async def test_a_person_reads_who_was_refused_what_and_why(mesh: Mesh, shop: Shop) -> None:
    words = (sys.executable, "-m", "agent.cli.main", f"--run-dir={mesh.run_dir}")
    node = f"--node={shop.web.sandbox.node.name}"
    child = await asyncio.create_subprocess_exec(
        *(*words, node, "trace", "drops", "--pod", "web"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert child.stdout is not None
    assert child.stderr is not None
    try:
        async with asyncio.timeout(20):
            assert b"Tracing" in await child.stderr.readline()
            leaks(shop.web, shop.db.sandbox.ipv4)
            line = (await child.stdout.readline()).decode()
    finally:
        child.send_signal(signal.SIGINT)
        await child.communicate()
    assert f"{NAMESPACE}/web  bound_device (33)  tcp {shop.web.sandbox.ipv4} → " in line
    assert "by underpass: deny: the socket is bound to a device" in line
    assert f"{comm()}[{os.getpid()}]" in line


# Last: it ends the node's processes.
async def test_a_packet_to_a_pod_without_a_data_plane_is_told(mesh: Mesh, shop: Shop) -> None:
    node = shop.web.sandbox.node
    async with Trace(mesh, "drops", "--pod", "web") as trace:
        await trace.ready()
        doomed = await dataplane_pid(mesh, node)
        # Else it would start another at once.
        await mesh.kill(node.name)
        os.kill(doomed, signal.SIGKILL)
        await eventually(lambda: ended(doomed))
        began = time.monotonic()
        where = f"{shop.web.sandbox.ipv4}:{ECHO_PORT}"
        # As by a machine on which nobody listens.
        with pytest.raises(ConnectionRefusedError):
            await connect(shop.legacy.sandbox.namespace, shop.web.sandbox.ipv4, ECHO_PORT)
        row = await trace.row(event="refused", reason="no_listener")
        assert time.monotonic() - began < 2
        await trace.row(event="dropped", reason="NO_SOCKET", destination=where)
    assert (row["pod"], row["direction"]) == (f"{NAMESPACE}/web", "inbound")
    assert row["source"].startswith(f"{shop.legacy.sandbox.ipv4}:")
    assert row["destination"] == where
    assert (row["process"], row["pid"]) == ("", 0)
    await mesh.start_agent(node)
    await mesh.settled()


# ---- helpers


def told(trace: Trace, reason: str) -> list[dict[str, object]]:
    return [row for row in trace.rows if row.get("reason") == reason]


def leaks(pod: Pod, host: str, *, port: int = ECHO_PORT, times: int = 1) -> None:
    """Would leave by the pod's device, past the mesh; fails if it isn't refused."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET

    def attempt() -> None:
        with socket.socket(family) as made:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth0")
            for _ in range(times):
                with pytest.raises(PermissionError):
                    made.connect((host, port))

    inside(pod.sandbox.namespace, attempt)


@contextlib.contextmanager
def unanswered(pod: Pod) -> Iterator[None]:
    """What the pod dials gets no answer from the data plane."""
    enter = ["nsenter", f"--net=/run/netns/{pod.sandbox.namespace}", "nft"]
    chain = "chain in { type filter hook input priority 0; tcp dport 15001 drop; }"
    subprocess.run([*enter, f"table inet mute {{ {chain}; }}"], check=True)
    try:
        yield
    finally:
        subprocess.run([*enter, "delete", "table", "inet", "mute"], check=True)


class State:
    """What the programs see of tracers, and how many refusals they have told so far."""

    def __init__(self, until: int, told: int) -> None:
        self.until = until
        self.told = told


def state(pins: Path) -> State:
    fd = pinned.opened(pins / "maps/tracing")
    try:
        with mmap.mmap(fd, mmap.PAGESIZE) as memory:
            return State(*TRACING.unpack_from(memory))
    finally:
        os.close(fd)


def ended(pid: int) -> bool:
    """With all its threads, each of which keeps its listeners; also when nobody has taken notice
    yet."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        return len(os.listdir(f"/proc/{pid}/task")) == 1 and "\nState:\tZ" in status
    except (FileNotFoundError, ProcessLookupError):
        return True


def comm() -> str:
    """Of the thread that `inside` starts: a new one has the name of the one that starts it."""
    return Path("/proc/thread-self/comm").read_text().strip()
