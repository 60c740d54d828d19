"""Port 15000 at upstream's paths: reads for everybody, changes only where it is allowed."""

import asyncio
import json
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import aiohttp
import pytest

from agent import slices
from agent.admin.dump import config_view
from agent.errors import Mistake
from agent.pods.choice import OwnWorkload, PodSourceChoice
from agent.values import Listen, loopback
from proto.gen import control_pb2
from tests.support.fake_dataplane import FakeConnection, FakeDataplane
from tests.unit.agent.test_admin import Node

# facts ztunnel 13.1
TOP = [
    "certificates",
    "config",
    "policies",
    "services",
    "stagedServices",
    "staticConfig",
    "version",
    "workloadState",
    "workloads",
]
CONFIG = [
    "proxy",
    "dnsProxy",
    "windowSize",
    "connectionWindowSize",
    "frameSize",
    "poolMaxStreamsPerConn",
    "poolUnusedReleaseTimeout",
    "socks5Addr",
    "adminAddr",
    "statsAddr",
    "readinessAddr",
    "inboundAddr",
    "inboundPlaintextAddr",
    "outboundAddr",
    "dnsProxyAddr",
    "illegalPorts",
    "network",
    "localNode",
    "proxyMode",
    "proxyWorkloadInformation",
    "clusterId",
    "clusterDomain",
    "caAddress",
    "caRootCert",
    "altCaHostname",
    "xdsAddress",
    "xdsRootCert",
    "altXdsHostname",
    "preferedServiceNamespace",
    "secretTtl",
    "xdsOnDemand",
    "fakeCa",
    "fakeSelfInbound",
    "selfTerminationDeadline",
    "proxyMetadata",
    "numWorkerThreads",
    "requireOriginalSource",
    "proxyArgs",
    "dnsResolverCfg",
    "dnsResolverOpts",
    "inpodUds",
    "inpodPortReuse",
    "packetMark",
    "socketConfig",
    "xdsHeaders",
    "caHeaders",
    "localhostAppTunnel",
    "ztunnelIdentity",
    "ztunnelWorkload",
    "ipv6Enabled",
    "crlPath",
    "enableEnhancedBaggage",
]


async def answer(connection: FakeConnection, request: control_pb2.Request, _: list[int]) -> None:
    """Sections in two chunks each."""
    if request.WhichOneof("body") != "dump":
        await connection.reply(request, done=control_pb2.Done())
        return
    objects = request.dump.section in ("stagedServices", "workloadState")
    for data, more in ((b"{" if objects else b"[", True), (b"}" if objects else b"]", False)):
        await connection.reply(request, more=more, chunk=control_pb2.Chunk(data=data))


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[Node]:
    made = Node(tmp_path)
    async with made.servers, FakeDataplane(made.socket, answer):
        running = asyncio.create_task(made.supervisor.run())
        while made.report.dataplane is None:
            await asyncio.sleep(0.01)
        yield made
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    await made.reconciler.close()
    await made.feed.close()
    await made.supervisor.close()


async def test_dump_has_upstreams_keys_in_their_order(node: Node) -> None:
    (node.paths.root / "mesh.yaml").write_text("workloads: [{uid: u}]\n")
    for method in ("GET", "POST"):
        code, text = await node.get("admin", "/config_dump", method)
        assert code == 200
        dump = json.loads(text)
        assert list(dump) == TOP
    assert sorted(dump["config"]) == sorted(CONFIG)
    assert dump["staticConfig"] == {"workloads": [{"uid": "u"}], "policies": [], "services": []}
    assert dump["config"]["adminAddr"] == {"Localhost": [True, 0]}
    assert dump["config"]["statsAddr"] == {"SocketAddr": "127.0.0.1:0"}
    assert dump["config"]["poolUnusedReleaseTimeout"] == {"secs": 300, "nanos": 0}


async def test_dump_without_a_data_plane_says_so(tmp_path: Path) -> None:
    made = Node(tmp_path)
    async with made.servers:
        assert await made.get("admin", "/config_dump") == (503, "no data plane serves\n")
    await made.reconciler.close()
    await made.feed.close()
    await made.supervisor.close()


def test_dump_holds_no_token_and_no_header_value(node_config: slices.Config) -> None:
    text = json.dumps(config_view(node_config))
    assert "/secret/token" not in text
    assert "hush" not in text
    assert '"xdsHeaders": ["authorization"]' in text


@pytest.fixture
def node_config(tmp_path: Path) -> slices.Config:
    plane = slices.ControlPlane(
        "https://cp:1", "/root.pem", Path("/secret/token"), headers={"authorization": "hush"}
    )
    return slices.Config(
        node=slices.Node("n1"),
        paths=slices.RunPaths(tmp_path),
        pods=PodSourceChoice("self", workload=OwnWorkload("ns", "vm", "acct")),
        capture=slices.Capture(),
        source=slices.Source(control_plane=plane),
        authority=slices.Authority(plane),
        dataplane=slices.DataplaneProcess(drain_deadline=timedelta(milliseconds=1500)),
        servers=slices.Servers(stats=None, ready=None),
        log=slices.Log(),
        limits=slices.Limits(),
    )


def test_dump_tells_modes_and_durations_as_upstream_does(node_config: slices.Config) -> None:
    view = config_view(node_config)
    assert view["proxyMode"] == "Dedicated"
    assert view["proxyWorkloadInformation"] == {
        "name": "vm",
        "namespace": "ns",
        "serviceAccount": "acct",
    }
    assert view["selfTerminationDeadline"] == {"secs": 1, "nanos": 500_000_000}
    assert view["illegalPorts"] == [15001, 15006, 15008]


async def test_page_names_the_other_paths(node: Node) -> None:
    code, text = await node.get("admin", "/")
    assert code == 200
    assert 'href="/config_dump"' in text
    assert "Not ready, pending: control plane, pods" in text
    assert (await node.get("admin", "/nonsense"))[0] == 404


async def test_levels_are_shown_and_not_changed(node: Node) -> None:
    shown = (200, "current log level is info\n")
    assert await node.get("admin", "/logging") == shown
    # istioctl shows them so.
    assert await node.get("admin", "/logging", "POST") == shown
    for query in ("level=debug", "reset", "reset=true&level=debug"):
        code, text = await node.get("admin", f"/logging?{query}", "POST")
        assert code == 403
        assert "use `underpass log`" in text
        assert "--admin-allow-changes=true" in text
    assert await node.get("admin", "/logging") == shown
    assert (await node.get("admin", "/logging", "DELETE"))[0] == 405


async def test_nobody_on_the_loopback_ends_the_agent(node: Node) -> None:
    code, text = await node.get("admin", "/quitquitquit", "POST")
    assert (code, node.ended.is_set()) == (403, False)
    assert "send SIGTERM" in text
    assert (await node.get("admin", "/quitquitquit"))[0] == 405


@pytest.fixture
async def open_node(node: Node) -> AsyncIterator[Node]:
    """The same where changes are allowed."""
    local = Listen("localhost", 0)
    await node.servers.__aexit__(None, None, None)
    node.servers = node.serving(
        slices.Servers(stats=None, ready=None, admin=local, allow_changes=True)
    )
    async with node.servers:
        yield node


async def test_allowed_changes_are_added_and_reset_first_when_asked(open_node: Node) -> None:
    async def change(query: str) -> tuple[int, str]:
        return await open_node.get("admin", f"/logging?{query}", "POST")

    assert await change("level=underpass=debug") == (
        200,
        "current log level is info,underpass=debug\n",
    )
    assert await change("reset&level=warn") == (200, "current log level is warn\n")
    assert await change("reset") == (200, "current log level is info\n")
    code, text = await change("level=loud")
    assert code == 400
    assert "loud" in text


async def test_allowed_end_is_answered_and_begins(open_node: Node) -> None:
    assert await open_node.get("admin", "/quitquitquit", "POST") == (200, "shutdown now\n")
    assert open_node.ended.is_set()


async def test_both_addresses_of_the_loopback_answer(node: Node) -> None:
    port = node.servers.bound["admin"].rpartition(":")[2]
    async with aiohttp.ClientSession() as session:
        for host in ("127.0.0.1", "[::1]"):
            async with session.get(f"http://{host}:{port}/logging") as found:
                assert found.status == 200


@pytest.mark.parametrize("raw", ["127.0.0.1:1", "[::1]:1", "127.9.9.9:1", "localhost:1", "off"])
def test_addresses_of_the_loopback(raw: str) -> None:
    assert (loopback(raw) is None) == (raw == "off")


@pytest.mark.parametrize("raw", [":15000", "0.0.0.0:1", "[::]:1", "10.0.0.1:1", "host:1"])
def test_other_addresses_are_refused(raw: str) -> None:
    with pytest.raises(Mistake, match="not on the loopback"):
        loopback(raw)
