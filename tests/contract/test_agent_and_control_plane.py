"""The agent's clients against the embedded control plane: both sides speak the same protocol."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import pytest

from agent.identity import CaConfig, IdentityManager
from agent.xds import ADDRESS, Backoff, NodeInfo, XdsClient, XdsConfig
from controlplane import tokens
from controlplane.server import ControlPlane, Options
from proto.gen import discovery_pb2
from tests.support.eventually import eventually
from tests.support.targets import RecordingDataplane, RecordingKeeper

WEB = "spiffe://cluster.local/ns/shop/sa/web"
POD_UID = "Kubernetes//Pod/shop/web"
NAMESPACE = """\
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {istio.io/dataplane-mode: ambient}}
"""
POD = """\
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: shop, uid: u1, labels: {app: web}}
spec: {nodeName: node-a, serviceAccountName: web, containers: [{name: app, image: app}]}
status:
  phase: Running
  podIP: 10.0.0.1
  podIPs: [{ip: 10.0.0.1}]
  conditions: [{type: Ready, status: "True"}]
"""


class Plane:
    """A control plane in this process on a port of loopback, and a token for node-a."""

    def __init__(self, plane: ControlPlane, folder: Path) -> None:
        self.manifests = folder / "manifests"
        self.address = f"https://{plane.addresses[0]}"
        self.root = str(folder / "state" / "root-cert.pem")
        self.token = folder / "token"
        self.token.write_text(tokens.issue(folder / "state", "node-a") + "\n")


@pytest.fixture
async def plane(tmp_path: Path) -> AsyncIterator[Plane]:
    manifests = tmp_path / "manifests"
    manifests.mkdir()
    (manifests / "namespace.yaml").write_text(NAMESPACE)
    (manifests / "pod.yaml").write_text(POD)
    options = Options(manifests=manifests, state=tmp_path / "state", listen=("127.0.0.1:0",))
    bound = await ControlPlane.bind(options)
    ended = asyncio.Event()
    serving = asyncio.create_task(bound.serve(ended))
    try:
        yield Plane(bound, tmp_path)
    finally:
        ended.set()
        await serving
        await bound.close()


@contextlib.asynccontextmanager
async def ended_afterwards(task: "asyncio.Task[None]") -> AsyncIterator[None]:
    try:
        yield
        assert not task.done(), task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def client_of(plane: Plane, node: str = "node-a") -> XdsClient:
    return XdsClient(
        XdsConfig(
            address=plane.address,
            root_cert=plane.root,
            token_path=plane.token,
            node=NodeInfo(node_name=node),
            backoff=Backoff(cap=timedelta(milliseconds=100)),
        )
    )


async def test_resources_arrive_change_and_leave(plane: Plane) -> None:
    target, client = RecordingDataplane(), client_of(plane)
    async with ended_afterwards(asyncio.create_task(client.run())):
        client.attach(target, [])
        await eventually(lambda: client.status().processed, what=lambda: client.status().last_error)
        assert POD_UID in target.held[ADDRESS]
        version = target.held[ADDRESS][POD_UID]
        pod = plane.manifests / "pod.yaml"
        pod.write_text(POD.replace("10.0.0.1", "10.0.0.2"))
        await eventually(lambda: target.held[ADDRESS][POD_UID] != version)
        pod.unlink()
        await eventually(lambda: POD_UID not in target.held[ADDRESS])


async def test_what_is_held_is_not_sent_again(plane: Plane) -> None:
    target, client = RecordingDataplane(), client_of(plane)
    async with ended_afterwards(asyncio.create_task(client.run())):
        client.attach(target, [])
        await eventually(lambda: client.status().processed)
        pushed = len(target.responses)
        client.detach()
        client.attach(target, target.types_now())
        await eventually(lambda: len(target.responses) >= pushed + 2)
        for raw in target.responses[pushed:]:
            again = discovery_pb2.DeltaDiscoveryResponse.FromString(raw)
            assert not again.resources
            assert not again.removed_resources


async def test_token_of_another_node_is_refused_with_a_remedy(plane: Plane) -> None:
    client = client_of(plane, node="node-b")
    async with ended_afterwards(asyncio.create_task(client.run())):
        client.attach(RecordingDataplane(), [])
        await eventually(lambda: "PERMISSION_DENIED" in client.status().last_error)
        assert str(plane.token) in client.status().last_error


async def test_certificate_of_a_pod_on_the_node_is_issued_and_of_another_refused(
    plane: Plane,
) -> None:
    keeper = RecordingKeeper()
    manager = IdentityManager(
        CaConfig(
            address=plane.address,
            root_cert=plane.root,
            token_path=plane.token,
            node_name="node-a",
        ),
        "cluster.local",
    )
    foreign = WEB.replace("sa/web", "sa/db")
    async with ended_afterwards(asyncio.create_task(manager.run())):
        manager.attach(keeper, [])
        manager.wanted(WEB, connection=True)
        manager.wanted(foreign, connection=True)
        await eventually(lambda: WEB in keeper.installed, what=lambda: keeper.failures)
        await eventually(lambda: keeper.failures)
        assert keeper.failures[0][0] == foreign
        assert foreign not in keeper.installed
        assert keeper.roots[WEB] == (Path(plane.root).read_text(),)
