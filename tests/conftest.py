"""Meshes for tests: every test module builds its own world, and a crashed run's is swept away."""

from __future__ import annotations

import itertools
import os
import re
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from agent.cli.demo.cgroup import of_this_process
from agent.cli.demo.mesh import Mesh
from agent.cli.demo.netns import FOLDER
from agent.cli.demo.world import PREFIX, World, cgroup2_mounts, down
from tests.support.capture import CAPTURE_MODES
from tests.support.meshes import mesh_of, stocked

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from pathlib import Path

    from agent.cli.demo.shop import Shop

_numbers = itertools.count(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without root these tests can't run: skipped at a desk, failed in CI (design section 9)."""
    if os.geteuid() == 0 or os.environ.get("CI"):
        return
    for item in items:
        if {"netns", "interop"} & set(item.path.parts):
            item.add_marker(pytest.mark.skip(reason="needs root for network namespaces"))


@pytest.fixture(scope="session", autouse=True)
def _sweep_crashed_runs() -> None:
    """Prefixes are `t<pid>x<n>`; those whose process is gone belong to nobody."""
    prefixes = set()
    names = [path.name.removeprefix(f"{PREFIX}-") for path in FOLDER.glob(f"{PREFIX}-t*")]
    for root in cgroup2_mounts():
        names += [path.name for path in (root / "underpass").glob("t*-node*")]
    for name in names:
        if found := re.match(r"(t(\d+)x\d+)-", name):
            prefix, pid = found.groups()
            if not os.path.exists(f"/proc/{pid}"):
                prefixes.add(prefix)
    for prefix in prefixes:
        down(prefix)


@pytest.fixture(scope="session")
def new_prefix() -> Callable[[], str]:
    return lambda: f"t{os.getpid()}x{next(_numbers)}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test with a mesh runs once in each capture mode, or in those that its marker names."""
    if "capture" in metafunc.fixturenames:
        only = metafunc.definition.get_closest_marker("modes")
        modes = only.args if only is not None else CAPTURE_MODES
        metafunc.parametrize("capture", modes, scope="module", indirect=True)


@pytest.fixture(scope="module")
def capture(request: pytest.FixtureRequest) -> Iterator[str]:
    """How the mesh of the test catches traffic. Agents are told of the pods' cgroup by their
    environment, whatever their options."""
    with pytest.MonkeyPatch.context() as environment:
        if request.param == "ebpf":
            cgroup = request.getfixturevalue("_pods_cgroup")
            environment.setenv("UNDERPASS_PODS_CGROUP", str(cgroup))
        yield str(request.param)


@pytest.fixture(scope="session")
def _pods_cgroup() -> Iterator[Path]:
    with of_this_process("underpass-tests") as cgroup:
        yield cgroup


@pytest.fixture(scope="module")
def world(new_prefix: Callable[[], str], capture: str) -> Iterator[World]:
    """A mode's own: what one mode left behind can't help the other."""
    made = World(new_prefix())
    made.up()
    yield made
    made.down()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mesh(
    world: World, capture: str, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Mesh]:
    """Two nodes without pods; processes are started by `shop` or by the test."""
    async with mesh_of(Mesh, world, capture, tmp_path_factory.mktemp("mesh")) as made:
        yield made


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shop(mesh: Mesh) -> Shop:
    """The demo's six pods with servers on api (nginx), db and cart (echo), all captured."""
    made = await stocked(mesh)
    await mesh.start()
    return made
