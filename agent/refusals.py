"""What the data plane's control socket answers when it doesn't do what it was asked."""

from agent.errors import AgentError
from proto.gen import control_pb2


class DataplaneError(AgentError):
    """The data plane refused a request, or can't be asked."""

    code: str = "INTERNAL"

    def __init__(self, text: str, *, subject: str = "", code: str = "") -> None:
        self.subject = subject
        self.code = code or type(self).code
        super().__init__(f"{subject}: {text}" if subject and subject not in text else text)


class DataplaneLost(DataplaneError):
    """Nobody answers on the control socket, or the connection ended. Retryable."""

    code = "LOST"
    retryable = True
    remedy = "the agent connects again by itself; see the data plane's log if it doesn't come back"


class NobodyListens(DataplaneLost):
    """The socket isn't there, or its process is gone."""


class DataplaneSilent(DataplaneError):
    """A request wasn't answered in time though the connection stands."""

    code = "TIMEOUT"
    retryable = True
    remedy = "look at the data plane's log and CPU; end it if it hangs, it is started again"


class InvalidRequest(DataplaneError):
    code = "INVALID"


class NotFound(DataplaneError):
    code = "NOT_FOUND"


class AgentRoleTaken(DataplaneError):
    """Another agent is connected to this data plane."""

    code = "IN_USE"
    retryable = True
    remedy = "stop the other agent, or give this one a data plane of its own"


class InUse(DataplaneError):
    """A port in the pod is held by somebody else."""

    code = "IN_USE"
    retryable = True
    remedy = "find who holds it (`ss -ltnp` in the pod's namespace) and stop it"


class PermissionMissing(DataplaneError):
    code = "PERMISSION"
    remedy = "the data plane needs CAP_NET_ADMIN, CAP_NET_RAW and CAP_SYS_ADMIN (setns)"


class VersionMismatch(DataplaneError):
    code = "VERSION"
    remedy = "install agent and data plane of the same release; restart the older one"


class NetnsGone(DataplaneError):
    code = "NETNS_GONE"


class DataplaneInternal(DataplaneError):
    code = "INTERNAL"
    retryable = True


class Draining(DataplaneError):
    code = "DRAINING"
    retryable = True


BY_CODE: dict[int, type[DataplaneError]] = {
    control_pb2.Error.INVALID: InvalidRequest,
    control_pb2.Error.NOT_FOUND: NotFound,
    control_pb2.Error.IN_USE: InUse,
    control_pb2.Error.PERMISSION: PermissionMissing,
    control_pb2.Error.VERSION: VersionMismatch,
    control_pb2.Error.NETNS_GONE: NetnsGone,
    control_pb2.Error.INTERNAL: DataplaneInternal,
    control_pb2.Error.DRAINING: Draining,
}


def checked(reply: control_pb2.Reply) -> control_pb2.Reply:
    """Raises the refusal that it is."""
    if reply.WhichOneof("body") != "error":
        return reply
    error = reply.error
    kind = BY_CODE.get(error.code, DataplaneError)
    raise kind(error.text or kind.code, subject=error.subject)
