"""The operators of the fake GPU: each is computed on the CPU, over the memory that the fake runtime calls device memory.

A dispatch mode sees every operator that torch would run on a CUDA device. It runs the operator on CPU tensors that share the
device's memory, at once or through a queue per stream (streams.py). During a capture it only works out shapes and records the
operators; a replay runs them. Random operators follow the seed and the offset of the CUDA generator.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.fake_gpu import streams

Work = Callable[[], object]

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
_WAITS = {"aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::unique_dim", "aten::equal"}
# These accept tensors of several devices.
_MIXES = {"aten::copy_", "aten::_to_copy", "aten::index", "aten::index_put_", "aten::_index_put_impl_"}
_POISON = 0xFF
_CACHE_LIMIT = 50_000
_DRAW = 4  # CUDA's generators count in multiples of 4
_NOT_PERMITTED = "CUDA error: operation not permitted when stream is capturing (fake GPU: {})"


@dataclass(frozen=True, slots=True)
class _Plan:
    """What is known of an operator before it is called."""

    native: bool
    empty: bool
    waits: bool
    mixes: bool
    special: Callable[..., Any] | None
    random: bool
    generator: bool  # the schema has an argument for a generator
    writes: bool
    returned: tuple[tuple[int, str] | None, ...]  # the written argument that each result is: position and name


@dataclass
class _Registered:
    """A generator that draws in a graph. Two objects of Python may stand for one generator; its address is the same."""

    generator: torch.Generator
    drawn: int = 0  # by how much one replay moves the offset
    seed: int = 0  # of the replay that runs
    offset: int = 0


@dataclass
class _Recording:
    """The operators of a captured graph, and the generators that it draws from."""

    work: list[Work] = field(default_factory=list)
    registered: dict[int, _Registered] = field(default_factory=dict)

    def draw(self, generator: torch.Generator) -> Callable[[], torch.Generator]:
        """Record that the graph draws; return a function that gives the CPU generator of this draw in each replay."""
        entry = self.registered.get(generator._cdata)
        if entry is None:
            raise RuntimeError("fake GPU: a generator draws in a capture that it is not registered with")
        used, entry.drawn = entry.drawn, entry.drawn + _DRAW
        return lambda: _cpu_generator(entry.seed, entry.offset + used)


_plans: dict[Any, _Plan] = {}
_aliases: dict[tuple[Any, ...], torch.Tensor] = {}
_recording: _Recording | None = None


def _plan(func: Any) -> _Plan:
    schema = func._schema
    written = [
        (position, argument.name, argument.alias_info.before_set)
        for position, argument in enumerate(schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    returned = tuple(
        next(
            ((position, name) for position, name, alias in written if result.alias_info and result.alias_info.before_set == alias),
            None,
        )
        for result in schema.returns
    )
    name = schema.name
    return _Plan(
        native=name in _NATIVE or func.is_view,
        empty=name in _EMPTY,
        waits=name in _WAITS,
        mixes=name in _MIXES,
        special={"aten::copy_": _copy_, "aten::_to_copy": _to_copy}.get(name),
        random=torch.Tag.nondeterministic_seeded in func.tags,
        generator=any(argument.name == "generator" for argument in schema.arguments),
        writes=bool(written),
        returned=returned,
    )


def alias(tensor: torch.Tensor) -> torch.Tensor:
    """Return a CPU tensor that shares the memory of a tensor on a fake GPU."""
    pointer = tensor.data_ptr()
    size, stride = tensor.shape, tensor.stride()
    key = (pointer, tensor.dtype, size, stride)
    found = _aliases.get(key)
    if found is not None:
        return found
    if tensor.numel() == 0:
        return torch.empty_strided(size, stride, dtype=tensor.dtype)
    span = 1 + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    buffer = (ctypes.c_char * (span * tensor.element_size())).from_address(pointer)
    new = torch.frombuffer(buffer, dtype=tensor.dtype, count=span).as_strided(size, stride)
    if len(_aliases) > _CACHE_LIMIT:
        _aliases.clear()
    _aliases[key] = new
    return new


def _to_cpu(value: Any, seen: list[torch.Tensor]) -> Any:
    """Return the value with every CUDA tensor replaced by its CPU alias; collect the tensors that were seen."""
    if isinstance(value, torch.Tensor):
        seen.append(value)
        if value.is_cuda:
            return alias(value)
        # A kernel takes a number from the host when it is launched, not when it runs.
        return value.clone() if value.dim() == 0 else value
    if isinstance(value, (list, tuple)):
        return [_to_cpu(item, seen) for item in value]
    if isinstance(value, torch.device):
        return torch.device("cpu")
    return value


def _to_meta(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    if isinstance(value, list):
        return [_to_meta(item) for item in value]
    return torch.device("meta") if isinstance(value, torch.device) else value


def _flatten(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for item in value for tensor in _flatten(item)] if isinstance(value, (list, tuple)) else []


def _capturing() -> bool:
    return torch.cuda.is_current_stream_capturing()


def _submit(work: Work, device: torch.device) -> None:
    """Run the work in the order of the current stream, or add it to the graph that is being captured."""
    if _capturing():
        if _recording is None:
            raise RuntimeError("fake GPU: this capture was not begun through torch.cuda.CUDAGraph")
        _recording.work.append(work)
    else:
        streams.submit(torch._C._cuda_getCurrentRawStream(device.index), device.index, work)


def _check_host_may_wait(name: str) -> None:
    if _capturing():
        raise RuntimeError(_NOT_PERMITTED.format(f"{name} waits for the stream"))
    if torch.cuda.get_sync_debug_mode() == 2:
        raise RuntimeError(f"called a synchronizing CUDA operation (fake GPU: {name})")


def _wait(device: torch.device) -> None:
    streams.finish(torch._C._cuda_getCurrentRawStream(device.index), device.index)


def _check_devices(name: str, seen: Sequence[torch.Tensor]) -> None:
    devices = {tensor.device for tensor in seen if tensor.dim() > 0 or tensor.is_cuda}
    if len(devices) > 1:
        raise RuntimeError(f"fake GPU: {name}: expected all tensors on one device, found {', '.join(map(str, devices))}")


# Random numbers.


def _default_generator(device: torch.device) -> torch.Generator:
    torch.cuda.init()
    return torch.cuda.default_generators[device.index]


def _draws(generator: torch.Generator) -> Callable[[], torch.Generator]:
    """Return a function that gives the CPU generator of this draw: it depends on the CUDA generator's seed and offset alone."""
    if _capturing():
        assert _recording is not None
        return _recording.draw(generator)
    seed, offset = generator.initial_seed(), generator.get_offset()
    generator.set_offset(offset + _DRAW)
    return lambda: _cpu_generator(seed, offset)


def _cpu_generator(seed: int, offset: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed * 1_000_003 + offset) % 2**63)


def _call_random(func: Any, args: Any, kwargs: Any, plan: _Plan, draw: Callable[[], torch.Generator]) -> Any:
    """Run a random operator on the CPU with the numbers of this draw."""
    generator = draw()
    if plan.generator:
        return func(*args, **{**kwargs, "generator": generator})
    state = torch.default_generator.get_state()
    torch.default_generator.set_state(generator.get_state())
    try:
        return func(*args, **kwargs)
    finally:
        torch.default_generator.set_state(state)


# Copies between host and devices.


def _deferred_copy(to: torch.Tensor, source: torch.Tensor, device: torch.device, *, waits: bool) -> None:
    """Copy in the order of the device's current stream. Exactly one of the tensors is on the host."""
    to_cpu = alias(to) if to.is_cuda else to
    from_cpu = alias(source) if source.is_cuda else source
    host = source if to.is_cuda else to
    pinned = host.is_pinned()
    streams.count_bytes(to_device=to.is_cuda, number=host.numel() * host.element_size())
    if _capturing() and not pinned:
        raise RuntimeError(_NOT_PERMITTED.format("a copy from or to unpinned host memory"))
    if waits or not pinned:
        if to.is_cuda and not waits:  # CUDA reads unpinned memory before the call returns
            from_cpu = from_cpu.clone()
        else:
            _check_host_may_wait("a blocking copy")
            waits = True
    _submit(lambda: _plain_copy(to_cpu, from_cpu, host), device)
    if waits:
        _wait(device)


def _plain_copy(to: torch.Tensor, source: torch.Tensor, _host: torch.Tensor) -> None:
    """Copy. The host tensor is an argument so that its pinned memory lives until the copy is done, as torch ensures."""
    to.copy_(source)


def _copy_between_devices(to: torch.Tensor, source: torch.Tensor) -> None:
    """Copy on the current stream of the source's device; the other device's current stream waits before and after."""
    to_cpu, from_cpu = alias(to), alias(source)
    from_device, to_device = source.device.index, to.device.index
    from_stream, to_stream = (torch._C._cuda_getCurrentRawStream(index) for index in (from_device, to_device))
    streams.join(from_stream, from_device, to_stream, to_device)
    streams.submit(from_stream, from_device, lambda: to_cpu.copy_(from_cpu))
    streams.join(to_stream, to_device, from_stream, from_device)


def _copy_(to: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    if to.is_cuda and source.is_cuda:
        if to.device == source.device:
            to_cpu, from_cpu = alias(to), alias(source)
            _submit(lambda: to_cpu.copy_(from_cpu), to.device)
        else:
            _copy_between_devices(to, source)
    elif source.is_cuda or source.dim() > 0 or source.is_pinned():
        _deferred_copy(to, source, to.device if to.is_cuda else source.device, waits=not non_blocking)
    else:  # a number of the host
        number, to_cpu = source.clone(), alias(to)
        if _capturing() or not non_blocking:
            _check_host_may_wait("a blocking copy")
        _submit(lambda: to_cpu.copy_(number), to.device)
    return to


def _to_copy(
    source: torch.Tensor,
    *,
    dtype: torch.dtype | None = None,
    layout: torch.layout | None = None,
    device: torch.device | None = None,
    pin_memory: bool | None = None,
    non_blocking: bool = False,
    memory_format: torch.memory_format | None = None,
) -> torch.Tensor:
    target = torch.device(device) if device is not None else source.device
    if target.type == "cuda" and target.index is None:
        target = torch.device("cuda", torch.cuda.current_device())
    shape = torch.empty_strided(source.shape, source.stride(), dtype=source.dtype, device="meta")
    shape = torch.ops.aten._to_copy.default(shape, dtype=dtype, memory_format=memory_format)
    pinned = bool(pin_memory) or (non_blocking and source.is_cuda and target.type == "cpu")
    new = torch.empty_strided(shape.shape, shape.stride(), dtype=shape.dtype, device=target, pin_memory=pinned)
    if source.dtype == new.dtype or source.is_cuda == new.is_cuda:
        return _copy_(new, source, non_blocking)
    # Between host and device torch converts on the source's side first.
    converted = source.to(new.dtype) if not source.is_cuda else _to_copy(source, dtype=new.dtype)
    return _copy_(new, converted, non_blocking)


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
        cpu_args = [_to_cpu(value, seen) for value in args]
        cpu_kwargs = {name: _to_cpu(value, seen) for name, value in kwargs.items()}
        target = self._target(kwargs, seen)
        if target is None:
            return func(*args, **kwargs)
        if plan.empty:
            return self._empty(func, args, kwargs)
        if plan.special is not None:
            return plan.special(*args, **kwargs)
        if not plan.mixes:
            _check_devices(func._schema.name, seen)
        if plan.waits:
            _check_host_may_wait(func._schema.name)
            _wait(target)
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
            _submit(lambda: raw.fill_(_POISON), new.device)
        return new

    @staticmethod
    def _compute(
        func: Any, plan: _Plan, args: Any, kwargs: Any, cpu_args: Any, cpu_kwargs: Any, target: torch.device
    ) -> Any:
        call = func
        if plan.random:
            generator = kwargs.get("generator") or next((a for a in args if isinstance(a, torch.Generator)), None)
            draw = _draws(generator or _default_generator(target))
            cpu_args = [None if isinstance(a, torch.Generator) else a for a in cpu_args]
            cpu_kwargs |= {"generator": None} if "generator" in cpu_kwargs else {}

            def call(*a: Any, **k: Any) -> Any:
                return _call_random(func, a, k, plan, draw)

        if plan.writes:
            _submit(lambda: call(*cpu_args, **cpu_kwargs), target)
            results = [place and (args[place[0]] if place[0] < len(args) else kwargs.get(place[1])) for place in plan.returned]
            return None if not results else results[0] if len(results) == 1 else tuple(results)
        if not _capturing() and not streams.deferred():
            return _on_device(call(*cpu_args, **cpu_kwargs), target, copy=True)
        shapes = func(*map(_to_meta, cpu_args), **{name: _to_meta(value) for name, value in cpu_kwargs.items()})
        result = _on_device(shapes, target, copy=False)
        memory = [alias(tensor) for tensor in _flatten(result)]

        def work() -> None:
            for to, source in zip(memory, _flatten(call(*cpu_args, **cpu_kwargs)), strict=True):
                to.copy_(source)

        _submit(work, target)
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


# Graphs.


def _capture_begin(self: Any, *args: Any, **kwargs: Any) -> None:
    global _recording
    _original_begin(self, *args, **kwargs)
    generators = [*torch.cuda.default_generators, *getattr(self, "fake_generators", [])]
    registered = {generator._cdata: _Registered(generator) for generator in generators}
    _recording = self.fake_recording = _Recording(registered=registered)


def _capture_end(self: Any) -> None:
    global _recording
    _recording = None
    _original_end(self)
    _poison_free_memory()


def _register(self: Any, generator: torch.Generator) -> None:
    """Register a generator. torch 2.14 does it by itself; older versions, which are supported, need the call."""
    self.fake_generators = [*getattr(self, "fake_generators", []), generator]


def _replay(self: Any) -> None:
    recording: _Recording = self.fake_recording
    drawing = [entry for entry in recording.registered.values() if entry.drawn]
    states = [(entry.generator.initial_seed(), entry.generator.get_offset()) for entry in drawing]
    for entry in drawing:
        entry.generator.set_offset(entry.generator.get_offset() + entry.drawn)
    _original_replay(self)

    def work() -> None:
        for entry, (entry.seed, entry.offset) in zip(drawing, states, strict=True):
            pass
        for step in recording.work:
            step()

    device = torch.cuda.current_device()
    streams.submit(torch._C._cuda_getCurrentRawStream(device), device, work)


def _poison_free_memory() -> None:
    """Fill all memory that torch's allocator holds and nobody uses: whoever still reads it reads values that must not be read."""
    for segment in torch.cuda.memory_snapshot():
        address = segment["address"]
        for block in segment["blocks"]:
            if block["state"] == "inactive":
                ctypes.memset(address, _POISON, block["size"])
            address += block["size"]


_original_begin = torch.cuda.CUDAGraph.capture_begin
_original_end = torch.cuda.CUDAGraph.capture_end
_original_replay = torch.cuda.CUDAGraph.replay
_original_run = threading.Thread.run
_original_text = torch._tensor_str._str


def _run_thread(self: threading.Thread) -> None:
    with _Operators():
        _original_run(self)


def _text(self: torch.Tensor, *, tensor_contents: Any = None) -> str:
    """Print a tensor of a fake GPU: torch turns dispatch modes off while it prints."""
    if self.is_cuda:
        _check_host_may_wait("print")
        _wait(self.device)
        return f"{_original_text(alias(self.detach()).clone())[:-1]}, device='{self.device}')"
    return _original_text(self, tensor_contents=tensor_contents)


def _compile(model: Any = None, **_: Any) -> Any:
    """Replace torch.compile, which does not work below a dispatch mode. The function is computed operator by operator."""
    return model if model is not None else lambda function: function


def _sleep(cycles: int) -> None:
    device = torch.cuda.current_device()
    streams.sleep(torch._C._cuda_getCurrentRawStream(device), device)


def install() -> None:
    """Compute the operators of CUDA tensors on the CPU, in this thread and in those that it starts."""
    graph: Any = torch.cuda.CUDAGraph
    graph.capture_begin, graph.capture_end = _capture_begin, _capture_end
    graph.register_generator_state, graph.replay = _register, _replay
    torch.compile = _compile
    texts: Any = torch._tensor_str
    texts._str = _text
    cuda: Any = torch.cuda
    cuda._sleep = _sleep
    thread: Any = threading.Thread
    thread.run = _run_thread
    streams.install()
    _Operators().__enter__()
