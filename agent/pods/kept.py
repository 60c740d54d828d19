"""A pod whose namespace nobody here was given, but the data plane serves it: found by the namespace
that it told, among those of the node's processes, so that the pod outlives its data plane."""

import asyncio
import contextlib
import logging
import os
from pathlib import Path

from agent.dataplane import DataplaneError
from agent.errors import NetnsRefused
from agent.pods.netns import HeldNetns, NetnsId, netns_id
from agent.pods.source import Pod
from agent.pods.steps import PodTarget

log = logging.getLogger("underpass.pods")

PROC = Path("/proc")


async def kept_pod(uid: str, dataplane: PodTarget) -> Pod | None:
    """None where the data plane doesn't know it, or no process that we see lives in it."""
    try:
        known = {status.pod.uid: status for status in await dataplane.list_pods()}
    except DataplaneError as exc:
        log.warning("kept pod not looked for", extra={"uid": uid, "error": exc})
        return None
    if (status := known.get(uid)) is None:
        return None
    wanted = NetnsId(status.netns_inode, status.netns_dev)
    # A node has thousands of processes.
    fd = await asyncio.to_thread(_open, wanted)
    if fd is None:
        return None
    try:
        netns = HeldNetns(fd)
    except NetnsRefused as exc:
        log.warning("kept pod not taken over", extra={"uid": uid, "error": exc})
        return None
    pod = status.pod
    return Pod(uid, pod.name, pod.namespace, pod.service_account, netns)


def _open(wanted: NetnsId) -> int | None:
    for process in PROC.iterdir():
        if not process.name.isdecimal():
            continue
        # Processes end meanwhile.
        with contextlib.suppress(OSError):
            place = process / "ns" / "net"
            found = place.stat()
            if NetnsId(found.st_ino, found.st_dev) != wanted:
                continue
            fd = os.open(place, os.O_RDONLY | os.O_CLOEXEC)
            if netns_id(fd) == wanted:
                return fd
            os.close(fd)
    return None
