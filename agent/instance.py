"""One data plane process: started or found, watched by pidfd whether it is a child or not."""

import asyncio
import contextlib
import os
import signal
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Self

from agent.dataplane import Dataplane, DataplaneLost
from agent.errors import SupervisorError
from agent.settings import ENV_PREFIX
from agent.slices import DataplaneProcess
from proto.gen import control_pb2

# From exec to an answer to Hello; a debug binary on a loaded machine takes under a second.
# What is ours, and what of upstream's holds secrets, isn't for the data plane.
_OURS = (ENV_PREFIX, "AUTH_TOKEN", "XDS_HEADER_", "CA_HEADER_")
START_PATIENCE = 15.0
_PROBE = 0.02
_LEAF_TRIES = 50
# sysexits.h, as the data plane ends: what asking again won't help.
_REMEDIES = {
    "exit status 64": "it isn't of this agent's release: install both of the same",
    "exit status 69": "it needs CAP_NET_ADMIN, CAP_NET_RAW and CAP_SYS_ADMIN, and a cgroup2 leaf "
    "where it may move to (--dataplane-cgroup-parent)",
}


@dataclass(eq=False)
class Instance:
    """A connected data plane. `pidfd` is -1 where its process can't be seen from here."""

    socket: Path
    dataplane: Dataplane
    number: int = 0
    pid: int = 0
    pidfd: int = -1
    since: datetime = field(default_factory=lambda: datetime.now(UTC))
    instance_id: str = ""
    build: str = ""
    cgroup: Path | None = None

    @classmethod
    async def found(
        cls, socket: Path, config: control_pb2.InstanceConfig, *, number: int = 0, owned: bool
    ) -> Self:
        """Connects to a running one. Raises DataplaneError."""
        dataplane = await Dataplane.connect(socket, role="agent", config=config)
        hello = dataplane.hello
        return cls(
            socket=socket,
            dataplane=dataplane,
            number=number,
            pid=hello.pid,
            # One that somebody else starts may live in another pid namespace.
            pidfd=_watch(hello.pid) if owned else -1,
            instance_id=hello.instance_id,
            build=hello.build,
            cgroup=Path(hello.cgroup) if hello.cgroup else None,
        )

    @classmethod
    async def started(
        cls,
        process: DataplaneProcess,
        socket: Path,
        config: control_pb2.InstanceConfig,
        *,
        number: int,
    ) -> Self:
        """Starts one and says Hello. Raises SupervisorError when it ends or doesn't answer."""
        pid = _spawn(process, socket, number)
        pidfd = _watch(pid)
        end = asyncio.get_running_loop().time() + START_PATIENCE
        try:
            while True:
                try:
                    instance = await cls.found(socket, config, number=number, owned=False)
                    break
                except DataplaneLost as exc:
                    if (status := _reap(pid)) is not None:
                        raise _stillborn(process, status) from exc
                    if asyncio.get_running_loop().time() > end:
                        raise SupervisorError(
                            f"{process.binary} doesn't answer on {socket} "
                            f"after {START_PATIENCE:.0f} s"
                        ) from exc
                await asyncio.sleep(_PROBE)
        except BaseException:
            _kill(pidfd)
            _reap(pid, wait=True)
            os.close(pidfd)
            socket.unlink(missing_ok=True)
            if process.cgroup_parent is not None:
                await remove_leaf(process.cgroup_parent / f"dataplane-{number}")
            raise
        instance.pid, instance.pidfd = pid, pidfd
        return instance

    @property
    def alive(self) -> bool:
        """The process runs, as far as can be seen: without a pidfd, that it is connected."""
        if self.pidfd < 0:
            return self.dataplane.connected
        return _reap(self.pid) is None and _exists(self.pidfd)

    async def ended(self) -> None:
        """Until the connection or the process is gone."""
        waits: list[asyncio.Future[object]] = [asyncio.ensure_future(self.dataplane.wait_lost())]
        if self.pidfd >= 0:
            waits.append(asyncio.ensure_future(_readable(self.pidfd)))
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    async def exited(self, within: timedelta) -> bool:
        """Whether the process was gone within that time."""
        if self.pidfd < 0:
            return True
        try:
            async with asyncio.timeout(within.total_seconds()):
                await _readable(self.pidfd)
        except TimeoutError:
            return False
        _reap(self.pid)
        return True

    def send(self, number: signal.Signals) -> None:
        """Does nothing when it is gone; the pidfd can't hit a stranger with its process id."""
        if self.pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.pidfd, number)

    async def close(self) -> None:
        """Ends the connection; the process goes on."""
        await self.dataplane.close()
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1

    async def clean(self) -> None:
        """Removes what an ended process leaves: its socket and its empty cgroup."""
        self.socket.unlink(missing_ok=True)
        if self.cgroup is not None:
            await remove_leaf(self.cgroup)


async def remove_leaf(leaf: Path) -> None:
    """Stays when somebody else was put there: not ours to remove."""
    for _ in range(_LEAF_TRIES):
        try:
            leaf.rmdir()
        except FileNotFoundError:
            break
        except OSError:
            # Busy for a moment after its last process, while the kernel buries the threads.
            await asyncio.sleep(_PROBE)
        else:
            break
    remove_parents(leaf.parent)


def remove_parents(folder: Path) -> None:
    """underpass/NODE is made by the agent, if nobody else is in it; a folder that was named to it
    isn't."""
    if folder.parent.name == "underpass":
        with contextlib.suppress(OSError):
            folder.rmdir()
            folder.parent.rmdir()


def _stillborn(process: DataplaneProcess, status: str) -> SupervisorError:
    error = SupervisorError(f"{process.binary} ended at start ({status}); its log says why")
    error.remedy = _REMEDIES.get(status, "")
    return error


def _spawn(process: DataplaneProcess, socket: Path, number: int) -> int:
    """Own session: a terminal's Ctrl-C is for the agent, which passes it on. Output is inherited,
    never a pipe, so that the agent's death breaks nothing."""
    assert process.binary is not None  # config: a socket or a binary
    arguments = [str(process.binary), "--socket", str(socket)]
    if process.cgroup_parent is not None:
        arguments += ["--cgroup", str(process.cgroup_parent / f"dataplane-{number}")]
    if process.workers:
        arguments += ["--workers", str(process.workers)]
    socket.unlink(missing_ok=True)
    try:
        if process.cgroup_parent is not None:
            process.cgroup_parent.mkdir(parents=True, exist_ok=True)
        return os.posix_spawn(
            process.binary,
            arguments,
            # Its settings are the arguments; what configures the agent by the same names isn't.
            {name: value for name, value in os.environ.items() if not name.startswith(_OURS)},
            file_actions=[(os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0)],
            setsid=True,
            # Python ignores these, and what is ignored stays so across exec.
            setsigdef=[signal.SIGPIPE, signal.SIGXFSZ],
        )
    except OSError as exc:
        raise SupervisorError(f"{exc.filename or process.binary}: {exc.strerror}") from exc


def _watch(pid: int) -> int:
    try:
        return os.pidfd_open(pid)
    except OSError:
        return -1


def _reap(pid: int, *, wait: bool = False) -> str | None:
    """How a child ended; None while it runs or when it isn't a child."""
    try:
        found, status = os.waitpid(pid, 0 if wait else os.WNOHANG)
    except ChildProcessError:
        return None
    if not found:
        return None
    code = os.waitstatus_to_exitcode(status)
    return f"exit status {code}" if code >= 0 else signal.Signals(-code).name


def _exists(pidfd: int) -> bool:
    try:
        signal.pidfd_send_signal(pidfd, 0)
    except ProcessLookupError:
        return False
    return True


def _kill(pidfd: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)


async def _readable(pidfd: int) -> None:
    """A pidfd becomes readable when its process ends. The descriptor is duplicated, since several
    may wait and an event loop takes one reader a descriptor."""
    watched = os.dup(pidfd)
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    loop.add_reader(watched, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(watched)
        os.close(watched)
