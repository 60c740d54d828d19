"""Questions to a node: to its agent's admin socket, or to the data plane when the agent is away."""

import asyncio
import http.client
import json
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

import click

from agent import told
from agent.cli.reach import Place, Unreachable, Where, connect, find, nobody

if TYPE_CHECKING:
    from agent.dataplane import Dataplane
    from proto.gen import control_pb2

# A dump of 100 k workloads takes the data plane seconds on a busy machine.
ANSWER_TIMEOUT = 60.0
_PIECE = 64 * 1024
DUMPS = ("workloads", "services", "policies")


@dataclass(frozen=True)
class Answer:
    """`data` is what the admin socket has or would have under /v1/<section>."""

    place: Place
    data: Any
    # False: the agent is away and the data plane answered.
    from_agent: bool

    def note(self) -> None:
        """Tells on stderr who answered, if it wasn't the agent."""
        if not self.from_agent:
            click.echo(
                f"The agent of {self.place.node} is away; its data plane still serves and answered."
                " Start the agent again: underpass agent …",
                err=True,
            )


def ask(sought: Where, section: str, query: Mapping[str, str] | None = None) -> Answer:
    """Raises Unreachable when neither answers, ClickException when the answer is an error."""
    place = find(sought)
    try:
        return Answer(place, _request(place, "GET", section, query or {}), from_agent=True)
    except _AgentAway:
        data = asyncio.run(_observe(place, section, query or {}))
        return Answer(place, data, from_agent=False)


def change(sought: Where, path: str, query: Mapping[str, str] | None = None) -> Any:
    """Asks the agent for a change; only it can. Raises Unreachable, ClickException."""
    place = find(sought)
    try:
        return _request(place, "POST", path, query or {})
    except _AgentAway as exc:
        raise Unreachable(
            f"the agent of {place.node} is away and only it can change this; start it again:"
            " underpass agent …"
        ) from exc


class Unknown(click.ClickException):
    """Whoever answered has no such thing."""


class _Sink:
    """Where pieces go. Its own failures mustn't look like the agent's."""

    def __init__(self, write: Callable[[bytes], object], before: bytes) -> None:
        self._write = write
        self._before = before
        self.error: OSError | None = None
        self.begun = False

    def put(self, piece: bytes) -> None:
        try:
            self._write(piece if self.begun else self._before + piece)
        except OSError as exc:
            self.error = exc
            raise
        self.begun = True


def stream(
    sought: Where, path: str, sink: Callable[[bytes], object], *, before: bytes = b""
) -> Answer:
    """Passes a long answer on as it comes, `before` ahead of its first piece. Raises Unknown
    before anything was passed on, Unreachable, ClickException."""
    place = find(sought)
    out = _Sink(sink, before)
    try:
        _request(place, "GET", path, {}, out)
        return Answer(place, None, from_agent=True)
    except _AgentAway:
        if out.begun:
            raise click.ClickException(
                f"the agent of {place.node} went away in the middle of {path}; ask again"
            ) from None
        asyncio.run(_observe_stream(place, path.rpartition("/")[2], out))
        return Answer(place, None, from_agent=False)


class _AgentAway(Exception):
    """Nobody listens on the admin socket."""


def _request(
    place: Place,
    method: str,
    path: str,
    query: Mapping[str, str],
    out: _Sink | None = None,
) -> Any:
    try:
        return _exchange(place, method, path, query, out)
    except OSError as exc:
        if out is not None and out.error is exc:
            raise
        raise _explained(place, exc) from exc


def _explained(place: Place, error: OSError) -> Exception:
    if isinstance(error, FileNotFoundError | ConnectionError):
        return _AgentAway()
    if isinstance(error, PermissionError):
        return Unreachable(f"{place.admin} may not be opened: run this as root")
    if isinstance(error, TimeoutError):
        return click.ClickException(
            f"the agent of {place.node} doesn't answer on {place.admin}: see its log"
        )
    return click.ClickException(f"{place.admin}: {error.strerror or error}")


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, place: Place) -> None:
        super().__init__("agent")
        self.place = place

    def connect(self) -> None:
        self.sock = connect(self.place.admin)
        self.sock.settimeout(ANSWER_TIMEOUT)


def _exchange(
    place: Place,
    method: str,
    path: str,
    query: Mapping[str, str],
    out: _Sink | None,
) -> Any:
    """The whole answer, or None when a good one was passed on."""
    connection = _UnixConnection(place)
    try:
        connection.request(method, f"/v1/{path}{'?' if query else ''}{urlencode(query)}")
        answer = connection.getresponse()
        if out is not None and answer.status == 200:
            while piece := answer.read1(_PIECE):
                out.put(piece)
            return None
        body = answer.read()
    except http.client.HTTPException as exc:
        raise ConnectionError(f"{place.admin}: {exc}") from exc
    finally:
        connection.close()
    try:
        data = json.loads(body or b"null")
    except ValueError:
        data = body.decode(errors="replace").strip()
    if out is not None and answer.status == 404:
        raise Unknown(f"the agent of {place.node} has no {path}")
    if answer.status != 200:
        text = data
        if isinstance(data, dict):
            text = "\n".join(filter(None, [data.get("error", str(data)), data.get("remedy")]))
        raise click.ClickException(
            f"the agent of {place.node} answered {answer.status} to {path}: {text}"
        )
    return data


async def _observe(place: Place, section: str, query: Mapping[str, str]) -> Any:
    async with _observer(place) as dataplane:
        return await _read(dataplane, section, query)


@asynccontextmanager
async def _observer(place: Place) -> "AsyncIterator[Dataplane]":
    """A connection to the data plane; its errors come out as the user's."""
    from agent.dataplane import Dataplane, DataplaneError

    try:
        dataplane = await Dataplane.connect(place.dataplane, role="observer")
        try:
            yield dataplane
        finally:
            await dataplane.close()
    except DataplaneError as exc:
        if exc.code == "LOST":
            text = nobody(place.folder.parent, [place.node])
            raise Unreachable(text) from exc
        raise click.ClickException(f"the data plane of {place.node}: {exc}") from exc


async def _observe_stream(place: Place, section: str, out: _Sink) -> None:
    from agent.dataplane import NotFound

    async with _observer(place) as dataplane:
        pieces: AsyncIterator[bytes] = dataplane.dump(section)
        try:
            out.put(await anext(pieces, b""))
        except NotFound as exc:
            raise Unknown(str(exc)) from exc
        async for piece in pieces:
            out.put(piece)


async def _read(dataplane: "Dataplane", section: str, query: Mapping[str, str]) -> Any:
    hello = dataplane.hello
    if section == "pods":
        return [pod_row(pod) for pod in await dataplane.list_pods()]
    if section == "connections":
        return [connection_row(row) async for row in dataplane.connections(query.get("pod", ""))]
    if section == "certificates":
        return [certificate_row(row) for row in hello.certificates]
    if section in told.SECTIONS:
        return await told.tell(dataplane, section, query)
    if section in DUMPS:
        return json.loads(b"".join([chunk async for chunk in dataplane.dump(section)]))
    if section == "log":
        # What was configured only the agent knows.
        levels = hello.config.log.filter or "info"
        return {"filter": levels, "configured": levels, "dataplane": True}
    if section != "status":
        raise click.ClickException(f"the agent is away, and only it can tell {section}")
    return {
        "node": hello.config.node,
        "ready": False,
        "pending": ["agent"],
        "capture": {"pins": hello.config.ebpf.folder},
        "dataplane": {
            "state": "draining" if hello.draining else "serving",
            "socket": str(dataplane.path),
            "pid": hello.pid,
            "instance_id": hello.instance_id,
            "build": hello.build,
            "cgroup": hello.cgroup,
        },
        "control_plane": {
            "types": {
                state.type_url: {
                    "processed": state.processed,
                    "rejected": dict(state.rejected),
                }
                for state in hello.types
            }
        },
        "certificates": _certificate_summary(hello.certificates),
        "pods": {"total": len(hello.pods)},
        "connections": {
            "inbound": sum(pod.inbound_connections for pod in hello.pods),
            "outbound": sum(pod.outbound_connections for pod in hello.pods),
        },
        "problems": [],
    }


def pod_row(status: "control_pb2.PodStatus") -> dict[str, Any]:
    """Rules can only be verified by an agent, so nothing is claimed of them."""
    states = type(status).State
    return {
        "uid": status.pod.uid,
        "name": status.pod.name,
        "namespace": status.pod.namespace,
        "service_account": status.pod.service_account,
        "netns": f"net:[{status.netns_inode}]",
        "state": states.Name(status.state).lower(),
        "verified": None,
        "identity": status.identity,
        "workload_uid": status.workload_uid,
        "inbound_connections": status.inbound_connections,
        "outbound_connections": status.outbound_connections,
    }


def connection_row(row: "control_pb2.Connection") -> dict[str, Any]:
    fields = {field.name: getattr(row, field.name) for field in row.DESCRIPTOR.fields}
    fields["direction"] = type(row).Direction.Name(row.direction).lower()
    return fields


def certificate_row(row: "control_pb2.CertificateStatus") -> dict[str, Any]:
    state = "Available" if row.not_after else "Unavailable" if row.error else "Initializing"
    return {
        "identity": row.identity,
        "state": state,
        "not_before": _time(row.not_before),
        "not_after": _time(row.not_after),
        "serial": row.serial,
        "last_error": row.error,
    }


def _certificate_summary(found: Iterable["control_pb2.CertificateStatus"]) -> dict[str, Any]:
    rows = list(found)
    ends = [row.not_after for row in rows if row.not_after]
    return {
        "available": len(ends),
        "total": len(rows),
        "next_expiry": _time(min(ends, default=0)),
    }


def _time(seconds: int) -> str | None:
    return datetime.fromtimestamp(seconds, UTC).isoformat() if seconds else None
