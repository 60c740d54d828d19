"""What is wanted in the mesh but goes past it: pods not captured, connections older than their
pod's capture, workloads of this node that no pod here stands for."""

import json
from collections.abc import AsyncIterator, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from agent.status import PodView
from redirect.sockets import Connection


@dataclass(frozen=True)
class Bypass:
    # pod, connection, host network, unlisted
    kind: str
    # namespace/name
    pod: str
    what: str
    why: str
    remedy: str = ""


def of_pods(views: Iterable[PodView]) -> Iterator[Bypass]:
    """Those whose capture isn't proven."""
    for view in views:
        if view.state == "served" or (view.captured and view.verified):
            continue
        what = "its rules couldn't be verified" if view.captured else "its traffic isn't captured"
        yield Bypass(
            "pod",
            f"{view.namespace}/{view.name}",
            what,
            view.problem or view.state,
            view.remedy or "it is tried again by itself; see `underpass status`",
        )


def of_connections(pod: str, older: Iterable[Connection]) -> list[Bypass]:
    """Connections of a captured pod that the data plane has no end of: made before the capture."""
    return [
        Bypass(
            "connection",
            pod,
            str(one),
            "it is older than the pod's capture: neither encrypted nor asked of any policy",
            "restart the application, or end it now: underpass cut-precapture POD",
        )
        for one in older
    ]


def of_workload(workload: dict[str, Any], node: str, known: set[str]) -> Bypass | None:
    """`known`: uids of workloads that pods here stand for."""
    if workload.get("node") != node or workload.get("uid") in known:
        return None
    pod = f"{workload.get('namespace', '')}/{workload.get('name', '')}"
    if workload.get("networkMode") == "HostNetwork":
        return Bypass(
            "host network",
            pod,
            "it uses the node's own network",
            "that is never captured: its traffic is in clear, and it has no identity towards peers",
            "take hostNetwork from it, if it needn't have it",
        )
    if workload.get("protocol") != "HBONE":
        return None
    return Bypass(
        "unlisted",
        pod,
        "the control plane counts it to this node and the mesh",
        "the agent's list of pods doesn't have it: it isn't captured, and peers' HBONE reaches"
        " nobody",
        "add it to the list (--pods), or wait if it was only just started",
    )


async def records(chunks: AsyncIterator[bytes]) -> AsyncIterator[dict[str, Any]]:
    """The objects of a JSON array one by one: a mesh's dump is too large to hold."""
    decoder, text, pending = json.JSONDecoder(), "", b""
    async for chunk in chunks:
        pending += chunk
        try:
            text += pending.decode()
        except UnicodeDecodeError:
            # A character was split; the next chunk completes it.
            continue
        pending, at = b"", 0
        while (begin := text.find("{", at)) >= 0:
            try:
                record, at = decoder.raw_decode(text, begin)
            except ValueError:
                break
            yield record
        text = text[at:]
