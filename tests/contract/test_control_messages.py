"""Every message of control.proto is sent or read by the agent, or named here with its reason."""

import inspect

from agent import calls, dataplane, refusals
from agent.dataplane import Dataplane
from proto.gen import control_pb2

# Between two data planes; the agent only starts it with TakeListeners.
SUCCESSOR_REQUESTS = {"hand_over", "hand_over_done"}
SUCCESSOR_REPLIES = {"listeners"}


def bodies(message: type) -> set[str]:
    return {field.name for field in message.DESCRIPTOR.oneofs_by_name["body"].fields}  # type: ignore[attr-defined]


def test_every_request_has_a_method_that_sends_it() -> None:
    source = inspect.getsource(Dataplane)
    sent = {kind for kind in bodies(control_pb2.Request) if f'"{kind}"' in source}
    assert sent == bodies(control_pb2.Request) - SUCCESSOR_REQUESTS


def test_every_reply_is_read() -> None:
    source = "".join(map(inspect.getsource, (dataplane, calls, refusals)))
    read = {
        kind
        for kind in bodies(control_pb2.Reply)
        if f"reply.{kind}" in source or f'"{kind}"' in source
    } | {kind for kind in bodies(control_pb2.Reply) if f")).{kind}" in source}
    assert read == bodies(control_pb2.Reply) - SUCCESSOR_REPLIES


def test_every_error_code_has_its_exception() -> None:
    codes = set(control_pb2.Error.Code.values()) - {control_pb2.Error.UNSPECIFIED}
    assert set(refusals.BY_CODE) == codes
    for code, kind in refusals.BY_CODE.items():
        assert kind.code == control_pb2.Error.Code.Name(code)
