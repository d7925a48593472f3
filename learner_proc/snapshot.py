"""Copy named groups of tensors out of a learner and back into it, without changing any address."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

if TYPE_CHECKING:
    from learner_proc.host_blocks import HostBlocks

Groups: TypeAlias = dict[str, dict[str, Tensor]]  # group -> name -> tensor
Shapes: TypeAlias = dict[tuple[str, str], tuple[int, ...]]  # (group, name) -> shape


def copied(live: Groups) -> Groups:
    """Return a copy of every tensor, which later steps do not change."""
    return {group: {name: tensor.clone() for name, tensor in tensors.items()} for group, tensors in live.items()}


def on_host(live: Groups, blocks: HostBlocks) -> Groups:
    """Return a copy of every tensor in host memory."""
    copies = iter(blocks.to_host([tensor for tensors in live.values() for tensor in tensors.values()]))
    return {group: {name: next(copies) for name in tensors} for group, tensors in live.items()}


def not_finite(live: Groups) -> str | None:
    """Return the name of a tensor that holds a number that is not finite, or None. Waits for the device once."""
    named = {f"{group}/{name}": t for group, tensors in live.items() for name, t in tensors.items()}
    floats = {name: tensor for name, tensor in named.items() if tensor.is_floating_point()}
    finite = torch.stack([tensor.isfinite().all() for tensor in floats.values()]).tolist()
    return next((name for name, good in zip(floats, finite, strict=True) if not good), None)


@torch.no_grad()
def restore(live: Groups, saved: Groups, *, optional: str) -> None:
    """Copy saved tensors into the live ones. Addresses stay, so compiled code and CUDA graphs stay valid.

    optional: the prefix of groups that are copied only if both sides have them.
    Raises: ValueError if names or shapes differ elsewhere; nothing is copied then.
    """
    both = live.keys() & saved.keys()
    live, saved = (
        {group: tensors for group, tensors in groups.items() if group in both or not group.startswith(optional)}
        for groups in (live, saved)
    )
    expected, found = _shapes(live), _shapes(saved)
    if expected != found:
        group, name = min(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key))
        raise ValueError(
            f"the saved learner does not fit: {_difference(f'{group}/{name}', found, expected, key=(group, name))}; "
            "resume with the settings that the checkpoint was made with"
        )
    for group, tensors in live.items():
        for name, tensor in tensors.items():
            tensor.copy_(saved[group][name])


def _difference(title: str, found: Shapes, expected: Shapes, *, key: tuple[str, str]) -> str:
    """Return how a saved tensor differs from the learner's own."""
    if key not in found:
        return f"{title} is missing in the checkpoint; expected shape {expected[key]}"
    if key not in expected:
        return f"{title} is not part of this learner; expected a checkpoint without it"
    return f"{title} has shape {found[key]}; expected {expected[key]}"


def _shapes(groups: Groups) -> Shapes:
    return {(group, name): tuple(t.shape) for group, tensors in groups.items() for name, t in tensors.items()}
