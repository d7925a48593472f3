"""Convert the observations and actions of batched simulators to the form that the stream records.

{"policy": (E, 48) float, "camera": (E, 3, 100, 100) float}    as the simulator returns them
{"policy": (E, 48) float32, "pixels": (E, 64, 64, 3) uint8}    as they are streamed

This file imports torch, so it is imported after the simulator has started.
"""

from __future__ import annotations

import functools
import operator
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor
from torch.nn import functional

from collector_proc.simulators.base import ActionRange
from collector_proc.simulators.setting_checks import unknown
from shared.errors import SettingError, SimulatorError
from shared.stream import ObsSpec

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from shared.config import EnvSettings

IMAGE_SIZE = 64
DEFAULT_GROUPS = ("policy", "actor")  # names that Isaac Lab and mjlab use for the group that the actor observes
COLOURS = (1, 3, 4)  # channels: grey, RGB, RGB with alpha
TOLERANCE = 1e-3  # float images may leave their range by this much
LUMINANCE = (0.299, 0.587, 0.114)  # ITU-R BT.601


class ObservationMap:
    """Turns the chosen observation groups into named entries: flat float32 vectors and 64x64 uint8 images.

    A group of several terms gives one entry "group_term" per term. A single image is named "pixels"; several images are
    named "pixels_<name>". `outside` is a () int64 tensor on the device: 1 once a float image has left
    [env.image_low, env.image_high].
    """

    def __init__(self, sample: Mapping[str, Any], env: EnvSettings) -> None:
        """Read names, shapes and types from `sample`, the observation that one reset returned.

        Raises: SettingError if the settings do not fit the sample; SimulatorError if an image shows nothing.
        """
        self._gray, self._low, self._high = env.grayscale, env.image_low, env.image_high
        groups = chosen_groups(sample, env.obs_groups)
        self._keys = entry_names(_leaves({name: sample[name] for name in groups}))
        flat = self._read(sample)
        self.outside = torch.zeros((), dtype=torch.int64, device=next(iter(flat.values())).device)
        # the lowest and the highest value of all float images so far
        self._lowest = torch.full((), env.image_low, device=self.outside.device)
        self._highest = torch.full_like(self._lowest, env.image_high)
        images = [name for name, entry in flat.items() if entry.dim() == 4]
        if bool(images) != env.from_pixels:
            raise SettingError(
                f"env.from_pixels={str(env.from_pixels).lower()} does not fit the observation groups "
                f"{', '.join(groups)} of {env.name}, which hold the images {images}; expected "
                f"{'at least one' if env.from_pixels else 'none'}; set env.from_pixels={str(bool(images)).lower()} or "
                "choose other env.obs_groups"
            )
        self._names = {name: name for name in flat}
        for name in images:
            _check_image(name, flat[name], env)
            self._names[name] = "pixels" if len(images) == 1 else f"pixels_{name}"
        _check_distinct(self._names)
        self.spec = {
            name: ObsSpec(tuple(entry.shape[1:]), "uint8" if entry.dim() == 4 else "float32")
            for name, entry in self(sample).items()
        }

    def __call__(self, obs: Mapping[str, Any], rows: Tensor | slice | None = None) -> dict[str, Tensor]:
        """Return the entries of the chosen groups, of all rows or only of `rows`.

        They may share memory with the simulator's tensors. Shapes: (E, *shape).
        """
        flat = self._read(obs)
        if rows is not None:
            flat = {name: entry[rows] for name, entry in flat.items()}
        return {
            self._names[name]: self._image(entry) if entry.dim() == 4 else entry.reshape(len(entry), -1).float()
            for name, entry in flat.items()
        }

    def refuse_range(self) -> NoReturn:
        """Report that an image left its range. Waits for the device.

        Raises: SettingError with the values that were seen.
        """
        raise SettingError(
            f"env.image_low={self._low} env.image_high={self._high} do not cover the images, whose values lie in "
            f"{float(self._lowest):.3g} .. {float(self._highest):.3g}; expected the range of all values, which "
            "becomes the bytes 0 .. 255; set both settings so that they cover every value"
        )

    def _read(self, obs: Mapping[str, Any]) -> dict[str, Tensor]:
        entries: dict[str, Any] = {
            name: functools.reduce(operator.getitem, key, obs) for name, key in self._keys.items()
        }
        return entries

    def _image(self, image: Tensor) -> Tensor:
        """Return images as bytes, reduced to 64x64 by averaging over areas.

        Shapes: (E, H, W, C) or (E, C, H, W) to (E, 64, 64, 1 or 3) uint8.
        """
        if _channels_first(image):
            image = image.permute(0, 2, 3, 1)
        image = image[..., :3]
        ready = image.dtype == torch.uint8 and image.shape[1:3] == (IMAGE_SIZE, IMAGE_SIZE)
        if ready and not (self._gray and image.shape[3] == 3):
            return image
        values = image.float()
        if image.dtype != torch.uint8:
            self._watch(values)
            values = ((values - self._low) / (self._high - self._low) * 255).nan_to_num(0.0, 255.0, 0.0)
        if self._gray and image.shape[3] == 3:
            values = (values * values.new_tensor(LUMINANCE)).sum(-1, keepdim=True)
        if values.shape[1:3] != (IMAGE_SIZE, IMAGE_SIZE):
            values = functional.adaptive_avg_pool2d(values.permute(0, 3, 1, 2), IMAGE_SIZE).permute(0, 2, 3, 1)
        return values.round().clamp(0, 255).to(torch.uint8)

    def _watch(self, values: Tensor) -> None:
        """Remember on the device whether a value lay outside the range. NaN is ignored: `BatchedStep` looks for it."""
        low, high = values.nan_to_num(self._low, self._high, self._low).aminmax()
        self._lowest, self._highest = torch.minimum(self._lowest, low), torch.maximum(self._highest, high)
        self.outside.copy_((self._lowest < self._low - TOLERANCE) | (self._highest > self._high + TOLERANCE))


class ActionMap:
    """Maps actions in [-1, 1] to the simulator's own range, separately for each dimension.

    bounds    low, high          none               low only                   high only
    becomes   [low, high]        [-scale, scale]    [low, low + 2 * scale]     [high - 2 * scale, high]

    The scale is env.action_scale; with joint limits, it is their share of the largest action that these allow.
    """

    def __init__(
        self,
        low: Any,
        high: Any,
        *,
        scale: float | Sequence[float],
        device: torch.device,
        at_limits: Tensor | None = None,
    ) -> None:
        """Build the map from the bounds `low` and `high`, each (A,), infinite where there is no bound.

        at_limits: (A,), from `joint_limits.actions_at_limits`, or None.
        Raises: SettingError if `scale` does not have A numbers, or is set for a dimension that is bounded, where it
        would do nothing, or if joint limits are asked for although every dimension is bounded.
        """
        low, high = (torch.as_tensor(bound, dtype=torch.float32, device=device).flatten() for bound in (low, high))
        bounded = low.isfinite() & high.isfinite()
        _check_scale(scale, bounded, low, high)
        if at_limits is not None and bool(bounded.all()):
            raise SettingError(
                "env.action_bounds=joint_limits has no effect, because the task bounds all its actions: [-1, 1] is "
                f"mapped to {low.tolist()} .. {high.tolist()}; expected task; set env.action_bounds=task"
            )
        scales = torch.as_tensor(scale, dtype=torch.float32, device=device).expand(len(low))
        self._factor = torch.where(bounded, (high - low) / 2, scales if at_limits is None else scales * at_limits)
        lower, upper = torch.where(low.isfinite(), low + self._factor, 0.0), high - self._factor
        self._offset = torch.where(high.isfinite() & ~low.isfinite(), upper, lower)
        self.action_dim = len(self._factor)

    def __call__(self, action: Tensor) -> Tensor:
        """Return the simulator's action. Shapes: (E, A) in [-1, 1] to (E, A)."""
        return action * self._factor + self._offset

    @property
    def range(self) -> ActionRange:
        """The simulator's values of the actions -1 and 1."""
        bounds = (self._offset - self._factor, self._offset + self._factor)
        return ActionRange(*(tuple(bound.tolist()) for bound in bounds))


def _check_scale(scale: float | Sequence[float], bounded: Tensor, low: Tensor, high: Tensor) -> None:
    """Check env.action_scale against the bounds of the actions. Raises: SettingError, see `ActionMap`."""
    ranges = f"[-1, 1] is mapped to {low.tolist()} .. {high.tolist()}"
    if isinstance(scale, int | float):
        if scale != 1 and bool(bounded.all()):
            raise SettingError(
                f"env.action_scale={scale} has no effect, because the task bounds all its actions: {ranges}; expected "
                "1; set env.action_scale=1"
            )
        return
    if len(scale) != len(bounded):
        raise SettingError(
            f"env.action_scale={list(scale)} has {len(scale)} numbers, and the task's actions have {len(bounded)} "
            f"dimensions; expected one number for each, or one for all; set for example "
            f"env.action_scale={[1.0] * len(bounded)}"
        )
    idle = [index for index, value in enumerate(scale) if value != 1 and bool(bounded[index])]
    if idle:
        raise SettingError(
            f"env.action_scale={list(scale)} has no effect in the dimensions {idle}, which the task bounds: {ranges}; "
            "expected 1 there; set them to 1"
        )


def chosen_groups(sample: Mapping[str, Any], groups: Sequence[str] | None) -> list[str]:
    """Return the names of the observation groups to stream.

    groups: env.obs_groups. If it is None, the result is the group for the actor, or all groups if there is none.
    Raises: SettingError if the sample has no group of a given name.
    """
    if groups is None:
        return next(([name] for name in DEFAULT_GROUPS if name in sample), list(sample))
    for name in groups:
        if name not in sample:
            problem = f"env.obs_groups names {name!r}, which the task does not have"
            raise unknown(problem, name, sample, setting="env.obs_groups=[{}]")
    return list(groups)


def entry_names(keys: Iterable[tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """Return the stream's name of each entry and the key under which the simulator returns it.

    A nested key ("group", "term") is named "group_term". Dots become underscores, because a dot would nest the entry in
    the replay. Raises: SettingError if two keys get the same name.
    """
    found: dict[str, tuple[str, ...]] = {}
    for key in keys:
        name = "_".join(map(str, key)).replace(".", "_")
        if name in found:
            raise SettingError(
                f"observations {list(found[name])} and {list(key)} would both be streamed as {name!r}; expected "
                "different names; rename one of them in the task, or choose env.obs_groups without it"
            )
        found[name] = key
    return found


def _leaves(obs: Mapping[str, Any], above: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Return the keys of all tensors in nested groups."""
    found: list[tuple[str, ...]] = []
    for name, entry in obs.items():
        found += [(*above, name)] if isinstance(entry, Tensor) else _leaves(entry, (*above, name))
    return found


def _check_distinct(names: Mapping[str, str]) -> None:
    """Check that no image gets the name of another entry. Raises: SettingError if one does."""
    for name, streamed in names.items():
        if streamed != name and names.get(streamed) == streamed:
            raise SettingError(
                f"image {name!r} and observation {streamed!r} would both be streamed as {streamed!r}; expected "
                "different names; rename one of them in the task, or choose env.obs_groups without it"
            )


def _channels_first(image: Tensor) -> bool:
    return image.shape[3] not in COLOURS and image.shape[1] in COLOURS


def _check_image(name: str, image: Tensor, env: EnvSettings) -> None:
    """Check the shape and the values of an image.

    Raises: SimulatorError if it is no image or shows one colour only; SettingError if values lie outside the declared
    range.
    """
    if not _channels_first(image) and image.shape[3] not in COLOURS:
        raise SimulatorError(
            f"observation {name!r} has shape {tuple(image.shape)}; expected images (E, H, W, C) or (E, C, H, W) with "
            "1, 3 or 4 channels; choose other env.obs_groups"
        )
    channels = image.shape[1 if _channels_first(image) else 3]
    if channels == 4 and not env.drop_alpha:
        raise SettingError(
            f"image {name!r} has 4 channels, which may be RGB with transparency or 4 stacked pictures; expected "
            "1 or 3 channels; set env.drop_alpha=true to leave out the fourth, or stream stacked pictures as separate "
            "observations"
        )
    if image.dtype == torch.uint8:
        return
    low, high = (float(value) for value in image.float().aminmax())
    if low == high:
        raise SimulatorError(
            f"image {name!r} is {low:.3g} in every pixel of every environment; expected different values, to check "
            "their range; let its camera see something at the reset, or choose other env.obs_groups"
        )
    if not env.image_low - TOLERANCE <= low <= high <= env.image_high + TOLERANCE:
        raise SettingError(
            f"env.image_low={env.image_low} env.image_high={env.image_high} do not cover image {name!r}, whose values "
            f"lie in {low:.3g} .. {high:.3g}; expected the range of its values, which becomes the bytes 0 .. 255; set "
            "both, for example to -1 and 1 for images whose mean was subtracted"
        )
