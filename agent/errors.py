"""The agent's exceptions: the type decides on retry, the text names pod, file or field."""


class AgentError(Exception):
    """Anything the agent reports to an operator. `remedy` says what a person can do, or is ""."""

    retryable: bool = False
    remedy: str = ""


class Mistake(ValueError):
    """What is wrong with one value; the place is added by whoever read it."""


class ConfigErrors(AgentError):
    """Every mistake found in flags, environment and file, together. The CLI exits 64 on it."""

    def __init__(self, mistakes: list[str]) -> None:
        self.mistakes = mistakes
        super().__init__("\n".join(mistakes))


class PodError(AgentError):
    """One pod can't be brought to its wanted state."""


class NetnsMissing(PodError):
    """The pod's network namespace doesn't exist (yet, or any more)."""

    retryable = True
    remedy = "check `netns` or `pid` of this pod in the pod list; it is looked for again by itself"


class NetnsRefused(PodError):
    """What the pod list names is not a pod's network namespace."""

    remedy = "name the pod's own network namespace, for example /run/netns/NAME"


class NetnsTaken(PodError):
    """Two pods of the list have one network namespace; the former may be about to leave it."""

    retryable = True
    remedy = "take one of the two out of the pod list; a pod that leaves makes room by itself"


class NodeClaimed(AgentError):
    """Another living agent works for this node."""

    remedy = "stop that agent, or choose another --node or --run-dir"


class PortInUse(AgentError):
    """An address of the agent's own HTTP servers can't be had."""

    remedy = "choose another address for it, or `off` (--admin-, --stats-, --ready-address)"


class CaptureUnusable(AgentError):
    """Traffic can't be redirected on this node in the way that is configured."""

    remedy = "repair it, or choose another way; --capture none redirects nothing"


class BadLogFilter(AgentError):
    """A log directive can't be read; nothing was changed."""

    remedy = "for example underpass=debug"


class SupervisorError(AgentError):
    """The data plane can't be started, adopted or replaced."""


class ReplaceRefused(SupervisorError):
    """The data plane was not replaced; the old one goes on as before."""
