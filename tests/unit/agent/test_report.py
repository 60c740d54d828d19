"""What the report makes of what the agent and the data plane say of one pod."""

import pytest

from agent.report import _doubted
from agent.status import PodView
from proto.gen import control_pb2

VIEW = PodView("u", "a", "shop", "sa", "/x", "captured", captured=True, verified=True)
States = control_pb2.PodStatus


def test_pod_that_the_data_plane_serves_is_believed() -> None:
    assert _doubted(VIEW, control_pb2.PodStatus(state=States.UP)) is VIEW


@pytest.mark.parametrize(
    ("status", "found"),
    [
        (None, "doesn't know it"),
        (control_pb2.PodStatus(state=States.PREPARED), "has it as prepared"),
        (control_pb2.PodStatus(state=States.DRAINING), "has it as draining"),
    ],
)
def test_pod_whose_rules_lead_to_nobody_is_not_called_verified(
    status: control_pb2.PodStatus | None, found: str
) -> None:
    view = _doubted(VIEW, status)
    assert not view.verified
    assert found in view.problem
    assert view.remedy
