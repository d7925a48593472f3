"""How far a robot's joint targets may go: the action that reaches the joint limits, read from the simulator's managers.

Isaac Lab and mjlab compute a joint target from an action: target = offset + scale * action. With the standing pose as
offset, an action of 0 holds this pose. This file imports torch, so it is imported after the simulator has started.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from shared.errors import SettingError

FIX = "set env.action_bounds=task, and env.action_scale to one number for each dimension"


def actions_at_limits(environment: Any, action_bounds: str, *, device: torch.device) -> Tensor | None:
    """Return for each dimension the largest action that a joint limit allows, (A,): from 0 to the farther limit.

    action_bounds: the setting of this name; the result is None unless it asks for joint limits.
    A joint without limits has 1. Limits are those within which the task keeps its joints (soft limits), of the first
    environment.
    Raises: SettingError if an action is not the target of a joint.
    """
    if action_bounds != "joint_limits":
        return None
    manager = getattr(environment, "action_manager", None)
    if manager is None:
        raise SettingError(
            f"env.action_bounds=joint_limits, but the task has no action manager that knows which joints its actions "
            f"move; expected a task with managers; {FIX}"
        )
    parts = [_of_term(name, manager.get_term(name)) for name in manager.active_terms]
    return torch.cat(parts).to(device, torch.float32)


def _of_term(name: str, term: Any) -> Tensor:
    """Return the same for the dimensions of one action term."""
    kinds = [kind.__name__ for kind in type(term).__mro__]
    if "JointPositionAction" not in kinds:
        raise SettingError(
            f"env.action_bounds=joint_limits, but the action {name} of the task is a {kinds[0]}; expected positions of "
            f"joints (JointPositionAction); {FIX}"
        )
    # Isaac Lab has the first name of each pair, mjlab the second.
    asset = term._asset if hasattr(term, "_asset") else term._entity
    joints = term._joint_ids if hasattr(term, "_joint_ids") else term._target_ids
    limits = _tensor(asset.data.soft_joint_pos_limits)[0, joints]  # (joints, 2)
    offset, scale = (_of_first(value, limits) for value in (term._offset, term._scale))
    farthest = (limits - offset[:, None]).abs().amax(-1) / scale.abs()
    return torch.where(farthest.isfinite(), farthest, 1.0)


def _of_first(value: Any, limits: Tensor) -> Tensor:
    """Return a value of each joint in the first environment. value: a number for all joints, or (E, joints)."""
    value = _tensor(value)
    return value[0] if isinstance(value, Tensor) else torch.full_like(limits[:, 0], float(value))


def _tensor(value: Any) -> Any:
    """Return the torch tensor of an array that offers one, or the value itself."""
    return getattr(value, "torch", value)
