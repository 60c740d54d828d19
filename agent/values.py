"""Settings' values, from text or YAML to what the agent uses. Each function raises Mistake and says
what would be right."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from ipaddress import ip_address
from pathlib import Path

from agent.errors import Mistake
from agent.literal import Literal

_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")
_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_NODE = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")
_DOMAIN = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")
_TRUST_DOMAIN = re.compile(r"[a-z0-9._-]{1,255}")
# sun_path holds 108 bytes with its NUL.
SOCKET_PATH_LIMIT = 107


def text(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise Mistake("a text is wanted")
    return str(value)


def words(value: object) -> str:
    found = text(value).strip()
    if not found:
        raise Mistake("is empty; leave it out instead")
    return found


def node_name(value: object) -> str:
    found = text(value)
    if not _NODE.fullmatch(found):
        raise Mistake("not a node name: lower-case letters, digits, '-' and '.', as Kubernetes has")
    return found


def trust_domain(value: object) -> str:
    found = text(value)
    if not _TRUST_DOMAIN.fullmatch(found):
        raise Mistake("not a trust domain: lower-case letters, digits, '.', '-' and '_'")
    return found


def trust_domains(value: object) -> tuple[str, ...]:
    """A list in the file, joined by commas elsewhere."""
    pieces = value if isinstance(value, list | tuple) else text(value).split(",")
    names = (str(piece).strip() for piece in pieces)
    return tuple(dict.fromkeys(trust_domain(name) for name in names if name))


def switch(value: object) -> bool:
    if isinstance(value, bool):
        return value
    known = {"true": True, "on": True, "yes": True, "1": True}
    known |= {"false": False, "off": False, "no": False, "0": False}
    try:
        return known[str(value).lower()]
    except KeyError:
        raise Mistake("write true or false") from None


def duration(value: object) -> timedelta:
    found = str(value).strip()
    pieces = _DURATION.findall(found)
    if not pieces or "".join(number + unit for number, unit in pieces) != found:
        raise Mistake("not a duration; write a number with ms, s, m, h or d, for example 5s")
    return timedelta(seconds=sum(float(number) * _UNITS[unit] for number, unit in pieces))


def positive_duration(value: object) -> timedelta:
    found = duration(value)
    if found <= timedelta(0):
        raise Mistake("must be longer than nothing")
    return found


def positive_duration_or_off(value: object) -> timedelta | None:
    # YAML reads a bare `off` as False.
    return None if value is False or value == "off" else positive_duration(value)


def whole_seconds(value: object) -> timedelta:
    """The kernel knows no smaller ones; 32767 s are its limit (tcp(7), TCP_KEEPIDLE)."""
    found = duration(value)
    if found % timedelta(seconds=1) or not 1 <= found.total_seconds() <= 32767:
        raise Mistake("must be whole seconds, from 1s to 32767s")
    return found


def count(low: int, high: int) -> Callable[[object], int]:
    def parse(value: object) -> int:
        try:
            found = int(str(value))
        except ValueError:
            raise Mistake("not a whole number") from None
        if isinstance(value, bool) or not low <= found <= high:
            raise Mistake(f"must be from {low} to {high}")
        return found

    return parse


port = count(1, 65535)


@dataclass(frozen=True)
class Listen:
    """An address of one of the agent's own servers; "" as host means all of IPv4 and IPv6."""

    host: str
    port: int


def listen(value: object) -> Listen | None:
    """`host:port`, `[v6]:port`, `:port`, or `off`."""
    found = "off" if value is False else text(value).strip()
    if found == "off":
        return None
    host, colon, number = found.rpartition(":")
    if not colon or ((":" in host) != (host.startswith("[") and host.endswith("]"))):
        raise Mistake("not an address; write host:port, [v6]:port, :port or off")
    return Listen(host.strip("[]"), count(0, 65535)(number))


def one_of(*known: str) -> Callable[[object], str]:
    def parse(value: object) -> str:
        # YAML reads a bare `off` as False.
        found = "off" if value is False else str(value)
        if found not in known:
            raise Mistake(f"unknown; write one of {', '.join(known)}")
        return found

    return parse


def port_or_off(value: object) -> int | None:
    return None if value is False or value == "off" else port(value)


def path(value: object) -> Path:
    return Path(words(value)).absolute()


def socket_path(value: object) -> Path:
    found = path(value)
    if len(str(found)) > SOCKET_PATH_LIMIT:
        raise Mistake(f"too long for a socket: at most {SOCKET_PATH_LIMIT} characters")
    return found


def file(value: object) -> Path | Literal:
    """A path; upstream's environment may hold the content itself."""
    return value if isinstance(value, Literal) else path(value)


def cgroup(value: object) -> Path:
    found = Path(words(value))
    if not found.is_absolute() or ".." in found.parts:
        raise Mistake("not an absolute path, for example /sys/fs/cgroup/kubepods.slice")
    return found


def https_address(value: object) -> str:
    """`https://host:port` or `host:port`; tokens are never sent in clear."""
    found = words(value)
    scheme, separator, rest = found.partition("://")
    if separator and scheme != "https":
        raise Mistake("only https is possible, tokens are never sent in clear")
    host, colon, number = (rest if separator else found).rpartition(":")
    if not separator and not colon:
        return found
    if colon and not number.endswith("]"):
        port(number)
    if (colon and not host) or "/" in found.removeprefix("https://"):
        raise Mistake("not an address; write https://host:port")
    return found


def roots(value: object) -> str:
    """A path, PEM text, or SYSTEM."""
    found = words(value)
    if found == "SYSTEM" or "-----BEGIN" in found:
        return found
    return str(Path(found).absolute())


def nameservers(value: object) -> tuple[str, ...]:
    """`ip` or `ip:port`, a list in the file, else joined by commas."""
    pieces = value if isinstance(value, list | tuple) else text(value).split(",")
    return tuple(_nameserver(text(piece).strip()) for piece in pieces)


def _nameserver(found: str) -> str:
    host, colon, number = found.rpartition(":")
    if found.count(":") == 1 or found.startswith("["):
        port(number)
    else:
        host, colon = found, ""
    try:
        address = ip_address(host.strip("[]") if colon else host)
    except ValueError:
        raise Mistake(f"{found!r} is no address; write ip or ip:port") from None
    if address.is_loopback:
        # Asked from inside the pod, where nobody is but the pod itself.
        raise Mistake(f"{found}: can't be asked from a pod; write an address the pods can reach")
    return found


def dns_domain(value: object) -> str:
    found = words(value).rstrip(".").lower()
    if not _DOMAIN.fullmatch(found):
        raise Mistake("not a domain, for example cluster.local")
    return found


def headers(value: object) -> dict[str, str]:
    """A mapping in the file, `name=value` in flags, those joined by commas in the environment."""
    if isinstance(value, Mapping):
        found = {str(name): text(content) for name, content in value.items()}
    else:
        pieces = value if isinstance(value, list | tuple) else text(value).split(",")
        found = {}
        for piece in pieces:
            name, equals, content = str(piece).partition("=")
            if not equals:
                raise Mistake(f"{piece!r} is no header; write name=value")
            found[name.strip()] = content.strip()
    for name in found:
        if not re.fullmatch(r"[A-Za-z0-9_.-]+", name):
            raise Mistake(f"{name!r} is no header name")
    return found


def metadata(value: object) -> dict[str, object]:
    """Like headers, but names are free and values in the file may be of any kind."""
    if isinstance(value, Mapping):
        return {str(name): content for name, content in value.items()}
    pieces = value if isinstance(value, list | tuple) else text(value).split(",")
    found: dict[str, object] = {}
    for piece in pieces:
        name, equals, content = str(piece).partition("=")
        if not equals or not name.strip():
            raise Mistake(f"{piece!r} is no metadata; write name=value")
        found[name.strip()] = content.strip()
    return found


def loopback(value: object) -> Listen | None:
    """`localhost:port` for both families, an address of the loopback with a port, or `off`."""
    found = listen(value)
    if found is None or found.host == "localhost":
        return found
    try:
        local = ip_address(found.host).is_loopback
    except ValueError:
        local = False
    if not local:
        raise Mistake("not on the loopback: whoever reaches it reads everything of the mesh")
    return found


# Of the data plane's access log, in its order (telemetry/access.rs); a contract test compares.
ACCESS_FIELDS = (
    *(f"src.{name}" for name in ("addr", "workload", "namespace", "identity", "cluster")),
    *("dst.addr", "dst.hbone_addr", "dst.service"),
    *(f"dst.{name}" for name in ("workload", "namespace", "identity", "cluster")),
    *("direction", "bytes_sent", "bytes_recv", "duration", "error", "policy", "outcome"),
)


def access_fields(value: object) -> tuple[str, ...]:
    """A list in the file, joined by commas elsewhere."""
    found = value if isinstance(value, list | tuple) else text(value).split(",")
    names = tuple(str(name).strip() for name in found if str(name).strip())
    for name in names:
        if name not in ACCESS_FIELDS:
            raise Mistake(f"{name!r} is no access log field; there are {', '.join(ACCESS_FIELDS)}")
    return names


def http_address(value: object) -> str:
    """`http://host:port`; nothing secret crosses it."""
    found = words(value)
    scheme, separator, rest = found.partition("://")
    host, colon, number = rest.rstrip("/").rpartition(":")
    if not separator or scheme != "http" or not host or not colon or "/" in rest.rstrip("/"):
        raise Mistake("not an address; write http://host:port")
    port(number)
    return found.rstrip("/")
