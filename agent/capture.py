"""The present data plane as the one who captures by eBPF."""

from collections.abc import Awaitable, Callable

from agent.dataplane import Dataplane, DataplaneError
from proto.gen import control_pb2
from redirect.base import Datagrams, NetnsGone, NotRetryable, Probe, RedirectError


class PresentCapture:
    """Implements redirect.ebpf.CaptureClient. State: `_present`, by `follow`."""

    def __init__(self, probe: Callable[[], Awaitable[Probe]]) -> None:
        self._probe = probe
        self._present: Callable[[], Dataplane | None] = lambda: None

    def follow(self, present: Callable[[], Dataplane | None]) -> None:
        self._present = present

    async def probe(self) -> Probe:
        return await self._probe()

    async def install(self, uid: str) -> None:
        await self._ask(control_pb2.Capture(install=uid))

    async def verify(self, uid: str) -> tuple[str, ...]:
        return tuple((await self._ask(control_pb2.Capture(verify=uid))).problems)

    async def remove(self, uid: str) -> None:
        await self._ask(control_pb2.Capture(remove=uid))

    async def list(self, uid: str) -> tuple[bool, dict[str, int]]:
        reply = await self._ask(control_pb2.Capture(list=uid))
        return reply.captured, {reason.name: reason.count for reason in reply.reasons}

    async def datagrams(self, uid: str) -> Datagrams:
        found = (await self._ask(control_pb2.Capture(datagrams=uid))).datagrams
        return Datagrams(found.refused, found.unprotected)

    async def _ask(self, verb: control_pb2.Capture) -> control_pb2.CaptureReply:
        dataplane = self._present()
        if dataplane is None:
            raise RedirectError("no data plane serves: capture by eBPF is its work")
        try:
            return await dataplane.capture(verb)
        except DataplaneError as exc:
            if exc.code == "NETNS_GONE":
                raise NetnsGone(str(exc)) from exc
            if exc.code in ("INVALID", "PERMISSION"):
                raise NotRetryable(f"{exc}; {exc.remedy}" if exc.remedy else str(exc)) from exc
            raise RedirectError(str(exc)) from exc
