"""Delta ADS client: carries responses from a control plane to the data plane as raw bytes.

It knows nothing of resources. A stream always belongs to one attached data plane and starts from
the versions that one holds; without a data plane nothing is read.
"""

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, NoReturn
from weakref import WeakKeyDictionary

import grpc

from agent.dataplane import InvalidRequest
from agent.errors import AgentError
from agent.xds import faults, memory, requests, wire
from agent.xds.backoff import Backoff
from agent.xds.channel import open_channel
from agent.xds.demand import Wanted, batches
from agent.xds.endpoint import ControlPlaneError, Endpoint
from agent.xds.node import NodeInfo
from agent.xds.progress import Progress
from agent.xds.resync import Resync
from agent.xds.status import XdsStatus
from agent.xds.target import ApplyTarget, Attachment, AttachPoint
from agent.xds.types import ADDRESS, TYPES
from proto.gen import control_pb2, discovery_pb2

__all__ = ["ApplyTarget", "XdsClient", "XdsConfig"]

METHOD = "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources"

# The stubs know neither a call without a deserialiser nor one that is written to.
_Method = Any
_Call = Any
_SECOND = timedelta(seconds=1)

log = logging.getLogger("underpass.xds")


@dataclass(frozen=True, kw_only=True)
class XdsConfig(Endpoint):
    """The control plane's address, and who asks."""

    node: NodeInfo
    backoff: Backoff = field(default_factory=Backoff)
    # A stream that lived this long and brought something starts the waits anew; a shorter one may
    # be a control plane that fails at every push, and is not to be hammered.
    healthy_after: timedelta = timedelta(seconds=5)
    # Addresses are sent as the data plane asks for them (XDS_ON_DEMAND).
    on_demand: bool = False


class XdsClient:
    """Subscribes to addresses and policies for the attached data plane, for ever."""

    def __init__(self, config: XdsConfig) -> None:
        self._config = config
        self._point = AttachPoint()
        self._progress = Progress(config.address)
        # Learnt from failures, kept for the following connects.
        self._alt_name = False
        self._without_versions = False
        # Of every data plane alive: one that is replaced may be attached again.
        self._wanted: WeakKeyDictionary[ApplyTarget, Wanted] = WeakKeyDictionary()

    def attach(self, target: ApplyTarget, types: Sequence[control_pb2.TypeState]) -> None:
        """A (new) data plane and what it holds; the stream starts anew from there."""
        self._progress.restored(types)
        self._point.attach(target, types)

    def detach(self) -> None:
        """The data plane is gone; pushes wait at the control plane until another is attached."""
        self._point.detach()

    def wanted(self, target: ApplyTarget, name: str) -> None:
        """Subscribes to one address, on behalf of this data plane."""
        self._names(target).add(name)

    def _names(self, target: ApplyTarget) -> Wanted:
        return self._wanted.setdefault(target, Wanted())

    def status(self) -> XdsStatus:
        if not self._point.attached:
            return self._progress.snapshot(note="waiting for the data plane")
        found = self._progress.snapshot()
        missing = [name for name, entry in found.types.items() if not entry.processed]
        if not found.connected or not missing:
            return found
        return self._progress.snapshot(
            note=f"xDS at {self._config.address} is connected but hasn't sent {', '.join(missing)}"
        )

    async def run(self) -> None:
        """Serves whichever data plane is attached. Ends only by cancellation."""
        clock = asyncio.get_running_loop().time
        failures = 0
        while True:
            attached = await self._point.current()
            started = clock()
            wanted = self._names(attached.target)
            session = _Session(self._config, attached, self._progress, wanted)
            failure = await self._serve(session, attached)
            self._progress.terminated(session.ended_as(failure))
            if failure is None:
                failures = 0
                continue
            lived = clock() - started
            if session.fruitful and lived >= self._config.healthy_after.total_seconds():
                failures = 0
            failures += 1
            delay = self._config.backoff.delay(failures)
            level = logging.WARNING if self._progress.failed(str(failure)) else logging.DEBUG
            log.log(
                level,
                "stream ended",
                extra={"error": failure, "retry_in": f"{delay / _SECOND:.2f}s"},
            )
            await attached.linger(delay)

    async def _serve(self, session: "_Session", attached: Attachment) -> Exception | None:
        """One connection, until it fails (why) or the data plane is no longer attached (None)."""
        serving = asyncio.create_task(
            session.run(alt_name=self._alt_name, without_versions=self._without_versions)
        )
        gone = asyncio.create_task(attached.gone.wait())
        try:
            await asyncio.wait({serving, gone}, return_when=asyncio.FIRST_COMPLETED)
            if attached.gone.is_set():
                return None
            return self._learn(serving)
        finally:
            serving.cancel()
            gone.cancel()
            await asyncio.gather(serving, gone, return_exceptions=True)

    def _learn(self, serving: "asyncio.Task[NoReturn]") -> Exception:
        try:
            serving.result()
        except grpc.aio.AioRpcError as error:
            if faults.is_name_mismatch(error) and self._config.alt_hostname:
                self._alt_name = not self._alt_name
            if faults.is_too_large(error):
                self._without_versions = True
            node = self._config.node.node_name
            return ControlPlaneError(faults.describe(error, self._config, node=node, what="xDS"))
        except AgentError as error:
            return error
        except Exception as error:
            # A defect here must not end the agent: the data plane serves with what it knows.
            log.exception("stream failed unexpectedly")
            return error


class _Session:
    """One stream on one connection for one data plane."""

    def __init__(
        self, config: XdsConfig, attached: Attachment, progress: Progress, wanted: Wanted
    ) -> None:
        self._config = config
        self._attached = attached
        self._progress = progress
        self._wanted = wanted
        self._resync = Resync()
        # On demand: names held that were too many for the first request.
        self._held: list[str] = []
        # A call takes one write at a time.
        self._writing = asyncio.Lock()
        # Whether a response was processed.
        self.fruitful = False
        self._opened = False
        self._complete = False

    def ended_as(self, failure: Exception | None) -> str:
        """facts ztunnel 12.1; None: nothing failed, the data plane is another one."""
        if failure is None:
            return "Reconnect"
        if self._complete:
            return "Complete"
        return "Error" if self._opened else "ConnectionError"

    async def run(self, *, alt_name: bool, without_versions: bool) -> NoReturn:
        """Raises AioRpcError, ControlPlaneError or what the data plane raised."""
        held = {state.type_url: state for state in await self._attached.take_types()}
        first = [self._first(url, held.get(url), without_versions) for url in TYPES]
        held.clear()
        async with open_channel(self._config, alt_name=alt_name) as channel:
            # No deserialiser: the bytes go to the data plane as they came.
            method: _Method = channel.stream_stream(
                METHOD, discovery_pb2.DeltaDiscoveryRequest.SerializeToString, None
            )
            call = method(None, metadata=self._config.metadata())
            while first:
                await self._write(call, first.pop(0))
            log.info("stream open", extra={"address": self._config.address})
            self._progress.connected()
            self._opened = True
            asking = asyncio.create_task(self._ask(call), name="names wanted")
            try:
                while True:
                    # In no variable here: it would keep a whole mesh in memory until the next push.
                    await self._write(call, await self._apply(await self._read(call)))
            finally:
                asking.cancel()
                await asyncio.gather(asking, return_exceptions=True)

    async def _ask(self, call: _Call) -> None:
        """Subscribes to names as they become wanted. A broken stream is the reader's to tell."""
        if not self._config.on_demand:
            return
        with contextlib.suppress(grpc.aio.AioRpcError):
            for names in batches(self._held):
                await self._write(call, requests.subscribe(ADDRESS, names))
            self._held.clear()
            told = 0
            while True:
                names = await self._wanted.after(told)
                await self._write(call, requests.subscribe(ADDRESS, names))
                told += len(names)

    async def _write(self, call: _Call, request: discovery_pb2.DeltaDiscoveryRequest) -> None:
        async with self._writing:
            await _write(call, request)

    async def _read(self, call: _Call) -> bytes:
        response = await call.read()
        if not isinstance(response, bytes):
            self._complete = True
            raise ControlPlaneError(
                f"xDS at {self._config.address} ended the stream without an error"
            )
        return response

    def _first(
        self, type_url: str, held: control_pb2.TypeState | None, without_versions: bool
    ) -> discovery_pb2.DeltaDiscoveryRequest:
        versions = held.versions if held is not None else {}
        node = self._config.node.message(self._config.cluster_id)
        on_demand = self._config.on_demand and type_url == ADDRESS
        request = requests.first(type_url, node, versions, on_demand=on_demand)
        if versions and (without_versions or request.ByteSize() > requests.FIRST_REQUEST_LIMIT):
            if on_demand:
                # What a first response leaves out is no less there: it wasn't asked for.
                self._held = list(versions)
            else:
                self._resync.expect(type_url, versions)
            request = requests.first(type_url, node, {}, on_demand=on_demand)
        return request

    async def _apply(self, response: bytes) -> discovery_pb2.DeltaDiscoveryRequest:
        """Has the response taken in; returns the answer. Raises what isn't about the response."""
        response = self._resync.complete(response)
        try:
            reply = await self._attached.target.apply(response)
        except InvalidRequest as error:
            found = wire.header(response)
            self._progress.received(found.type_url, len(response))
            log.error("response refused", extra={"type": found.type_url, "error": error})
            if not found.nonce:
                raise ControlPlaneError(
                    f"xDS at {self._config.address} sent a response that can't be read: {error}"
                ) from error
            self._progress.troubled(f"{found.type_url}: response refused: {error}")
            return requests.refuse(found.type_url, found.nonce, str(error))
        self.fruitful = True
        self._progress.received(reply.type_url, len(response))
        self._progress.applied(response, reply)
        memory.passed(len(response))
        return requests.acknowledge(reply)


async def _write(call: _Call, request: discovery_pb2.DeltaDiscoveryRequest) -> None:
    """Raises AioRpcError with the stream's status, also when it ended before the write."""
    try:
        await call.write(request)
    except asyncio.InvalidStateError as error:
        raise grpc.aio.AioRpcError(
            await call.code(),
            await call.initial_metadata(),
            await call.trailing_metadata(),
            await call.details(),
            None,
        ) from error
