"""`underpass uninstall`: removes what an instance has on this machine."""

import asyncio
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from agent.cli.reach import Place, Where, where

if TYPE_CHECKING:
    from agent import remains
    from redirect.base import Redirect

# The agent's default of ebpf.folder.
EBPF_FOLDER = Path("/sys/fs/bpf/underpass")


@click.command()
@click.option("--yes", "-y", is_flag=True, help="Don't ask.")
@click.option("--force", is_flag=True, help="End what still runs of it first.")
@click.option(
    "--dataplane-cgroup-parent",
    "cgroup_parent",
    type=click.Path(path_type=Path),
    help="Where its cgroups are, if the agent was told so.",
)
@click.option(
    "--ebpf-folder",
    type=click.Path(path_type=Path),
    default=EBPF_FOLDER,
    show_default=True,
    help="Where its programs are pinned, in a folder of its name.",
)
@where
@click.pass_obj
def uninstall(
    sought: Where | None, yes: bool, force: bool, cgroup_parent: Path | None, ebpf_folder: Path
) -> None:
    """Remove a node's programs, rules, routes, cgroups and files: no trace stays.

    Works also after everything was killed. Pods that were captured are bare afterwards: their
    traffic goes in clear and no policy holds. Exits with 1 when something couldn't be removed.
    """
    place = _place(sought or Where())
    sys.exit(asyncio.run(_uninstall(place, yes, force, cgroup_parent, ebpf_folder)))


async def _uninstall(
    place: Place, yes: bool, force: bool, cgroup_parent: Path | None, ebpf_folder: Path
) -> int:
    from agent import remains
    from agent.config import cgroup2_mount
    from agent.errors import AgentError
    from agent.slices import RunPaths
    from redirect.ebpf import Detached, EbpfCapture
    from redirect.nftables_capture import NftablesCapture

    mount = cgroup2_mount()
    if cgroup_parent is None and mount is not None:
        cgroup_parent = mount / "underpass" / place.node
    paths, pins = RunPaths(place.folder), ebpf_folder / place.node
    try:
        found = remains.find(paths, cgroup_parent, pins)
    except OSError as exc:
        raise click.ClickException(f"{place.folder}: {exc.strerror}; run this as root") from exc
    if found.nothing:
        click.echo(f"Nothing of node {place.node} is on this machine.")
        return 0
    if found.processes and not force:
        raise click.ClickException(
            f"node {place.node} still runs: {'; '.join(map(str, found.processes))}\n"
            f"End it first (kill -TERM {found.processes[0].pid}), or say --force"
        )
    _announce(place, found)
    if not yes:
        click.confirm("Remove all of it?", abort=True)
    captures: list[Redirect] = [NftablesCapture()]
    if found.pins is not None:
        captures.append(EbpfCapture(Detached()))
    good = True
    try:
        if found.processes:
            async for one in remains.stop(found):
                good = _told("ended", one) and good
            # They removed some by themselves.
            found = remains.find(paths, cgroup_parent, pins)
            if found.processes:
                raise click.ClickException(f"{found.processes[0]}: is there again; who starts it?")
        async for one in remains.remove(found, *captures):
            good = _told("removed", one) and good
    except AgentError as exc:
        raise click.ClickException(f"{exc}; {exc.remedy}") from exc
    finally:
        for capture in captures:
            await capture.close()
    if found.pods_unknown:
        click.echo(
            f"rules may stay in pods: {found.pods_unknown}\n"
            "Where `nft list ruleset` inside a pod shows a table inet underpass, remove it:"
            " nft delete table inet underpass",
            err=True,
        )
        return 1
    return 0 if good else 1


def _place(sought: Where) -> Place:
    """The named node, or the only one that has a folder. Raises ClickException."""
    if sought.node is not None:
        return Place(sought.run_dir / sought.node)
    try:
        folders = [folder for folder in sorted(sought.run_dir.iterdir()) if folder.is_dir()]
    except FileNotFoundError:
        folders = []
    except OSError as exc:
        raise click.ClickException(f"{sought.run_dir}: {exc.strerror}; run this as root") from exc
    if len(folders) == 1:
        return Place(folders[0])
    if folders:
        names = "\n".join(f"  {folder.name}" for folder in folders)
        raise click.ClickException(f"several nodes are here; choose one with --node:\n{names}")
    raise click.ClickException(f"no node has anything below {sought.run_dir}; name it: --node NAME")


def _announce(place: Place, found: "remains.Remains") -> None:
    click.echo(f"Of node {place.node} there are:")
    for process in found.processes:
        click.echo(f"  {process}")
    for held in found.pods:
        click.echo(f"  capture of {held.pod.key} in {held.pod.netns}; it will be bare")
    if found.pins is not None:
        click.echo(f"  eBPF programs in {found.pins}")
    for leaf in found.leaves:
        click.echo(f"  cgroup {leaf}")
    if place.folder.exists():
        click.echo(f"  folder {place.folder} with {len(found.files)} files")
    for path in found.foreign:
        click.echo(f"  {path}, which isn't ours and stays")


def _told(verb: str, removal: "remains.Removal") -> bool:
    if removal.error:
        click.echo(f"NOT {verb}: {removal.what}: {removal.error}", err=True)
        return False
    click.echo(f"{verb} {removal.what}")
    return True
