"""From upstream's way of writing a value to ours. Each raises Mistake."""

import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from agent.errors import Mistake
from agent.literal import Literal

Convert = Callable[[str], object]


def same(text: str) -> object:
    return text


def switch(text: str) -> bool:
    """Upstream's words for a boolean."""
    try:
        return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
    except KeyError:
        raise Mistake("write true or false") from None


def only(wanted: bool, why: str) -> Convert:
    """A switch of which only one position exists here."""

    def convert(text: str) -> object:
        if switch(text) is not wanted:
            raise Mistake(why)
        return None

    return convert


def original_source(text: str) -> str:
    return "must" if switch(text) else "never"


def socks5(text: str) -> object:
    # facts ztunnel 1.1
    return 15080 if switch(text) else "off"


def log_filter(text: str) -> str:
    """Upstream's targets are named after its crate, ours after ours."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    return ",".join(
        f"underpass{part.removeprefix('ztunnel')}" if part.startswith("ztunnel") else part
        for part in parts
    )


def log_format(text: str) -> str:
    known = {"json": "json", "plain": "text"}
    if text not in known:
        raise Mistake("write plain or json")
    return known[text]


def token(text: str) -> object:
    """A path, or the token itself, which is a secret and never repeated."""
    try:
        found = Path(text).exists()
    except OSError:
        # Longer than a name may be.
        found = False
    if found:
        return text
    if text.startswith(("/", "./")):
        # No token begins so: the file isn't mounted.
        raise Mistake("names no file")
    if not text.isascii() or not text.isprintable() or " " in text:
        raise Mistake("neither a file nor a token")
    return Literal("AUTH_TOKEN", text)


def drain_deadline(environ: Mapping[str, str]) -> tuple[str, str] | None:
    """The name that decides and the time: facts ztunnel 11.4, but no grace period of 0 becomes
    endless."""
    name = "CONNECTION_TERMINATION_DEADLINE"
    if name in environ:
        return name, environ[name]
    name = "TERMINATION_GRACE_PERIOD_SECONDS"
    if name not in environ:
        return None
    try:
        grace = int(environ[name])
    except ValueError:
        raise Mistake("not a whole number of seconds") from None
    if grace < 0:
        raise Mistake("must not be negative")
    return name, f"{max(1, grace - 5 if grace > 10 else grace - 1)}s"


def workers(environ: Mapping[str, str], concurrency: object) -> tuple[str, int] | None:
    """The name that decides and the number of threads; None: our own default."""
    cpus = _cpus(environ)
    name = "ZTUNNEL_WORKER_THREADS"
    if name in environ:
        return name, threads(environ[name], cpus)
    if concurrency is not None:
        return "concurrency", threads(str(concurrency), cpus)
    limit = environ.get("ZTUNNEL_RESOURCE_CPU_LIMIT")
    request = environ.get("ZTUNNEL_RESOURCE_CPU_REQUEST")
    asked = quantity(request) if request else 0
    if limit:
        return "ZTUNNEL_RESOURCE_CPU_LIMIT", max(1, quantity(limit), asked)
    if request:
        return "ZTUNNEL_RESOURCE_CPU_REQUEST", max(2, asked, math.ceil(cpus / 4))
    return None


def threads(text: str, cpus: int) -> int:
    """A number, `N%` of the CPUs, or 0 for all of them."""
    share, percent, rest = text.strip().partition("%")
    try:
        number = int(share)
    except ValueError:
        number = -1
    if number < 0 or rest or (percent and not 0 < number <= 100):
        raise Mistake("write a number, 0 for all CPUs, or a share such as 50%")
    if percent:
        return max(1, math.ceil(cpus * number / 100))
    return number or cpus


def quantity(text: str) -> int:
    """CPUs of a Kubernetes quantity, rounded up: `2`, `1.5`, `1500m`."""
    try:
        number = float(text.removesuffix("m")) / (1000 if text.endswith("m") else 1)
    except ValueError:
        number = -1.0
    if not 0 <= number < 1_000_000:
        raise Mistake("not a CPU quantity such as 2 or 1500m")
    return math.ceil(number)


def _cpus(environ: Mapping[str, str]) -> int:
    hint = environ.get("ZTUNNEL_CPU_LIMIT", "")
    return int(hint) if hint.isdecimal() and int(hint) else (os.cpu_count() or 1)
