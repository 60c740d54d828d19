"""AuthorizationPolicies for the length of a block, on a mesh that runs."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from agent.cli.demo.shop import NAMESPACE
from agent.cli.demo.story import greets

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from agent.cli.demo.manifests import Manifest, Pod
    from agent.cli.demo.mesh import Mesh
    from agent.cli.demo.shop import Shop


def policy(name: str, action: str, rules: list[Any], *, app: str | None = "db") -> Manifest:
    spec: Manifest = {"action": action, "rules": rules}
    if app:
        spec["selector"] = {"matchLabels": {"app": app}}
    return {
        "apiVersion": "security.istio.io/v1",
        "kind": "AuthorizationPolicy",
        "metadata": {"name": name, "namespace": NAMESPACE},
        "spec": spec,
    }


def source(**fields: list[str]) -> dict[str, Any]:
    return {"from": [{"source": fields}]}


@asynccontextmanager
async def applied(mesh: Mesh, shop: Shop, name: str, *content: Manifest) -> AsyncIterator[None]:
    """Manifests for the length of the block; afterwards everybody is let in again."""
    mesh.apply(name, *content)
    try:
        yield
    finally:
        mesh.withdraw(name)
        for client in (shop.web, shop.batch, shop.legacy):
            await becomes(mesh, client, shop.db, allowed=True)


async def becomes(mesh: Mesh, client: Pod, server: Pod, *, allowed: bool) -> None:
    async def reached() -> bool:
        return await greets(client, server) is allowed

    await mesh.until(f"{client.name} {'in' if allowed else 'out'}", reached, seconds=15)
