"""A node whose pods are named over ZDS and redirected by somebody else's rules, and the proxies
that serve it: ours or upstream's, started by upstream's environment alone."""

import contextlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path

from agent.cli.demo.manifests import Pod
from agent.cli.demo.mesh import CONTROL_PLANE_PORT, UNDERPASS, Mesh
from agent.cli.demo.shop import Shop, build, serve_echo, serve_http
from agent.cli.demo.world import Node
from redirect.base import CaptureConfig, Target
from redirect.nftables_capture import NftablesCapture
from tests.support.zds_server import ZdsConnection, ZdsPod, ZdsServer

Start = Callable[["ZdsNode"], Awaitable[None]]


async def shop_beside(mesh: Mesh) -> Shop:
    """The shop, whose second node is an ordinary one of ours; the first one's proxies are the
    tests'."""
    made = build(mesh)
    await serve_http(mesh, made.api)
    for pod in (made.db, made.cart):
        await serve_echo(mesh, pod)
    await mesh.start_control_plane()
    await mesh.start_agent(mesh.world.nodes[1])
    await mesh.settled(mesh.world.nodes[1])
    return made


@contextlib.asynccontextmanager
async def first_node(mesh: Mesh, shop: Shop, start: Start) -> AsyncIterator["ZdsNode"]:
    """The first node's pods named over ZDS and redirected by foreign rules, and served by the
    proxy that `start` starts."""
    made = ZdsNode(mesh, mesh.world.nodes[0])
    pods = (shop.web, shop.cart, shop.batch)
    await made.redirect(*pods)
    made.know(*pods)
    async with made.server:
        await start(made)
        await made.served(*pods)
        yield made
        await made.close()


class ZdsNode:
    """The server listens inside `async with`. `redirect` and `add` go pod by pod."""

    def __init__(self, mesh: Mesh, node: Node) -> None:
        self.mesh = mesh
        self.node = node
        self.server = ZdsServer(mesh.folder / f"{node.name}.zds")
        self._rules = NftablesCapture(CaptureConfig())
        self._started: list[str] = []

    async def redirect(self, *pods: Pod) -> None:
        """Rules that know a proxy only by its mark; they go with the pods' namespaces."""
        for pod in pods:
            fd = os.open(pod.sandbox.path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                await self._rules.install(Target(uid=pod.uid, name=pod.name, netns_fd=fd))
            finally:
                os.close(fd)

    async def close(self) -> None:
        await self._rules.close()

    def know(self, *pods: Pod) -> None:
        """For the next snapshot."""
        for pod in pods:
            self.server.pods[pod.uid] = zds_pod(pod)

    async def add(self, pod: Pod) -> str:
        """The error of the proxy's answer."""
        return await self.server.add(zds_pod(pod))

    async def environment(self) -> dict[str, str]:
        mesh, node = self.mesh, self.node
        address = f"https://{mesh.world.nodes[0].ipv4}:{CONTROL_PLANE_PORT}"
        root = str(mesh.control_plane_state / "root-cert.pem")
        token = mesh.folder / f"{node.name}.zds-token"
        if not token.exists():
            await mesh.make_token(node, token)
            # Upstream's proxy sends the file as it is, newline and all.
            token.write_bytes(token.read_bytes().strip())
        return {
            "PROXY_MODE": "shared",
            "NODE_NAME": node.name,
            "INPOD_UDS": str(self.server.path),
            "XDS_ADDRESS": address,
            "CA_ADDRESS": address,
            "XDS_ROOT_CA": root,
            "CA_ROOT_CA": root,
            "AUTH_TOKEN": str(token),
            "POD_NAME": f"proxy-{node.name}",
            "POD_NAMESPACE": "istio-system",
            "INSTANCE_IP": node.ipv4,
            "RUST_LOG": "info",
            "TERMINATION_GRACE_PERIOD_SECONDS": "4",
        }

    async def start_ours(self, name: str = "", extra: Mapping[str, str] | None = None) -> None:
        """`underpass agent` without a flag; ours are the places of its files and processes."""
        own = {"UNDERPASS_RUN_DIR": str(self.mesh.run_dir)}
        environment = await self.environment() | own | dict(extra or {})
        await self._spawn(name or self.node.name, environment, [*UNDERPASS, "agent"])

    async def start_ztunnel(self, binary: Path, name: str) -> None:
        await self._spawn(name, await self.environment(), [str(binary)])

    async def _spawn(self, name: str, environment: Mapping[str, str], command: list[str]) -> None:
        pairs = [f"{key}={value}" for key, value in environment.items()]
        self._started.append(name)
        await self.mesh.spawn(name, ["env", *pairs, *command], self.node.namespace)

    async def served(self, *pods: Pod, proxy: int = 1) -> ZdsConnection:
        """The n-th proxy acknowledged the snapshot and every pod in it."""
        try:
            client = await self.server.client(proxy, within=30)
        except TimeoutError:
            logs = [self.mesh.tail(name) for name in self._started]
            raise AssertionError(f"no proxy {proxy}: {logs}") from None
        acknowledged = {what for what, error in client.acks if not error}
        missing = {f"add {pod.uid}" for pod in pods} - acknowledged
        assert not missing, (missing, client.acks)
        return client


def zds_pod(pod: Pod) -> ZdsPod:
    return ZdsPod(pod.uid, pod.name, pod.namespace, pod.service_account, pod.sandbox.path)
