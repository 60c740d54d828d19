"""`underpass status`: one screen of what works, what doesn't, and what to do about it.

Exits with 1 when something is wrong, for scripts. The answer is an agent.status.NodeStatus.
"""

import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import click

from agent.cli import show
from agent.cli.ask import ask
from agent.cli.reach import Where, where

AGENT_AWAY = {
    "what": "the agent is away",
    "why": "Its data plane still serves with what it last knew; nothing new is learnt, and rules"
    " aren't watched.",
    "remedy": "start the agent again: underpass agent …; its log tells why it ended",
}


@click.command()
@where
@show.output
@click.pass_obj
def status(sought: Where | None, output: str) -> None:
    """One screen: capture, control plane, certificates, pods, connections, what is wrong and what
    to do. Exits with 1 when something is wrong."""
    answer = ask(sought or Where(), "status")
    if output in ("json", "yaml"):
        answer.note()
        show.data(answer.data, output)
    else:
        screen(answer.data, from_agent=answer.from_agent)
    sys.exit(1 if is_wrong(answer.data) or not answer.from_agent else 0)


def is_wrong(found: dict[str, Any]) -> bool:
    return bool(found.get("problems")) or not found.get("ready")


def screen(found: dict[str, Any], *, from_agent: bool) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for title, text in _lines(found, from_agent=from_agent):
        table.add_row(title, Text(text))
    headline = Text(_headline(found, from_agent=from_agent), style="bold")
    problems = list(found.get("problems") or [])
    if not from_agent:
        problems.append(AGENT_AWAY)
    if problems:
        what = [_problem(problem) for problem in problems]
    elif found.get("ready"):
        what = [Text("Nothing is wrong.", style="green")]
    else:
        what = [Text("Nothing is wrong so far; run this again in a moment.", style="yellow")]
    show.paint(headline, table, "", *what)


def _problem(problem: dict[str, str]) -> Any:
    """What in red, then why, then the remedy behind an arrow."""
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 1, 0, 0))
    grid.add_row("✗", Text(problem["what"], style="red"))
    if problem.get("why"):
        grid.add_row("", Text(problem["why"]))
    if problem.get("remedy"):
        grid.add_row("→", Text(problem["remedy"]))
    return grid


def _headline(found: dict[str, Any], *, from_agent: bool) -> str:
    node = found.get("node") or "(node not configured)"
    if not from_agent:
        return f"Node {node}: agent away, data plane serving"
    if found.get("ready"):
        state = "ready"
    else:
        state = f"NOT READY, waiting for {show.joined(found.get('pending'))}"
    return f"Node {node}: {state}"


def _lines(found: dict[str, Any], *, from_agent: bool) -> Iterator[tuple[str, str]]:
    if from_agent:
        yield "Agent", _agent(found)
        yield "Capture", _capture(found.get("capture") or {})
    yield "Data plane", _dataplane(found.get("dataplane") or {})
    if from_agent:
        yield "Control plane", _control_plane(found.get("control_plane") or {})
    for name, reasons in _rejected(found.get("control_plane") or {}):
        yield "", f"rejected {name}: {reasons}"
    yield "Certificates", _certificates(found.get("certificates") or {})
    external = (found.get("capture") or {}).get("mode") == "external"
    yield "Pods", _pods(found.get("pods") or {}, from_agent=from_agent, external=external)
    connections = found.get("connections") or {}
    yield (
        "Connections",
        f"{connections.get('inbound', 0)} inbound, {connections.get('outbound', 0)} outbound",
    )


def _agent(found: dict[str, Any]) -> str:
    return f"pid {found.get('pid', '?')}, up {_ago(found.get('started'))}, {found.get('version')}"


def _capture(found: dict[str, Any]) -> str:
    text = str(found.get("mode", "unknown"))
    if found.get("reason"):
        text += f": {found['reason']}"
    return "\n".join([text, *(f"note: {note}" for note in found.get("notes") or [])])


def _dataplane(found: dict[str, Any]) -> str:
    parts = [str(found.get("state", "unknown"))]
    if found.get("pid"):
        parts.append(f"pid {found['pid']}")
    if found.get("since"):
        parts.append(f"since {_ago(found['since'])}")
    if found.get("restarts"):
        parts.append(
            f"started again {found['restarts']} times"
            f" ({found.get('seconds_without_service', 0):.1f} s without service)"
        )
    if found.get("draining"):
        parts.append(f"draining: pid {show.joined(found['draining'])}")
    if found.get("error"):
        parts.append(str(found["error"]))
    return ", ".join(parts)


def _control_plane(found: dict[str, Any]) -> str:
    source = found.get("source") or "none"
    text = f"connected to {source}" if found.get("connected") else f"NOT connected to {source}"
    if found.get("since"):
        text += f" for {_ago(found['since'])}"
    if found.get("last_push"):
        text += f", last push {_ago(found['last_push'])} ago"
    return f"{text}: {found['last_error']}" if found.get("last_error") else text


def _rejected(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for entry in (found.get("types") or {}).values():
        yield from sorted((entry.get("rejected") or {}).items())


def _certificates(found: dict[str, Any]) -> str:
    total = found.get("total", 0)
    if not total:
        return "none needed yet"
    text = f"{found.get('available', 0)} of {total} available"
    if found.get("next_expiry"):
        left = -_age(found["next_expiry"])
        text += f", next expires in {show.span(left)}" if left > 0 else ", one has EXPIRED"
    return text


def _pods(found: dict[str, Any], *, from_agent: bool, external: bool) -> str:
    total = found.get("total", 0)
    if not from_agent:
        return f"{total} served; whether they are captured only an agent can tell"
    text = f"{found.get('captured', 0)} of {total} captured, {found.get('verified', 0)} verified"
    if external:
        text = f"{found.get('served', 0)} of {total} served"
    elif older := found.get("precapture_connections"):
        text += (
            f", {found.get('enforced', 0)} enforced ({older} connections are older than capture)"
        )
    elif found.get("captured"):
        text += f", {found.get('enforced', 0)} enforced"
    if found.get("proved"):
        text += f", {found['proved']} proved"
    if found.get("failed"):
        text += f", {found['failed']} FAILED"
    return f"{text} ({found['source']})" if found.get("source") else text


def _ago(time: str | None) -> str:
    return show.span(max(0.0, _age(time))) if time else "?"


def _age(time: str) -> float:
    return (datetime.now(UTC) - datetime.fromisoformat(time)).total_seconds()
