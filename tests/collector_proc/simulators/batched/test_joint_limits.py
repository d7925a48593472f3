"""The actions that reach the joint limits, of managers as Isaac Lab and mjlab have them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from collector_proc.simulators.batched.joint_limits import actions_at_limits
from shared.errors import SettingError

CPU = torch.device("cpu")
INF = float("inf")
LIMITS = torch.tensor([[[-1.0, 3.0], [0.0, 0.5], [-INF, INF], [-2.0, 2.0]]]).expand(2, -1, -1)


class JointPositionAction(SimpleNamespace):
    """A term as the tasks have it."""


class MyJointPositionAction(JointPositionAction):
    """A user's term."""


class JointEffortAction(SimpleNamespace):
    """A term whose actions are no positions."""


def environment(**terms: Any) -> Any:
    manager = SimpleNamespace(active_terms=list(terms), get_term=terms.__getitem__)
    return SimpleNamespace(action_manager=manager)


def asset(limits: Any = LIMITS) -> Any:
    return SimpleNamespace(data=SimpleNamespace(soft_joint_pos_limits=limits))


def test_an_action_reaches_the_farther_limit_from_the_offset_in_the_order_of_the_terms() -> None:
    legs = JointPositionAction(
        _asset=asset(), _joint_ids=[0, 2], _scale=0.5, _offset=torch.tensor([[1.0, 0.0], [9.0, 9.0]])
    )
    arm = MyJointPositionAction(
        _entity=asset(), _target_ids=torch.tensor([3, 1]), _scale=torch.tensor([[4.0, -0.1]]), _offset=0.0
    )
    # joint 0: 2 from the offset, and 0.5 per action; joint 2 has no limits; joint 3: 2 / 4; joint 1: 0.5 / 0.1
    found = actions_at_limits(environment(legs=legs, arm=arm), "joint_limits", device=CPU)
    assert found is not None
    torch.testing.assert_close(found, torch.tensor([4.0, 1.0, 0.5, 5.0]), rtol=1e-6, atol=0.0)


def test_all_joints_may_be_named_by_a_slice_and_arrays_may_offer_a_tensor() -> None:
    term = JointPositionAction(
        _asset=asset(SimpleNamespace(torch=LIMITS)), _joint_ids=slice(None), _scale=1.0, _offset=0.0
    )
    found = actions_at_limits(environment(joints=term), "joint_limits", device=CPU)
    assert found is not None and found.tolist() == [3.0, 0.5, 1.0, 2.0]
    assert actions_at_limits(environment(joints=term), "task", device=CPU) is None


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (SimpleNamespace(), "no action manager"),
        (
            environment(push=JointEffortAction()),
            "the action push of the task is a JointEffortAction; expected pos",
        ),
    ],
)
def test_a_task_whose_actions_are_no_joint_positions_is_refused(task: Any, message: str) -> None:
    with pytest.raises(SettingError, match=rf"joint_limits, but .*{message}.*set env.action_bounds=task"):
        actions_at_limits(task, "joint_limits", device=CPU)
