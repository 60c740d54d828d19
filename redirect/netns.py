"""Runs functions inside other network namespaces, on one thread that does nothing else.

A thread that couldn't come home is thrown away together with whatever namespace it is in: its next
job would configure the wrong pod.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import fcntl
import os
import queue
import threading
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, TypeVar

from redirect.base import NetnsGone, NotRetryable, RedirectError

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

CLONE_NEWNET = 0x40000000
CURRENT = "/proc/thread-self/ns/net"
# libnftables waits for answers by select(2), which takes descriptors below this alone and ends the
# process otherwise (seen with a thousand pods). What is held for long leaves those free.
FD_SETSIZE = 1024

_libc = ctypes.CDLL(None, use_errno=True)


def duplicate(fd: int) -> int:
    """A copy to be held for long, the caller's to close. Raises OSError."""
    try:
        return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, FD_SETSIZE)
    except OSError as exc:
        # The limit of open files isn't above, or all those are taken.
        if exc.errno not in (errno.EINVAL, errno.EMFILE):
            raise
        return os.dup(fd)


class NetnsThread:
    """Jobs run one after another, in the order of the calls.

    State: `_worker`, replaced under `_lock` by the callers' thread when it is gone or lost.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._worker: _Worker | None = None

    async def run(self, netns_fd: int, job: Callable[[], T], *, subject: str) -> T:
        """`job()` inside the namespace. Raises NetnsGone, RedirectError, or what `job` raises.

        A cancelled caller doesn't stop a job that has begun; the descriptor is kept for it.
        """
        try:
            fd = os.dup(netns_fd)
        except OSError as exc:
            if exc.errno == errno.EBADF:
                raise NetnsGone(f"{subject}: its network namespace isn't open any more") from exc
            # Not the pod's fault: most likely the agent's limit of open files.
            raise RedirectError(f"{subject}: {exc.strerror}; raise LimitNOFILE") from exc
        result: T = await self._submit(_Job(fd, job, subject))
        return result

    async def create(self) -> int:
        """Descriptor of a new, empty, nameless namespace, which lives as long as it is open."""
        fd: int = await self._submit(_Job(None, _open_current, "scratch namespace"))
        return fd

    async def close(self) -> None:
        """Ends the thread after the jobs that are queued."""
        with self._lock:
            worker, self._worker = self._worker, None
        if worker is not None:
            worker.jobs.put(None)
            await asyncio.to_thread(worker.thread.join)

    async def _submit(self, job: _Job) -> Any:
        with self._lock:
            if self._worker is None or self._worker.lost:
                self._worker = _Worker(self._lock)
            self._worker.jobs.put(job)
        return await asyncio.wrap_future(job.done)


class _Job:
    def __init__(self, fd: int | None, run: Callable[[], Any], subject: str) -> None:
        self.fd = fd
        self.run = run
        self.subject = subject
        self.done: Future[Any] = Future()

        self.result: Any = None
        self.error: BaseException | None = None

    def answer(self) -> None:
        if self.fd is not None:
            os.close(self.fd)
        if self.done.cancelled():
            return
        if self.error is None:
            self.done.set_result(self.result)
        else:
            self.done.set_exception(self.error)


class _Worker:
    """One thread and its queue. `lost` is set under the lock, once nothing more is taken."""

    def __init__(self, lock: threading.Lock) -> None:
        self.lost = False
        self.jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._lock = lock
        self.thread = threading.Thread(target=self._serve, name="netns", daemon=True)
        self.thread.start()

    def _serve(self) -> None:
        home = _open_current()
        try:
            while (job := self.jobs.get()) is not None:
                came_home = _visit(job, home)
                # Before its caller can ask for more.
                if not came_home:
                    self._give_up()
                job.answer()
                if not came_home:
                    return
        finally:
            os.close(home)

    def _give_up(self) -> None:
        with self._lock:
            self.lost = True
            while not self.jobs.empty():
                job = self.jobs.get()
                if job is not None and job.done.set_running_or_notify_cancel():
                    job.error = RedirectError(f"{job.subject}: the namespace thread was lost")
                if job is not None:
                    job.answer()


def _visit(job: _Job, home: int) -> bool:
    """Runs the job in its namespace; False when the thread couldn't come home."""
    if not job.done.set_running_or_notify_cancel():
        return True
    try:
        _enter(job)
    except RedirectError as exc:
        job.error = exc
        return True
    try:
        job.result = job.run()
    except BaseException as exc:  # whatever it is, it belongs to the caller
        job.error = exc
    came_home: bool = _libc.setns(home, CLONE_NEWNET) == 0
    return came_home


def _enter(job: _Job) -> None:
    if job.fd is None:
        if _libc.unshare(CLONE_NEWNET) != 0:
            raise _error(job.subject, "can't be made", ctypes.get_errno())
    elif _libc.setns(job.fd, CLONE_NEWNET) != 0:
        raise _error(job.subject, "can't be entered", ctypes.get_errno())


def _error(subject: str, what: str, code: int) -> RedirectError:
    if code == errno.EPERM:
        return NotRetryable(
            f"{subject}: the network namespace {what}: not permitted;"
            " give the agent CAP_SYS_ADMIN and CAP_NET_ADMIN"
        )
    if code in (errno.EINVAL, errno.EBADF):
        return NetnsGone(f"{subject}: the network namespace {what}: not a network namespace")
    return RedirectError(f"{subject}: the network namespace {what}: {os.strerror(code)}")


def _open_current() -> int:
    return os.open(CURRENT, os.O_RDONLY | os.O_CLOEXEC)
