"""Commands that list what a node knows: `pods`, `workloads`, `services`, and the like."""

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

import click

from agent.cli import show
from agent.cli.ask import ask
from agent.cli.reach import Where, where
from agent.cli.show import Column, Row


def _lister(name: str, columns: Sequence[Column], empty: str, help: str) -> click.Command:
    @click.command(name, help=help)
    @where
    @show.output
    @click.pass_obj
    def command(sought: Where | None, output: str) -> None:
        answer = ask(sought or Where(), name)
        answer.note()
        show.rows(answer.data, columns, output, empty)

    return command


def field(name: str) -> Callable[[Row], str]:
    def text(row: Row) -> str:
        value = row.get(name)
        return "-" if value is None or value == "" else str(value)

    return text


def qualified(row: Row) -> str:
    return f"{row.get('namespace', '')}/{row.get('name', '')}"


def _verified(row: Row) -> str:
    if row.get("state") == "served":
        # Somebody else's rules: only their owner can tell.
        return "-"
    return {True: "yes", False: "NO", None: "unknown"}[row.get("verified")]


def _proved(row: Row) -> str:
    """Of a row without it, nobody here could tell."""
    known = {"proved": "yes", "not proved": "NO", "": "-"}
    return known.get(row.get("proof", "unknown"), "unknown")


def _problem(row: Row) -> str:
    parts = [row.get("problem"), row.get("remedy")]
    if not any(parts):
        parts = [row.get("proof_reason")]
    return "; ".join(part for part in parts if part)


def _capture(row: Row) -> str:
    """In brackets: a way that its older connections still go, and whether others send through the
    pod past the mesh."""
    former = "".join(f" (+{name})" for name in row.get("former_captures") or [])
    partly = " (partly)" if row.get("forwards") else ""
    return f"{row.get('capture') or '-'}{former}{partly}"


def _older(row: Row) -> str:
    named = row.get("precapture_named") or []
    more = (row.get("precapture_connections") or 0) - len(named)
    return show.joined([*named, f"and {more} more"] if more > 0 else named)


def _account(identity: str) -> str:
    """`namespace/account` of a SPIFFE id, which is what tells identities of one mesh apart."""
    parts = identity.split("/")
    if len(parts) == 7 and parts[3] == "ns" and parts[5] == "sa":
        return f"{parts[4]}/{parts[6]}"
    return identity or "-"


def _identity(row: Row) -> str:
    return _account(row.get("identity") or "")


def _count(name: str) -> Callable[[Row], str]:
    return lambda row: str(row.get(name, 0))


pods = _lister(
    "pods",
    [
        Column("POD", qualified),
        Column("STATE", field("state")),
        Column("CAPTURE", _capture),
        Column("VERIFIED", _verified, wide=True),
        Column("PROVED", _proved),
        Column("IDENTITY", _identity),
        Column("IN", _count("inbound_connections"), right=True),
        Column("OUT", _count("outbound_connections"), right=True),
        Column("OLDER", field("precapture_connections"), right=True),
        Column("PROBLEM", _problem),
        Column("UID", field("uid"), wide=True),
        Column("LAST PROVED", field("proof_at"), wide=True),
        Column("NOTES", lambda row: show.joined(row.get("notes")), wide=True),
        Column("REPAIRS", _count("repairs"), wide=True, right=True),
        Column("UDP REFUSED", _count("udp_refused"), wide=True, right=True),
        Column("UDP FLOWS", _count("udp_unprotected"), wide=True, right=True),
        Column("RAW SOCKETS", _count("raw_sockets"), wide=True, right=True),
        Column("NETNS", field("netns"), wide=True),
        Column("OLDER THAN CAPTURE", _older, wide=True),
    ],
    "No pods are known to this node's agent. Check the list it was given by --pods.",
    "Pods of this node: captured and proved so, or why not.",
)


# ---- what the control plane told: shapes of facts ztunnel 13.1


def plain(address: str) -> str:
    """`network/ip` without the nameless network's slash."""
    return address.removeprefix("/")


def waypoint(row: Row) -> str:
    destination = (row.get("waypoint") or {}).get("destination")
    return plain(destination) if destination else "-"


workloads = _lister(
    "workloads",
    [
        Column("WORKLOAD", qualified),
        Column("ADDRESSES", lambda row: show.joined(row.get("workloadIps"))),
        Column("PROTOCOL", field("protocol")),
        Column("STATUS", field("status")),
        Column("NODE", field("node")),
        Column("WAYPOINT", waypoint),
        Column("ACCOUNT", field("serviceAccount"), wide=True),
        Column("POLICIES", lambda row: show.joined(row.get("authorizationPolicies")), wide=True),
        Column("SERVICES", lambda row: show.joined(row.get("services")), wide=True),
        Column("UID", field("uid"), wide=True),
    ],
    "No workloads yet: the control plane sent none. See `underpass status`.",
    "Workloads this node knows.",
)


# ---- identities and connections


def _state(row: Row) -> str:
    return str(row.get("state", "-")).partition(":")[0]


def _leaf(row: Row) -> dict[str, Any]:
    chain = row.get("certChain") or [{}]
    leaf: dict[str, Any] = chain[0]
    return leaf


def _expires(row: Row) -> str:
    text = row.get("not_after") or _leaf(row).get("expirationTime")
    if not text:
        return "-"
    left = (datetime.fromisoformat(text) - datetime.now(UTC)).total_seconds()
    return f"in {show.span(left)}" if left > 0 else f"EXPIRED {show.span(-left)} ago"


def _serial(row: Row) -> str:
    return str(row.get("serial") or _leaf(row).get("serialNumber") or "-")


def _certificate_error(row: Row) -> str:
    error = row.get("last_error")
    return str(error or str(row.get("state", "")).partition(": ")[2] or "-")


certificates = _lister(
    "certificates",
    [
        Column("IDENTITY", field("identity")),
        Column("STATE", _state),
        Column("EXPIRES", _expires),
        Column("ERROR", _certificate_error),
        Column("SERIAL", _serial, wide=True),
    ],
    "No certificates: no pod of this node needs one yet.",
    "Certificates of this node's identities.",
)


def end(workload: str, address: str) -> Callable[[Row], str]:
    """The best name there is for one end of a connection."""

    def text(row: Row) -> str:
        name = row.get(workload)
        where = row.get(address) or "-"
        return f"{name} {where}" if name else str(where)

    return text


CONNECTIONS = [
    Column("DIRECTION", field("direction")),
    Column("SOURCE", end("src_workload", "src")),
    Column("DESTINATION", end("dst_workload", "original_dst")),
    Column("BY", field("protocol")),
    Column("AGE", lambda row: show.span(row.get("age_ms", 0) / 1000), right=True),
    Column("SENT", lambda row: show.size(row.get("bytes_sent", 0)), right=True),
    Column("RECEIVED", lambda row: show.size(row.get("bytes_received", 0)), right=True),
    Column("FROM IDENTITY", lambda row: _account(row.get("src_identity") or ""), wide=True),
    Column("TO IDENTITY", lambda row: _account(row.get("dst_identity") or ""), wide=True),
    Column("SERVICE", field("dst_service"), wide=True),
    Column("NEXT HOP", field("actual_dst"), wide=True),
    Column("POD", field("pod_uid"), wide=True),
]
