"""The thread that enters namespaces; here without privileges, by a setns that a test controls."""

from __future__ import annotations

import asyncio
import ctypes
import errno
import os
import threading
from functools import partial
from typing import TYPE_CHECKING

import pytest

from redirect import NetnsGone, NotRetryable, RedirectError
from redirect import netns as module
from redirect.netns import NetnsThread

if TYPE_CHECKING:
    from collections.abc import Iterator


class FakeKernel:
    """`setns` and `unshare` answer with an errno of the test's choice; 0 is success."""

    def __init__(self) -> None:
        self.codes: list[int] = []

    def setns(self, _fd: int, _kind: int) -> int:
        return self.unshare(0)

    def unshare(self, _kind: int) -> int:
        code = self.codes.pop(0) if self.codes else 0
        ctypes.set_errno(code)
        return -1 if code else 0


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> FakeKernel:
    fake = FakeKernel()
    monkeypatch.setattr(module, "_libc", fake)
    return fake


@pytest.fixture
def fd() -> Iterator[int]:
    made = os.open("/dev/null", os.O_RDONLY)
    yield made
    os.close(made)


async def test_jobs_run_in_order_on_one_thread(kernel: FakeKernel, fd: int) -> None:
    thread = NetnsThread()
    numbers: list[int] = []
    jobs = [partial(numbers.append, number) for number in range(5)]
    await asyncio.gather(*(thread.run(fd, job, subject="pod") for job in jobs))
    assert numbers == [0, 1, 2, 3, 4]
    threads = [await thread.run(fd, threading.current_thread, subject="pod") for _ in range(3)]
    assert len(set(threads)) == 1
    assert threads[0] is not threading.current_thread()
    await thread.close()


async def test_a_thread_that_cannot_come_home_is_never_used_again(
    kernel: FakeKernel, fd: int
) -> None:
    thread = NetnsThread()
    kernel.codes = [0, errno.EPERM]
    lost = await thread.run(fd, threading.current_thread, subject="pod")
    later = [await thread.run(fd, threading.current_thread, subject="pod") for _ in range(3)]
    assert lost not in later
    await thread.close()


async def test_jobs_behind_a_lost_thread_fail_retryably(kernel: FakeKernel, fd: int) -> None:
    thread = NetnsThread()
    entered, go = threading.Event(), threading.Event()

    def wait() -> None:
        entered.set()
        go.wait()

    kernel.codes = [0, errno.EPERM]
    first = asyncio.create_task(thread.run(fd, wait, subject="first"))
    await asyncio.to_thread(entered.wait)
    second = asyncio.create_task(thread.run(fd, lambda: None, subject="second"))
    await asyncio.sleep(0)  # lets `second` enter the queue
    go.set()
    await first
    with pytest.raises(RedirectError, match="second") as failure:
        await second
    assert failure.value.retryable
    await thread.close()


@pytest.mark.parametrize(
    ("code", "kind", "text"),
    [
        (errno.EPERM, NotRetryable, "CAP_SYS_ADMIN"),
        (errno.EINVAL, NetnsGone, "not a network namespace"),
        (errno.ENOMEM, RedirectError, "Cannot allocate memory"),
    ],
)
async def test_what_the_kernel_refuses_names_the_pod(
    kernel: FakeKernel, fd: int, code: int, kind: type[RedirectError], text: str
) -> None:
    thread = NetnsThread()
    kernel.codes = [code]
    with pytest.raises(kind, match=f"shop/cart.*{text}"):
        await thread.run(fd, lambda: None, subject="shop/cart")
    await thread.close()


async def test_an_exception_of_the_job_reaches_the_caller_and_the_thread_goes_on(
    kernel: FakeKernel, fd: int
) -> None:
    thread = NetnsThread()

    def fail() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await thread.run(fd, fail, subject="pod")
    assert await thread.run(fd, lambda: 7, subject="pod") == 7
    await thread.close()


async def test_descriptors_are_given_back(kernel: FakeKernel, fd: int) -> None:
    thread = NetnsThread()
    await thread.run(fd, lambda: None, subject="pod")
    before = len(os.listdir("/proc/self/fd"))
    for codes in ([], [errno.EPERM], [0, errno.EPERM]):
        kernel.codes = list(codes)
        await asyncio.gather(thread.run(fd, lambda: None, subject="pod"), return_exceptions=True)
    await thread.run(fd, lambda: None, subject="pod")
    assert len(os.listdir("/proc/self/fd")) == before
    await thread.close()


async def test_lack_of_descriptors_is_not_taken_for_a_dead_pod(
    kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_fd: int) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    thread = NetnsThread()
    monkeypatch.setattr(os, "dup", full)
    with pytest.raises(RedirectError, match="shop/a: Too many open files") as caught:
        await thread.run(0, lambda: None, subject="shop/a")
    assert caught.value.retryable
    monkeypatch.undo()
    with pytest.raises(NetnsGone):
        await thread.run(1 << 20, lambda: None, subject="shop/a")
    await thread.close()
