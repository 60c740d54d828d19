"""What the data plane tells of its decisions, in the shape of the admin socket's JSON."""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agent.dataplane import Dataplane
    from proto.gen import control_pb2

SECTIONS = ("explain", "verdicts", "policy-hits")


async def tell(dataplane: "Dataplane", section: str, query: Mapping[str, str]) -> Any:
    """`explain?source=…&destination=…`, `verdicts?pod=UID&limit=N`, `policy-hits`.

    Raises DataplaneError; InvalidRequest also for a limit that is no number.
    """
    if section == "explain":
        source, destination = query.get("source", ""), query.get("destination", "")
        return explanation(await dataplane.explain(source, destination))
    if section == "verdicts":
        reply = await dataplane.verdicts(query.get("pod", ""), limit=_number(query.get("limit")))
        return {"verdicts": [verdict(row) for row in reply.verdicts], "lost": reply.lost}
    return [policy_hits(row) for row in await dataplane.policy_hits()]


def explanation(reply: "control_pb2.ExplainReply") -> dict[str, Any]:
    return {
        "allowed": reply.allowed,
        "verdict": reply.verdict,
        "remedy": reply.remedy,
        "steps": [
            {
                "name": step.name,
                "outcome": type(step).Outcome.Name(step.outcome).lower(),
                "subject": step.subject,
                "text": step.text,
            }
            for step in reply.steps
        ],
    }


def verdict(row: "control_pb2.Verdict") -> dict[str, Any]:
    from proto.gen import control_pb2

    fields = {field.name: getattr(row, field.name) for field in row.DESCRIPTOR.fields}
    fields["direction"] = control_pb2.Connection.Direction.Name(row.direction).lower()
    fields["rule"] = row.rule if row.rule >= 0 else None
    fields["time"] = _time(fields.pop("time_ms"))
    return fields


def policy_hits(row: "control_pb2.PolicyHits") -> dict[str, Any]:
    return {
        "name": row.name,
        "decided": row.decided,
        "dryRun": row.dry_run,
        "last": _time(row.last_ms),
    }


def _number(text: str | None) -> int:
    from agent.dataplane import InvalidRequest

    if not text:
        return 0
    if not text.isdecimal() or int(text) >= 1 << 32:
        raise InvalidRequest(f"`{text}` is no number of verdicts", subject="limit")
    return int(text)


def _time(milliseconds: int) -> str | None:
    if not milliseconds:
        return None
    return datetime.fromtimestamp(milliseconds / 1000, UTC).isoformat(timespec="milliseconds")
