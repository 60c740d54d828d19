"""The watched folder: messages, last good state, what a change re-makes."""

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TypeVar

import pytest
import pytest_asyncio

from controlplane.sources.manifests import Manifests
from controlplane.sources.objects import (
    Gateway,
    Mode,
    Namespace,
    Object,
    PeerAuthentication,
    Pod,
    RefusedPolicy,
    Service,
)
from tests.unit.controlplane.world import pod

T = TypeVar("T", bound=Object)
NAMESPACE = "apiVersion: v1\nkind: Namespace\nmetadata: {name: shop}\n"


class Watched:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifests = Manifests(folder)
        self.changes = 0
        self._changed = asyncio.Condition()
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        await self.manifests.load()
        self._task = asyncio.create_task(self.manifests.run(self._on_change))

    async def stop(self) -> None:
        if self._task:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def write(self, name: str, text: str) -> None:
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)

    async def change(self, name: str, text: str | None) -> None:
        """Writes or removes a file and waits until the watcher has seen it."""
        before = self.changes
        if text is None:
            (self.folder / name).unlink()
        else:
            self.write(name, text)
        async with asyncio.timeout(10):
            while self.changes == before:
                await asyncio.sleep(0.01)

    def names(self, kind: type[T]) -> list[str]:
        return sorted(item.meta.name for item in self.manifests.world.of(kind))

    def messages(self) -> list[str]:
        return [str(p).removeprefix(f"{self.folder}/") for p in self.manifests.problems]

    def _on_change(self) -> None:
        self.changes += 1


@pytest_asyncio.fixture
async def watched(tmp_path: Path) -> AsyncIterator[Watched]:
    made = Watched(tmp_path)
    yield made
    await made.stop()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            pod("cart").replace(", uid: uid-cart", ""),
            "a.yaml:4: Pod shop/cart: metadata.uid is missing: give the uid under which the node's"
            " agent knows the pod",
        ),
        (
            pod("cart").replace("nodeName: n1, ", ""),
            "a.yaml:5: Pod shop/cart: spec.nodeName is missing: name the node that runs the pod",
        ),
        (
            pod("cart").replace("status:", "other:"),
            "a.yaml:2: Pod shop/cart: status.podIPs is missing: give the pod's addresses, for"
            " example podIPs: [{ip: 10.0.1.5}]",
        ),
        (
            pod("cart", ip="10.0.1"),
            "a.yaml:6: Pod shop/cart: status.podIPs[0].ip '10.0.1' is not an IP address",
        ),
        (
            NAMESPACE + "---\n" + pod("cart", spec="serviceAccountName: x"),
            "a.yaml:9: Pod shop/cart: spec.serviceAccountName is given twice: keep one",
        ),
        (
            pod("cart", labels="app: 1"),
            "a.yaml:4: Pod shop/cart: metadata.labels[app] must be text: put it in quotes",
        ),
        ("kind: Pod\n", "a.yaml:1: Pod (no name): apiVersion is missing: give the one of Pod"),
        ("- 1\n", "a.yaml:1: document must be a mapping"),
    ],
)
async def test_mistakes_name_file_line_object_field_and_remedy(
    watched: Watched, text: str, message: str
) -> None:
    watched.write("a.yaml", text)
    await watched.start()
    assert watched.messages() == [message]


async def test_broken_yaml_names_its_line(watched: Watched) -> None:
    watched.write("a.yaml", NAMESPACE + "---\nkind: [\n")
    await watched.start()
    [message] = watched.messages()
    assert message.startswith("a.yaml:6: document not YAML:")


@pytest.mark.parametrize("text", ["[" * 200_000, "- " * 200_000, "{a: " * 100_000])
async def test_bottomless_documents_are_refused(watched: Watched, text: str) -> None:
    watched.write("a.yaml", text)
    await watched.start()
    assert watched.messages() == ["a.yaml:1: document is nested too deeply to be a manifest"]


async def test_a_bad_file_keeps_its_last_good_state_until_it_is_good(watched: Watched) -> None:
    watched.write("a.yaml", pod("cart") + pod("web", ip="10.0.1.6"))
    await watched.start()
    await watched.change("a.yaml", pod("new", ip="bad"))
    assert watched.names(Pod) == ["cart", "web"]
    assert len(watched.messages()) == 1
    await watched.change("a.yaml", pod("new"))
    assert watched.names(Pod) == ["new"]
    assert watched.messages() == []


async def test_files_come_and_go_in_folders(watched: Watched) -> None:
    await watched.start()
    await watched.change("sub/a.yml", pod("cart"))
    await watched.change("b.json", '{\n\t"apiVersion": "v1", "kind": "Namespace",'
                         ' "metadata": {"name": "shop"}}')  # fmt: skip
    assert (watched.names(Pod), watched.names(Namespace)) == (["cart"], ["shop"])
    await watched.change("sub/a.yml", None)
    assert watched.names(Pod) == []


async def test_lists_are_taken_apart_and_unknown_kinds_ignored(watched: Watched) -> None:
    watched.write(
        "a.yaml",
        "apiVersion: v1\nkind: List\nitems:\n"
        "- {apiVersion: v1, kind: Namespace, metadata: {name: shop}}\n"
        "- {apiVersion: v1, kind: ConfigMap, metadata: {name: c}}\n"
        "- {apiVersion: networking.istio.io/v1, kind: Gateway, metadata: {name: g}}\n",
    )
    await watched.start()
    assert watched.names(Namespace) == ["shop"]
    assert watched.names(Gateway) == []
    assert watched.messages() == []


async def test_an_object_described_twice_counts_once_and_is_told(watched: Watched) -> None:
    watched.write("a.yaml", pod("cart"))
    watched.write("b.yaml", pod("cart") + pod("web", ip="10.0.1.6").replace("uid-web", "uid-cart"))
    await watched.start()
    assert watched.names(Pod) == ["cart"]
    twice, same_uid = watched.messages()
    assert twice.startswith("b.yaml:4: Pod shop/cart: metadata.name is already used at ")
    assert same_uid.startswith("b.yaml:11: Pod shop/web: metadata.uid is already used at ")


async def test_unchanged_documents_stay_the_same_objects(watched: Watched) -> None:
    watched.write("a.yaml", pod("cart") + pod("web", ip="10.0.1.6"))
    await watched.start()
    cart, web = watched.manifests.world.of(Pod)
    await watched.change("a.yaml", NAMESPACE + "---\n" + pod("cart") + pod("web", ip="10.0.1.7"))
    moved, changed = watched.manifests.world.of(Pod)
    assert moved is cart
    assert changed is not web
    assert str(changed.ips[0]) == "10.0.1.7"


BAD_POLICY = """
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: p, namespace: shop}
spec: {selector: {matchLabels: {app: cart}}, rules: [{from: [{source: {principal: [a]}}]}]}
---
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: m, namespace: shop}
spec: {mtls: {mode: STRIKT}}
"""


async def test_a_refused_policy_without_a_good_version_closes_its_scope(watched: Watched) -> None:
    watched.write("a.yaml", BAD_POLICY)
    await watched.start()
    [refused] = watched.manifests.world.of(RefusedPolicy)
    assert dict(refused.selector) == {"app": "cart"}
    [peer] = watched.manifests.world.of(PeerAuthentication)
    assert peer.mode is Mode.STRICT


async def test_a_file_that_is_not_text_is_told(watched: Watched) -> None:
    (watched.folder / "a.yaml").write_bytes(b"\xff\xfe\x00")
    await watched.start()
    assert watched.messages() == ["a.yaml: is not UTF-8 text: save it as UTF-8"]


async def test_a_folder_that_goes_away_takes_nothing_with_it(watched: Watched) -> None:
    watched.write("a.yaml", pod("cart"))
    await watched.start()
    away = watched.folder.with_name("away")
    before = watched.changes
    os.rename(watched.folder, away)
    async with asyncio.timeout(10):
        while watched.changes == before:
            await asyncio.sleep(0.01)
    assert watched.names(Pod) == ["cart"]
    assert "can't be read" in watched.messages()[0]
    os.rename(away, watched.folder)
    async with asyncio.timeout(10):
        while watched.messages():
            await asyncio.sleep(0.01)
    assert watched.names(Pod) == ["cart"]


async def test_service_selectors_and_ports_are_read(watched: Watched) -> None:
    watched.write(
        "a.yaml",
        "apiVersion: v1\nkind: Service\nmetadata: {name: cart}\n"
        "spec: {ports: [{port: 80}, {port: 80, name: again}]}\n",
    )
    await watched.start()
    assert watched.names(Service) == []
    assert "port 80 is given twice" in watched.messages()[0]
