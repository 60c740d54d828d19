"""What is wrong, why, and what to do: pure functions of what the parts tell."""

from datetime import datetime, timedelta

from agent.errors import AgentError
from agent.identity.supply import SupplyTrouble
from agent.identity.trust import TrustStatus
from agent.status import (
    CaptureView,
    CertificateView,
    ControlPlaneView,
    DataplaneView,
    PodView,
    Problem,
)


def dataplane_problems(view: DataplaneView, silence: AgentError | None = None) -> list[Problem]:
    """`silence`: why it told nothing although it is connected."""
    if view.instance_id and silence is not None:
        return [Problem("the data plane doesn't answer", str(silence), silence.remedy)]
    if view.instance_id and not view.cgroup:
        return [
            Problem(
                "the data plane has no cgroup of its own",
                "only its mark exempts it from capture, which any process with NET_RAW can set",
                "mount cgroup2 and start it with --cgroup (the agent does with cgroup-parent auto)",
            )
        ]
    if view.instance_id:
        return []
    if not view.error:
        return [Problem("data plane", "it is being started", "")]
    remedy = view.remedy or (
        "look at its log above; the agent starts it again by itself"
        if view.owned
        else "start it; the agent connects again by itself"
    )
    return [
        Problem("data plane is away: captured pods' connections are refused", view.error, remedy)
    ]


def control_plane_problems(view: ControlPlaneView, *, synced: bool) -> list[Problem]:
    problems = []
    if not view.connected or view.last_error:
        effect = (
            "the last known state serves on" if synced else "no pod is captured before it answers"
        )
        problems.append(
            Problem(
                f"control plane {view.source}",
                f"{view.last_error or 'not connected yet'}; {effect}",
                "check its address, roots and token, and that it runs",
            )
        )
    for type_url, state in view.types.items():
        for name, reason in state.rejected.items():
            problems.append(
                Problem(
                    f"{type_url.rpartition('.')[2]} {name} was rejected",
                    reason,
                    "correct it at its source; its last good version holds, without one it denies",
                )
            )
    return problems


def capture_problems(view: CaptureView, rules_error: str) -> list[Problem]:
    problems = [Problem("capture", note, "") for note in view.notes]
    if view.mode == "none":
        problems.append(
            Problem("capture", "no pod's traffic is redirected", "start with --capture auto")
        )
    if rules_error:
        problems.append(
            Problem("redirection not up to date", rules_error, "the agent goes on trying")
        )
    return problems


def pod_problems(pods: list[PodView]) -> list[Problem]:
    return [
        Problem(f"pod {pod.namespace}/{pod.name}", pod.problem, pod.remedy)
        for pod in pods
        if pod.problem
    ]


def supply_problems(trouble: SupplyTrouble | None) -> list[Problem]:
    if trouble is None:
        return []
    title = f"{trouble.who} supplies no certificates: the valid ones serve on until they expire"
    return [Problem(title, trouble.cause, trouble.remedy or "the agent goes on trying")]


def certificate_problems(
    certificates: list[CertificateView],
    now: datetime,
    remedy: str = "check the certificate authority",
) -> list[Problem]:
    """`remedy`: what helps when one identity gets none."""
    problems = []
    for entry in certificates:
        if entry.state == "Unavailable" or (entry.last_error and not entry.not_after):
            problems.append(
                Problem(
                    f"no certificate for {entry.identity}: its connections are refused",
                    entry.last_error,
                    remedy,
                )
            )
        elif entry.not_after is not None and entry.last_error:
            # It serves on, but at half its life: whoever looks now has the other half for repair.
            left = entry.not_after - now
            form = "%H:%M" if left < timedelta(hours=12) else "%Y-%m-%d %H:%M"
            problems.append(
                Problem(
                    f"the certificate of {entry.identity} isn't renewed, "
                    f"it serves until {entry.not_after:{form}} UTC",
                    entry.last_error,
                    f"{remedy}; the agent goes on trying",
                )
            )
    return problems


def trust_problems(trust: TrustStatus | None) -> list[Problem]:
    problems = []
    if trust is not None and trust.crl_error:
        since = "" if trust.crl_since is None else ": the one before stays in force"
        problems.append(
            Problem(
                f"the CRL isn't in force{since}",
                trust.crl_error,
                "put a readable one there, PEM or DER; it is looked for again by itself",
            )
        )
    if trust is not None and trust.error:
        problems.append(
            Problem(
                "the data plane doesn't take what peers are judged by",
                trust.error,
                "correct trust.aliases, or the roots that the CA hands out",
            )
        )
    return problems
