"""`underpass trace`: what happens to pods' packets and connections in the kernel, as it happens."""

import asyncio
import json
from collections.abc import Callable
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import click

from agent.cli import show
from agent.cli.ask import ask
from agent.cli.pods import one_pod, pod_option
from agent.cli.reach import Where, where
from agent.cli.show import Row

if TYPE_CHECKING:
    from agent.trace.node import Node
    from agent.trace.views import View, Wanted
    from redirect.netns import NetnsThread

_F = TypeVar("_F", bound=Callable[..., Any])

# A histogram's longest bar.
_BAR = 40


@click.group()
def trace() -> None:
    """Watch pods live, in the kernel: needs root, and Debian's python3-bpfcc and kernel headers.

    Each ends with Ctrl-C or after --duration.
    """


def _options(command: _F) -> _F:
    for option in (
        click.option(
            "-o",
            "--output",
            type=click.Choice(["table", "json"]),
            default="table",
            show_default=True,
            help="json is one object a line.",
        ),
        where,
        click.option(
            "--duration", type=click.FloatRange(min=0.1), help="End after so many seconds."
        ),
        click.option("--all", "every", is_flag=True, help="Also the data plane's own sockets."),
        click.option(
            "--port", type=click.IntRange(1, 65535), help="Only this port, at either end."
        ),
        click.option("--namespace", metavar="NAME", help="Only this one's pods."),
        pod_option,
    ):
        command = option(command)
    return command


def _noun(name: str, view: str, line: Callable[[Row], str], text: str) -> None:
    @trace.command(name, help=text)
    @_options
    @click.pass_obj
    def command(
        sought: Where | None,
        pod: str | None,
        namespace: str | None,
        port: int | None,
        every: bool,
        duration: float | None,
        output: str,
    ) -> None:
        from agent.trace import views
        from agent.trace.node import Choice, Node

        place = sought or Where()
        node = Node(
            lambda section: ask(place, section).data,
            Choice(one_pod(place, pod) if pod else None, namespace),
        )
        node.refresh()
        if not node.pods and (pod or namespace):
            named = f"pod {pod}" if pod else f"namespace {namespace}"
            raise click.ClickException(
                f"no network namespace of {named} is on this node: see `underpass pods`"
            )
        node.learn_ports()
        kind = getattr(views, view)
        wanted = views.Wanted(port, every)
        asyncio.run(_run(node, kind, wanted, partial(_print, line, output), duration))


async def _run(
    node: "Node",
    kind: "Callable[[Node, NetnsThread, Wanted], View]",
    wanted: "Wanted",
    tell: Callable[[Row], None],
    duration: float | None,
) -> None:
    from agent.trace.session import Session
    from agent.trace.tracer import TraceError
    from redirect.netns import NetnsThread

    visitor = NetnsThread()
    try:
        view = kind(node, visitor, wanted)
        await Session(node, view, tell, partial(click.echo, err=True)).run(duration)
    except TraceError as exc:
        raise click.ClickException(str(exc)) from exc
    finally:
        await visitor.close()


def _print(line: Callable[[Row], str], output: str, row: Row) -> None:
    click.echo(json.dumps(row, ensure_ascii=False) if output == "json" else line(row))


def _begin(row: Row) -> list[str]:
    moment = datetime.fromisoformat(row["time"])
    return [f"{moment:%H:%M:%S}.{moment.microsecond // 1000:03}Z", f"{row['event']:9}", row["pod"]]


def _connection(row: Row) -> str:
    parts = [*_begin(row), f"{row['direction']:8}", f"{row['source']} → {row['destination']}"]
    if row["by"] == "underpass":
        parts.append("by underpass")
    elif row["captured"] is None:
        parts.append("capture not known")
    else:
        parts.append(f"captured by {row['via']}" if row["captured"] else "not captured")
    if row["event"] in ("open", "closed"):
        sent, received = row["sent"] or 0, row["received"] or 0
        parts.append(f"sent {show.size(sent)}, received {show.size(received)}")
    if row["duration_ms"] is not None:
        parts.append(f"after {row['duration_ms'] / 1000:.3f} s")
    return "  ".join(parts + _process(row))


def _latency(row: Row) -> str:
    if row["event"] == "summary":
        return _summary(row)
    by = ["by underpass"] if row["by"] == "underpass" else []
    ends = f"{row['source']} → {row['destination']}"
    return "  ".join([*_begin(row), ends, f"in {_took(row['latency_us'])}", *by])


def _summary(row: Row) -> str:
    what = {"outbound": "connections made", "inbound": "connections accepted"}[row["direction"]]
    by = " by underpass" if row["by"] == "underpass" else ""
    lines = [
        f"\n{row['pod']}: {row['count']} {what}{by},"
        f" half within {_took(row['p50_us'])}, 90 % within {_took(row['p90_us'])},"
        f" 99 % within {_took(row['p99_us'])}, longest {_took(row['max_us'])}"
    ]
    most = max(bucket["count"] for bucket in row["histogram"])
    for bucket in row["histogram"]:
        reach = f"{_took(bucket['from_us']):>8} to {_took(bucket['to_us']):>8}"
        bar = "#" * -(-bucket["count"] * _BAR // most)
        lines.append(f"  {reach} {bucket['count']:8}  {bar}".rstrip())
    return "\n".join(lines)


def _dns(row: Row) -> str:
    parts = [*_begin(row), f"{row['name']} {row['type']}"]
    if row["code"]:
        answer = row["code"] if row["code"] != "NOERROR" else show.joined(row["addresses"])
        parts += [f"→ {answer}", f"in {_took(row['latency_us'])}"]
    parts.append(f"{row['client']} asked {row['server']}")
    if row["by"] == "underpass":
        parts.append("relayed by underpass")
    elif row["direction"] == "outbound":
        parts.append("captured" if row["captured"] else "not captured")
    return "  ".join(parts + _process(row))


def _drop(row: Row) -> str:
    number = "" if row["number"] is None else f" ({row['number']})"
    parts = [*_begin(row), f"{row['reason']}{number}"]
    if "source" not in row:
        return "  ".join([*parts, f"{row['count']} packets, by underpass's own rule"])
    ends = " → ".join(filter(None, (row["source"], row["destination"])))
    parts.append(f"{row['protocol']} {ends}")
    if row["event"] == "refused":
        return "  ".join([*parts, f"by underpass: {row['text']}", *_process(row)])
    parts += [row["flags"]] if row["flags"] else []
    return "  ".join([*parts, f"{row['length']} bytes", f"in {row['where']}"])


def _process(row: Row) -> list[str]:
    """Its own choice of name, which goes to a terminal."""
    name = "".join(char if char.isprintable() else "?" for char in row["process"])
    return [f"{name}[{row['pid']}]"] if name else []


def _took(microseconds: int) -> str:
    if microseconds < 1000:
        return f"{microseconds} µs"
    if microseconds < 1_000_000:
        return f"{microseconds / 1000:.1f} ms"
    return f"{microseconds / 1_000_000:.1f} s"


_noun(
    "connections",
    "ConnectionsView",
    _connection,
    "TCP connections of pods: those already open, then what opens, closes and fails, with bytes and"
    " whether the data plane took them.",
)
_noun(
    "drops",
    "DropsView",
    _drop,
    "Packets of pods that the kernel drops, with its reason, and what our own rules and programs"
    " refuse.",
)
_noun(
    "dns",
    "DnsView",
    _dns,
    "Names that pods ask for over UDP, the answers, and how long they took.",
)
_noun(
    "latency",
    "LatencyView",
    _latency,
    "How long TCP connections of pods take to be made; at the end a histogram.",
)
