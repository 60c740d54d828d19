"""Supplies a data plane: configuration, certificates, pods, and rules that exempt its sockets.

It knows which data plane is the present one; it starts and ends none.
"""

import asyncio
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Protocol

from agent.dataplane import Dataplane, DataplaneError
from agent.errors import ReplaceRefused
from agent.identity.status import IdentityState
from agent.identity.supply import Supply
from agent.identity.trust import TrustKeeper
from agent.pods.reconciler import CaptureError, Reconciler
from agent.xds.status import XdsStatus
from agent.xds.target import ApplyTarget
from agent.xds.types import AUTHORIZATION, TYPES
from proto.gen import control_pb2
from redirect.base import CaptureConfig

log = logging.getLogger("underpass.agent")

# A control plane pushes 100 k workloads within seconds; a CA signs a node's identities likewise.
HAND_OVER_PATIENCE = timedelta(seconds=30)
NO_AUTHORITY = "no certificate authority is configured; set ca.address"


class ConfigurationSource(Protocol):
    """XdsClient or LocalFile."""

    def attach(self, target: ApplyTarget, types: Sequence[control_pb2.TypeState]) -> None: ...

    def detach(self) -> None: ...

    def wanted(self, target: ApplyTarget, name: str) -> None: ...

    async def run(self) -> None: ...

    def status(self) -> XdsStatus: ...


class Feed:
    """State: `_present`, `_listeners` (an event task for each data plane), `_processed`."""

    def __init__(
        self,
        source: ConfigurationSource,
        identities: Supply | None,
        reconciler: Reconciler,
        capture: CaptureConfig,
        trust: TrustKeeper | None = None,
    ) -> None:
        self._source = source
        self._trust = trust
        self._identities = identities
        self._reconciler = reconciler
        self._capture = capture
        self._present: Dataplane | None = None
        self._listeners: dict[Dataplane, asyncio.Task[None]] = {}
        self._processed: dict[Dataplane, set[str]] = {}
        self._synced = asyncio.Event()
        # Pods whose rules couldn't be changed at the last `exempt`; "" when all could.
        self.rules_error = ""

    @property
    def present(self) -> Dataplane | None:
        return self._present

    @property
    def capture(self) -> CaptureConfig:
        return self._capture

    @property
    def synced(self) -> bool:
        """The present data plane processed a first response of every type."""
        return self._present is not None and self._knows_mesh(self._present)

    async def exempt(self, leaves: Iterable[Path | None]) -> None:
        """Data planes in these cgroups aren't captured in any pod. Raises CaptureError."""
        known = tuple(sorted({leaf for leaf in leaves if leaf is not None}))
        self._capture = replace(self._capture, exempt_cgroups=known)
        self.rules_error = ""
        try:
            await self._reconciler.reconfigure(self._capture)
        except CaptureError as exc:
            self.rules_error = str(exc)
            raise

    async def attach(self, dataplane: Dataplane) -> None:
        """A data plane that is to serve from now on, with whatever it holds already."""
        hello = dataplane.hello
        self._listen(dataplane)
        if self._trust is not None:
            await self._trust.attach(dataplane)
        self._source.attach(dataplane, list(hello.types))
        if self._identities is not None:
            self._identities.attach(dataplane, list(hello.certificates))
        # Names and versions of a large mesh are tens of megabytes that nobody asks for again. A
        # message keeps what was cleared until it is freed itself, so what is kept is a copy.
        hello.ClearField("types")
        dataplane.hello = control_pb2.HelloReply.FromString(hello.SerializeToString())
        self._present = dataplane
        self._reconciler.attach(dataplane, synced=self._knows_mesh(dataplane))

    def detach(self) -> None:
        """The present data plane is gone. Pods keep their rules."""
        self._source.detach()
        if self._trust is not None:
            self._trust.detach()
        if self._identities is not None:
            self._identities.detach()
        self._reconciler.detach()
        if self._present is not None:
            self._forget(self._present)
        self._present = None

    async def hand_over(self, old: Dataplane, old_socket: Path, new: Dataplane) -> None:
        """Brings `new` to the state of `old`, then moves the listeners. No pod changes meanwhile.

        Raises ReplaceRefused with `old` supplied as before; then `new` is to be thrown away.
        """
        status = self._source.status()
        if not status.connected:
            why = f": {status.last_error}" if status.last_error else ""
            raise ReplaceRefused(f"the control plane is away{why}; a successor would know nothing")
        held = await self._certificates(old)
        async with self._reconciler.paused():
            self._listen(new)
            if self._trust is not None:
                await self._trust.attach(new)
            self._source.attach(new, [])
            if self._identities is not None:
                self._identities.attach(new, [])
            try:
                await self._reconciler.prepare(new)
                await self._until(new, lambda: self._knows_mesh(new), "configuration")
                await self._until(new, lambda: self._serves(held), "certificates")
                await new.take_listeners(old_socket)
            except (DataplaneError, ReplaceRefused) as exc:
                self._forget(new)
                await self._resume(old)
                raise exc if isinstance(exc, ReplaceRefused) else ReplaceRefused(str(exc)) from exc
            self._forget(old)
            self._present = new
            self._reconciler.switch(new)

    async def served(self) -> None:
        """Until the present data plane has every pod of the list."""
        await self._reconciler.announced.wait()

    async def close(self) -> None:
        for dataplane in list(self._listeners):
            self._forget(dataplane)

    # ---- events of a data plane

    def _listen(self, dataplane: Dataplane) -> None:
        hello = dataplane.hello
        self._processed[dataplane] = {state.type_url for state in hello.types if state.processed}
        self._listeners[dataplane] = asyncio.create_task(
            self._take_events(dataplane), name=f"events of {dataplane.path}"
        )

    def _forget(self, dataplane: Dataplane) -> None:
        """What a former data plane says counts no more: its pods' end isn't the pods' end."""
        if (task := self._listeners.pop(dataplane, None)) is not None:
            task.cancel()
        self._processed.pop(dataplane, None)

    async def _take_events(self, dataplane: Dataplane) -> None:
        async for event in dataplane.events():
            try:
                await self._take(dataplane, event)
            except DataplaneError as exc:
                log.warning("event not handled", extra={"error": exc})
            except Exception:
                # A defect costs this event; without the task every later one would be lost.
                log.exception("event not handled")

    async def _take(self, dataplane: Dataplane, event: control_pb2.Event) -> None:
        match event.WhichOneof("event"):
            case "certificate_wanted":
                wanted = event.certificate_wanted
                if self._identities is None:
                    await dataplane.fail_certificate(wanted.identity, NO_AUTHORITY)
                    return
                waiting = wanted.priority == control_pb2.CertificateWanted.CONNECTION
                self._identities.wanted(wanted.identity, connection=waiting)
            case "certificate_forgotten":
                if self._identities is not None:
                    self._identities.forgotten(event.certificate_forgotten.identity)
            case "first_response":
                self._processed[dataplane].add(event.first_response.type_url)
                if dataplane is self._present and self._knows_mesh(dataplane):
                    self._reconciler.dataplane_synced()
            case "resource_wanted":
                self._source.wanted(dataplane, event.resource_wanted.name)
            case "pod_drained":
                log.info("pod drained", extra={"uid": event.pod_drained.uid})
                self._reconciler.pod_drained(event.pod_drained.uid)
            case "listener_lost":
                lost = event.listener_lost
                log.error(
                    "listener lost", extra={"uid": lost.uid, "port": lost.port, "error": lost.text}
                )
                self._reconciler.listener_lost(lost.uid)

    def _knows_mesh(self, dataplane: Dataplane) -> bool:
        # What is asked for by name is complete before anything came (facts ztunnel 7.4).
        needed = {AUTHORIZATION} if dataplane.hello.config.on_demand else set(TYPES)
        return dataplane.hello.synced or self._processed.get(dataplane, set()) >= needed

    # ---- replacement

    async def _certificates(self, dataplane: Dataplane) -> list[control_pb2.CertificateStatus]:
        return list((await dataplane.look()).certificates)

    def _serves(self, held: Sequence[control_pb2.CertificateStatus]) -> bool:
        """Every identity that had a certificate has one again."""
        if self._identities is None:
            return True
        available = {
            entry.identity
            for entry in self._identities.status()
            if entry.state is IdentityState.AVAILABLE
        }
        return all(entry.identity in available for entry in held if entry.not_after)

    async def _until(self, new: Dataplane, done: Callable[[], bool], what: str) -> None:
        try:
            async with asyncio.timeout(HAND_OVER_PATIENCE.total_seconds()):
                while not done():
                    if not new.connected:
                        raise ReplaceRefused(f"the successor ended: {await new.wait_lost()}")
                    await asyncio.sleep(0.02)
        except TimeoutError:
            raise ReplaceRefused(
                f"the successor got no {what} in {HAND_OVER_PATIENCE.total_seconds():.0f} s"
            ) from None

    async def _resume(self, old: Dataplane) -> None:
        """A lost `old` is met where its connection is watched."""
        if not old.connected:
            return
        try:
            hello = await old.look()
        except DataplaneError as exc:
            log.warning("data plane not supplied, met anew", extra={"error": exc})
            await old.close()
            return
        if self._trust is not None:
            await self._trust.attach(old)
        self._source.attach(old, list(hello.types))
        if self._identities is not None:
            self._identities.attach(old, list(hello.certificates))
