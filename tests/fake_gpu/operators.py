"""The operators of the fake GPU: each is computed on the CPU, over what the fake runtime calls device memory.

A dispatch mode sees every operator that torch would run on a CUDA device. It runs the operator on CPU tensors that
share the device's memory, at once or in the order of the streams (streams.py). During a capture it only works out
shapes, and records the operators (graphs.py).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import _tensor_str
from torch.utils._python_dispatch import TorchDispatchMode

from tests.fake_gpu import copies, graphs, streams
from tests.fake_gpu.graphs import call_random, capturing, check_host_may_wait, default_generator, draws, submit, wait
from tests.fake_gpu.memory import POISON, alias, flatten, to_cpu, to_meta

# torch runs these itself: they touch no data, or they read it through calls of the runtime that the fake has.
_NATIVE = {
    "aten::_local_scalar_dense",
    "aten::_pin_memory",
    "aten::_unsafe_view",
    "aten::alias",
    "aten::detach",
    "aten::is_pinned",
    "aten::lift_fresh",
    "aten::record_stream",
    "aten::resize_",
    "aten::set_",
}
_EMPTY = {"aten::empty", "aten::empty_strided", "aten::new_empty", "aten::new_empty_strided", "aten::empty_like"}
# The shape of the result depends on the values, so the host waits for them.
_WAITS = {
    "aten::_unique2",
    "aten::bincount",
    "aten::equal",
    "aten::masked_select",
    "aten::nonzero",
    "aten::repeat_interleave",
    "aten::unique_consecutive",
    "aten::unique_dim",
}
# These accept tensors of several devices.
_MIXES = {"aten::copy_", "aten::_to_copy", "aten::index", "aten::index_put_", "aten::_index_put_impl_"}


@dataclass(frozen=True, slots=True)
class _Plan:
    """What is known of an operator before it is called."""

    native: bool
    empty: bool
    waits: bool
    mixes: bool
    special: Callable[..., Any] | None
    random: bool
    writes: bool
    returned: tuple[tuple[int, str] | None, ...]  # the written argument that each result is: position and name


_plans: dict[Any, _Plan] = {}


def _plan(func: Any) -> _Plan:
    schema = func._schema
    written = [
        (position, argument.name, argument.alias_info.before_set)
        for position, argument in enumerate(schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    aliases = [result.alias_info and result.alias_info.before_set for result in schema.returns]
    returned = tuple(next(((p, name) for p, name, a in written if a == alias), None) for alias in aliases)
    name = schema.name
    return _Plan(
        native=name in _NATIVE or func.is_view,
        empty=name in _EMPTY,
        waits=name in _WAITS,
        mixes=name in _MIXES,
        special={"aten::copy_": copies.copy_, "aten::_to_copy": copies.to_copy}.get(name),
        random=torch.Tag.nondeterministic_seeded in func.tags,
        writes=bool(written),
        returned=returned,
    )


def _check_devices(name: str, seen: Sequence[torch.Tensor]) -> None:
    devices = {tensor.device for tensor in seen if tensor.dim() > 0 or tensor.is_cuda}
    if len(devices) > 1:
        raise RuntimeError(
            f"fake GPU: {name}: expected all tensors on one device, found {', '.join(map(str, devices))}"
        )


def _index_waits(args: Sequence[Any]) -> bool:
    """Return whether the host waits for this index: for the size of a mask, or for the copy of an index of the host."""
    if len(args) > 2 and args[2].numel() == 1 and not args[2].is_cuda:
        return False  # torch fills by the mask
    indices = [index for index in args[1] if index is not None]
    return any(index.dtype in (torch.bool, torch.uint8) or not index.is_cuda for index in indices)


class _Operators(TorchDispatchMode):
    """Computes the operators of CUDA tensors on the CPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        plan = _plans.get(func)
        if plan is None:
            plan = _plans[func] = _plan(func)
        if plan.native:
            return func(*args, **kwargs)
        seen: list[torch.Tensor] = []
        cpu_args = [to_cpu(value, seen) for value in args]
        cpu_kwargs = {name: to_cpu(value, seen) for name, value in kwargs.items()}
        target = self._target(kwargs, seen)
        if target is None:
            return func(*args, **kwargs)
        if plan.empty:
            return self._empty(func, args, kwargs)
        if plan.special is not None:
            return plan.special(*args, **kwargs)
        if not plan.mixes:
            _check_devices(func._schema.name, seen)
        if plan.waits or (plan.mixes and _index_waits(args)):
            check_host_may_wait(func._schema.name)
            wait(target)
        return self._compute(func, plan, args, kwargs, cpu_args, cpu_kwargs, target)

    @staticmethod
    def _target(kwargs: dict[str, Any], seen: list[torch.Tensor]) -> torch.device | None:
        """Return the CUDA device of the call, or None if the call has nothing to do with one."""
        device = kwargs.get("device")
        if device is not None:
            device = torch.device(device)
            if device.type == "cuda":
                return device if device.index is not None else torch.device("cuda", torch.cuda.current_device())
        return next((tensor.device for tensor in seen if tensor.is_cuda), None)

    @staticmethod
    def _empty(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Allocate, and fill with values that must not be read."""
        new = func(*args, **kwargs)
        if new.is_cuda and new.numel():
            memory = alias(new.detach())
            span = memory.as_strided((memory.untyped_storage().nbytes() // memory.element_size(),), (1,))
            raw = span.view(torch.uint8)
            submit(lambda: raw.fill_(POISON), new.device)
        return new

    @staticmethod
    def _compute(
        func: Any, plan: _Plan, args: Any, kwargs: Any, cpu_args: Any, cpu_kwargs: Any, target: torch.device
    ) -> Any:
        call = func
        if plan.random:
            generator = kwargs.get("generator") or next((a for a in args if isinstance(a, torch.Generator)), None)
            draw = draws(generator or default_generator(target))
            cpu_args = [None if isinstance(a, torch.Generator) else a for a in cpu_args]
            cpu_kwargs |= {"generator": None} if "generator" in cpu_kwargs else {}

            def call(*a: Any, **k: Any) -> Any:
                return call_random(func, a, k, draw)

        if plan.writes:
            submit(lambda: call(*cpu_args, **cpu_kwargs), target)
            written = [place and _argument(args, kwargs, *place) for place in plan.returned]
            return None if not written else written[0] if len(written) == 1 else tuple(written)
        if not capturing() and not streams.deferred():
            return _on_device(call(*cpu_args, **cpu_kwargs), target, copy=True)
        shapes = func(*map(to_meta, cpu_args), **{name: to_meta(value) for name, value in cpu_kwargs.items()})
        result = _on_device(shapes, target, copy=False)
        memory = [alias(tensor) for tensor in flatten(result)]

        def work() -> None:
            for to, source in zip(memory, flatten(call(*cpu_args, **cpu_kwargs)), strict=True):
                to.copy_(source)

        submit(work, target)
        return result


def _on_device(value: Any, device: torch.device, *, copy: bool) -> Any:
    """Return the same structure with tensors of the device."""
    if isinstance(value, torch.Tensor):
        new = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
        if copy:
            alias(new).copy_(value)
        return new
    if isinstance(value, (list, tuple)):
        return type(value)(_on_device(item, device, copy=copy) for item in value)
    return value


def _argument(args: Any, kwargs: dict[str, Any], position: int, name: str) -> Any:
    return args[position] if position < len(args) else kwargs.get(name)


_original_run = threading.Thread.run
_original_text = _tensor_str._str


def _run_thread(self: threading.Thread) -> None:
    with _Operators():
        _original_run(self)


def _text(self: torch.Tensor, *, tensor_contents: Any = None) -> str:
    """Print a tensor of a fake GPU: torch turns dispatch modes off while it prints."""
    if self.is_cuda:
        check_host_may_wait("print")
        wait(self.device)
        return f"{_original_text(alias(self.detach()).clone())[:-1]}, device='{self.device}')"
    return _original_text(self, tensor_contents=tensor_contents)


def _compile(model: Any = None, **_: Any) -> Any:
    """Replace torch.compile, which does not work below a dispatch mode.

    The function is computed operator by operator.
    """
    return model if model is not None else lambda function: function


def _sleep(cycles: int) -> None:
    device = torch.cuda.current_device()
    streams.sleep(torch._C._cuda_getCurrentRawStream(device), device)


def install() -> None:
    """Compute the operators of CUDA tensors on the CPU, in this thread and in those that it starts."""
    graphs.install()
    streams.install()
    torch_module: Any = torch
    torch_module.compile, torch_module.cuda._sleep = _compile, _sleep
    texts: Any = _tensor_str
    texts._str = _text
    thread: Any = threading.Thread
    thread.run = _run_thread
    _Operators().__enter__()
