"""Waits for what a test claims, instead of sleeping."""

import asyncio
import time
from collections.abc import Callable


async def eventually(
    claim: Callable[[], object], *, within: float = 10.0, what: Callable[[], object] | None = None
) -> None:
    """Returns once `claim()` is true; fails with what `what()` shows after `within` seconds."""
    end = time.monotonic() + within
    while not claim():
        if time.monotonic() > end:
            shown = "" if what is None else f": {what()}"
            raise AssertionError(f"not true within {within} s{shown}")
        await asyncio.sleep(0.01)
