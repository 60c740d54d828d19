"""Capture by eBPF: the data plane owns it, and this asks for it; what the answers of applications
need of a pod's routing is put there first."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

from redirect import routes
from redirect.base import (
    CaptureConfig,
    Datagrams,
    Installed,
    InstalledRule,
    NetnsGone,
    Probe,
    RedirectError,
    Target,
)
from redirect.netns import NetnsThread

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

# An accepted socket takes the mark of the connection's first packet, so that the application's
# answers to a foreign source find the way back to the data plane (design section 4).
_FWMARK_ACCEPT = Path("/proc/sys/net/ipv4/tcp_fwmark_accept")


class CaptureClient(Protocol):
    """The data plane, as the one who captures. Each but `probe` raises RedirectError."""

    async def probe(self) -> Probe: ...

    async def install(self, uid: str) -> None: ...

    async def verify(self, uid: str) -> tuple[str, ...]: ...

    async def remove(self, uid: str) -> None: ...

    async def list(self, uid: str) -> tuple[bool, dict[str, int]]:
        """Whether the pod is captured, and how often each exit was taken on the node."""

    async def datagrams(self, uid: str) -> Datagrams: ...


class Detached:
    """A CaptureClient for after the node's pins were removed: nothing is captured any more."""

    async def probe(self) -> Probe:
        return Probe(usable=False, reason="the node's programs were removed")

    async def install(self, uid: str) -> None:
        raise RedirectError("the node's programs were removed")

    async def verify(self, uid: str) -> tuple[str, ...]:
        return ("the node's programs were removed",)

    async def remove(self, uid: str) -> None:
        return

    async def list(self, uid: str) -> tuple[bool, dict[str, int]]:
        return False, {}

    async def datagrams(self, uid: str) -> Datagrams:
        return Datagrams()


class EbpfCapture:
    """Implements `Redirect`. State: `_config` (by `reconfigure`)."""

    name = "ebpf"
    # Whoever is exempt is known to the kernel side by itself.
    exempts_by_rule = False

    def __init__(self, client: CaptureClient, config: CaptureConfig | None = None) -> None:
        self._client = client
        self._config = config or CaptureConfig()
        self._netns = NetnsThread()

    async def probe(self) -> Probe:
        return await self._client.probe()

    async def install(self, target: Target) -> None:
        ipv6 = self._config.ipv6

        def prepare() -> tuple[routes.Part, ...]:
            added = routes.install(ipv6=ipv6)
            _FWMARK_ACCEPT.write_text("1")
            return added

        added = await self._in_pod(target, prepare)
        try:
            await self._client.install(target.uid)
        except BaseException:
            await self._in_pod(target, lambda: routes.remove(added))
            raise

    async def verify(self, target: Target) -> tuple[str, ...]:
        ipv6 = self._config.ipv6

        def look() -> tuple[str, ...]:
            there = routes.present()
            missing = [str(part) for part in routes.wanted(ipv6=ipv6) if part not in there]
            if _FWMARK_ACCEPT.read_text().strip() != "1":
                missing.append("net.ipv4.tcp_fwmark_accept=1")
            return tuple(f"{part} is missing" for part in missing)

        missing = await self._in_pod(target, look)
        return (*await self._client.verify(target.uid), *missing)

    async def release(self, target: Target) -> None:
        """What is live keeps its record in the kernel, and the routing that answers need."""
        await self._client.remove(target.uid)

    async def idle(self, target: Target) -> bool:
        """What is live lives with its sockets; the routing stays for who captures now."""
        return True

    async def remove(self, target: Target) -> None:
        await self._client.remove(target.uid)

        def withdraw() -> None:
            if not target.shared:
                routes.remove()
            _FWMARK_ACCEPT.write_text("0")

        await self._in_pod(target, withdraw)

    async def list(self, target: Target) -> Installed:
        captured, counts = await self._client.list(target.uid)
        there = await self._in_pod(target, routes.present)
        rules = [InstalledRule("node", name, count, 0) for name, count in counts.items()]
        return Installed(tuple(rules) if captured else (), tuple(str(part) for part in there))

    async def datagrams(self, target: Target) -> Datagrams:
        return await self._client.datagrams(target.uid)

    def reconfigure(self, config: CaptureConfig) -> None:
        self._config = config

    async def close(self) -> None:
        await self._netns.close()

    async def _in_pod(self, target: Target, job: Callable[[], T]) -> T:
        """As NetnsThread.run; errors of the job name the pod."""

        def named() -> T:
            try:
                return job()
            except RedirectError as exc:
                raise type(exc)(f"{target.name}: {exc}") from exc
            except FileNotFoundError as exc:
                raise NetnsGone(f"{target.name}: {exc}") from exc
            except OSError as exc:
                raise RedirectError(f"{target.name}: {exc}") from exc

        return await self._netns.run(target.netns_fd, named, subject=target.name)
