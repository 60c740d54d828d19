"""Keeps one data plane serving: finds it, starts it, starts it again, replaces it by a successor.

State: `_current`, `_retiring` and the counters, changed by `run` and `replace` under `_changing`.
"""

import asyncio
import contextlib
import logging
import re
import signal
from datetime import timedelta
from pathlib import Path

from agent.dataplane import DataplaneError, DataplaneLost, NobodyListens
from agent.errors import AgentError, ReplaceRefused
from agent.feed import Feed
from agent.instance import Instance, remove_leaf
from agent.pods.reconciler import CaptureError
from agent.slices import DataplaneProcess, RunPaths
from agent.status import DataplaneView
from agent.xds.backoff import Backoff
from proto.gen import control_pb2

log = logging.getLogger("underpass.supervisor")

# First attempt at once; a binary that dies at start must not burn a core.
RESTART = Backoff(start=timedelta(milliseconds=100), cap=timedelta(seconds=10))
# One that lived this long starts the waits anew.
HEALTHY_AFTER = 30.0
# Beyond the drain deadline, before an old one is killed.
EXIT_PATIENCE = timedelta(seconds=10)
# After a second signal, which cuts.
CUT_PATIENCE = timedelta(seconds=3)


class Supervisor:
    def __init__(
        self,
        process: DataplaneProcess,
        paths: RunPaths,
        config: control_pb2.InstanceConfig,
        feed: Feed,
    ) -> None:
        self._process = process
        self._paths = paths
        self._config = config
        self._feed = feed
        self._changing = asyncio.Lock()
        self._exempting = asyncio.Lock()
        # Started or found, not serving yet.
        self._incoming: Instance | None = None
        self._current: Instance | None = None
        self._retiring: dict[Instance, asyncio.Task[None]] = {}
        self._replacement: asyncio.Task[None] | None = None
        # Nothing is started any more.
        self._ending = False
        self._state = "starting"
        self._error: AgentError | None = None
        self._restarts = 0
        self._away = 0.0

    @property
    def owned(self) -> bool:
        return self._process.socket is None

    async def run(self) -> None:
        """Ends only by cancellation; the data plane goes on then."""
        clock = asyncio.get_running_loop().time
        failures = 0
        lost_at: float | None = None
        while True:
            try:
                async with self._changing:
                    instance = await self._obtain()
                    await self._serve(instance)
            except (AgentError, OSError) as exc:
                failures += 1
                self._failed(exc if isinstance(exc, AgentError) else DataplaneLost(str(exc)))
                await asyncio.sleep(RESTART.delay(failures).total_seconds())
                continue
            since = clock()
            returning = asyncio.create_task(self._count_absence(lost_at or since))
            try:
                await self._until_lost()
            finally:
                returning.cancel()
            # One that went before it had all its pods back prolongs the same absence.
            lost_at = (
                clock() if returning.done() and not returning.cancelled() else lost_at or since
            )
            failures = 0 if lost_at - since > HEALTHY_AFTER else failures + 1
            if failures > 1:
                await asyncio.sleep(RESTART.delay(failures - 1).total_seconds())

    async def replace(self) -> None:
        """A successor takes the listeners over, the old one drains and exits.

        Raises ReplaceRefused, and the old one goes on as before.
        """
        if not self.owned:
            raise ReplaceRefused(
                f"the data plane on {self._process.socket} was started by somebody else; "
                "restart it there"
            )
        if self._ending:
            raise ReplaceRefused("the agent is ending")
        if self._changing.locked():
            raise ReplaceRefused("the data plane is being started or replaced already")
        # A task of its own: whoever asked may go away, and the end of the agent must find it.
        self._replacement = asyncio.create_task(self._replace(), name="replace data plane")
        await asyncio.shield(self._replacement)

    async def _replace(self) -> None:
        async with self._changing:
            old = self._current
            if old is None or not old.alive:
                raise ReplaceRefused("no data plane serves that could be replaced")
            self._state = "replacing"
            try:
                await self._succeed(old)
            finally:
                self._state = "serving"

    async def terminate(self, again: asyncio.Event) -> None:
        """Drains and ends all data planes of ours; `again` cuts. Only after `run` was cancelled."""
        await self._stand_still()
        instances = [*self._living(), *await self._strays()]
        for instance in instances:
            instance.send(signal.SIGTERM)
        patience = self._process.drain_deadline + EXIT_PATIENCE
        await asyncio.gather(*(self._end(instance, again, patience) for instance in instances))

    async def close(self) -> None:
        """Lets go of the data planes; they go on. Of two the next agent keeps the one that has
        the listeners."""
        await self._stand_still()
        for instance in self._living():
            await instance.close()

    async def set_log_filter(self, filter: str) -> None:
        """For the present data plane and every later one. Raises DataplaneError, and then the
        filter of none has changed."""
        wanted = control_pb2.LogConfig()
        wanted.CopyFrom(self._config.log)
        wanted.filter = filter
        if self._current is not None:
            await self._current.dataplane.configure(log=wanted)
        self._config.log.CopyFrom(wanted)

    def view(self) -> DataplaneView:
        current = self._current
        if current is None:
            return DataplaneView(
                state=self._state if self._error is None else "away",
                owned=self.owned,
                restarts=self._restarts,
                seconds_without_service=self._away,
                draining=tuple(instance.pid for instance in self._retiring),
                error=str(self._error or ""),
                remedy="" if isinstance(self._error, DataplaneLost) else self._remedy(),
            )
        return DataplaneView(
            state=self._state,
            socket=str(current.socket),
            pid=current.pid,
            instance_id=current.instance_id,
            build=current.build,
            cgroup=str(current.cgroup or ""),
            since=current.since,
            owned=self.owned,
            restarts=self._restarts,
            seconds_without_service=self._away,
            draining=tuple(instance.pid for instance in self._retiring),
        )

    @property
    def serving(self) -> bool:
        return self._current is not None

    @property
    def error(self) -> AgentError | None:
        """Why no data plane serves."""
        return self._error

    # ---- one that serves

    async def _obtain(self) -> Instance:
        if self._process.socket is not None:
            return await Instance.found(self._process.socket, self._config, owned=False)
        found = await self._adopt()
        if found is not None:
            log.info("data plane found running", extra={"pid": found.pid, "socket": found.socket})
            return found
        return await self._start()

    async def _start(self) -> Instance:
        number = 1 + max([number for number, _ in self._sockets()], default=0)
        instance = await Instance.started(
            self._process, self._paths.dataplane_socket(number), self._config, number=number
        )
        log.info("data plane started", extra={"pid": instance.pid, "socket": instance.socket})
        return instance

    async def _adopt(self) -> Instance | None:
        """Of those that answer the newest that listens in pods; the others are left from an
        agent that died while it replaced one, and drain."""
        found: list[Instance] = []
        for number, socket in self._sockets():
            if any(instance.socket == socket for instance in self._retiring):
                continue
            try:
                found.append(await Instance.found(socket, self._config, number=number, owned=True))
            except NobodyListens:
                # Its process is gone. A living one that fails to answer keeps its socket: without
                # it nobody could ever reach it again, and it holds the pods' ports.
                await self._bury(number, socket)
            except BaseException:
                for instance in found:
                    await instance.close()
                raise
        if not found:
            return None
        chosen = max(found, key=_standing)
        for instance in found:
            if instance is not chosen:
                self._retire(instance)
        self._incoming = chosen
        return chosen

    async def _serve(self, instance: Instance) -> None:
        self._incoming = instance
        try:
            await self._configure(instance)
            # Before it opens a socket in any pod.
            with contextlib.suppress(CaptureError):
                # The pods concerned are repaired before they are added, and shown meanwhile.
                await self._exempt(instance)
            self._point_link(instance.socket)
        except Exception:
            # Or our own connection would keep the next attempt out.
            self._incoming = None
            await instance.close()
            raise
        self._current, self._error, self._state = instance, None, "serving"
        self._incoming = None
        await self._feed.attach(instance.dataplane)

    async def _configure(self, instance: Instance) -> None:
        """One that an earlier agent configured keeps what can't change, and is told the rest."""
        held, wanted = instance.dataplane.hello.config, self._config
        if held.log != wanted.log or held.limits != wanted.limits:
            await instance.dataplane.configure(log=wanted.log, limits=wanted.limits)

    async def _count_absence(self, since: float) -> None:
        """The first start is no absence, so its `since` is now."""
        await self._feed.served()
        if self._restarts:
            seconds = asyncio.get_running_loop().time() - since
            self._away += seconds
            fields = {"seconds_without_service": f"{seconds:.3f}"}
            log.warning("data plane serves again", extra=fields)

    async def _until_lost(self) -> None:
        while True:
            watched = self._current
            assert watched is not None  # set by _serve, replaced only by another
            await watched.ended()
            async with self._changing:
                if watched is not self._current:
                    continue
                self._feed.detach()
                self._current = None
                self._restarts += 1
                why = str(await watched.dataplane.wait_lost()) if watched.alive else "it ended"
                log.error("data plane lost", extra={"pid": watched.pid, "why": why})
                self._failed(DataplaneLost(f"data plane {watched.pid} was lost: {why}"))
                alive = watched.alive
                await watched.close()
                if not alive and self.owned:
                    await watched.clean()
                return

    # ---- successors

    async def _succeed(self, old: Instance) -> None:
        try:
            new = await self._start()
        except AgentError as exc:
            raise ReplaceRefused(f"no successor: {exc}") from exc
        self._incoming = new
        try:
            await self._exempt(new)
            await self._feed.hand_over(old.dataplane, old.socket, new.dataplane)
        except AgentError as exc:
            await self._discard(new)
            self._incoming = None
            with contextlib.suppress(CaptureError):
                await self._exempt()
            raise exc if isinstance(exc, ReplaceRefused) else ReplaceRefused(str(exc)) from exc
        self._current, self._incoming = new, None
        self._point_link(new.socket)
        log.info("data plane replaced", extra={"old": old.pid, "new": new.pid})
        self._retire(old)

    async def _discard(self, instance: Instance) -> None:
        """A successor that serves nobody."""
        instance.send(signal.SIGKILL)
        await instance.exited(EXIT_PATIENCE)
        await instance.close()
        await instance.clean()

    def _retire(self, instance: Instance) -> None:
        self._retiring[instance] = asyncio.create_task(
            self._see_off(instance), name=f"drain {instance.pid}"
        )

    async def _see_off(self, old: Instance) -> None:
        """Its connections end within the deadline, then it ends, then nothing of it is left."""
        deadline = self._process.drain_deadline
        try:
            await old.dataplane.drain(deadline=deadline, exit=True)
        except DataplaneError as exc:
            if old.alive:
                log.warning("old data plane doesn't drain", extra={"pid": old.pid, "error": exc})
        if not await old.exited(EXIT_PATIENCE):
            log.error("old data plane doesn't end, killed", extra={"pid": old.pid})
            old.send(signal.SIGKILL)
            await old.exited(EXIT_PATIENCE)
        del self._retiring[old]
        await old.close()
        try:
            await self._exempt()
        except CaptureError as exc:
            log.warning("old exemption not removed everywhere", extra={"error": exc})
        await old.clean()
        log.info("old data plane ended", extra={"pid": old.pid})

    def _living(self) -> list[Instance]:
        known = [*self._retiring, self._current, self._incoming]
        return list(dict.fromkeys(one for one in known if one is not None))

    async def _strays(self) -> list[Instance]:
        """Ours that this agent didn't come to meet, because it ends so early."""
        known = {instance.socket for instance in self._living()}
        found = []
        for number, socket in self._sockets():
            if socket in known:
                continue
            try:
                found.append(await Instance.found(socket, self._config, number=number, owned=True))
            except NobodyListens:
                await self._bury(number, socket)
            except DataplaneError as exc:
                fields = {"socket": socket, "error": exc}
                log.warning("data plane can't be asked to end", extra=fields)
        return found

    async def _bury(self, number: int, socket: Path) -> None:
        """What a data plane leaves that ended while no agent looked."""
        socket.unlink(missing_ok=True)
        if self._process.cgroup_parent is not None:
            await remove_leaf(self._process.cgroup_parent / f"dataplane-{number}")

    async def _stand_still(self) -> None:
        """Ends what this supervisor does by itself."""
        self._ending = True
        tasks = [*self._retiring.values(), *([self._replacement] if self._replacement else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _end(self, instance: Instance, again: asyncio.Event, patience: timedelta) -> None:
        waits = {
            asyncio.ensure_future(instance.exited(patience)),
            asyncio.ensure_future(again.wait()),
        }
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        if again.is_set() and instance.alive:
            instance.send(signal.SIGTERM)
            await instance.exited(CUT_PATIENCE)
        if instance.alive:
            log.error("data plane doesn't end, killed", extra={"pid": instance.pid})
            instance.send(signal.SIGKILL)
            await instance.exited(CUT_PATIENCE)
        await instance.clean()
        self._paths.dataplane_link.unlink(missing_ok=True)

    # ---- helpers

    def _remedy(self) -> str:
        return self._error.remedy if self._error is not None else ""

    def _failed(self, error: AgentError) -> None:
        if str(error) != str(self._error):
            log.error("no data plane", extra={"error": error})
        self._error = error

    async def _exempt(self, incoming: Instance | None = None) -> None:
        """The leaves of all living data planes, and of no other. Raises CaptureError."""
        async with self._exempting:
            self._incoming = incoming or self._incoming
            living = [self._current, self._incoming, *self._retiring]
            await self._feed.exempt([one.cgroup for one in living if one is not None])

    def _sockets(self) -> list[tuple[int, Path]]:
        found = []
        for path in self._paths.root.glob("dataplane-*.sock"):
            if match := re.fullmatch(r"dataplane-(\d+)\.sock", path.name):
                found.append((int(match[1]), path))
        return sorted(found)

    def _point_link(self, socket: Path) -> None:
        """Observers find the present data plane here, also while no agent runs."""
        scratch = self._paths.root / "dataplane.sock.new"
        scratch.unlink(missing_ok=True)
        scratch.symlink_to(socket.name if socket.parent == self._paths.root else socket)
        scratch.replace(self._paths.dataplane_link)


def _standing(instance: Instance) -> tuple[bool, bool, int]:
    """Which of several living data planes serves: one that doesn't drain and has pods up."""
    hello = instance.dataplane.hello
    up = any(pod.state == control_pb2.PodStatus.UP for pod in hello.pods)
    return (not hello.draining, up, instance.number)
