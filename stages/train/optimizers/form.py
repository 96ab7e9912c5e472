"""How a step is carried out: eagerly, which is the reference, or compiled by torch.compile into one loop over memory.

One compiled function serves all sizes, and numbers that change are tensors: what is compiled is said by the `Plan` and by dtypes alone. On a CPU
inductor writes C++, on a GPU Triton, from the same source. Compiled and eager steps differ by rounding (torch's eager kernels fuse some
products with their sums). Where nothing can be compiled the step stays eager, and that is said once.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from types import CodeType, FunctionType
from typing import Any

import torch

from stages.train.optimizers.step import Entries, New, Plan, advance, settle
from stages.train.optimizers.terms import Numbers, Places

COMPILE_FROM = 1 << 24
"""Entries from which a step is compiled when nobody says. Compiling takes seconds once; a step of so many saves tens of milliseconds."""
EAGER_CPU, EAGER_GPU = 1 << 18, 1 << 24
"""Entries that go through the eager operations at a time: on a CPU what its caches hold."""
COMPILED_CPU, COMPILED_GPU = 1 << 22, 1 << 26
"""Entries of one call of a compiled step. Masks of whole rows, and magnitudes, are made for so many."""
LOOK_CPU = 1 << 19
"""Entries whose magnitudes are looked through at a time."""

_PLACES = 6
_log = logging.getLogger(__name__)


class Form:
    """Runs steps on entries, in place. compiled: False once compiling has failed. seconds: that compiling took, reading the cache included."""

    def __init__(self, compiled: bool) -> None:
        self.compiled = compiled
        self._functions: dict[Any, Callable[..., Any]] = {}
        self.seconds = 0.0
        self._packed: dict[Any, torch.Tensor] = {}

    def chunk(self, device: torch.device, looking: bool = False) -> int:
        """Entries to pass at a time, a power of two. looking: for their magnitudes."""
        cpu = device.type == "cpu"
        if self.compiled and not (looking and cpu):
            return COMPILED_CPU if cpu else COMPILED_GPU
        return (LOOK_CPU if self.compiled else EAGER_CPU) if cpu else EAGER_GPU

    def advance(self, e: Entries, n: Numbers, p: Places, plan: Plan) -> torch.Tensor | None:
        """`step.advance`, written into the entries; returns what was asked for beside that."""
        if not self._compiles(e):
            return _write(e, advance(e, n, p, plan))
        dtype, device = e.exp_avg.dtype, e.exp_avg.device
        arguments = (
            self._once(n[:8], dtype, device),
            _vector(n[8:], dtype, device),
            _vector(p[:_PLACES], torch.int32, device),
            _vector(p[_PLACES:], torch.int32, device),
        )
        found = self._run(("advance", plan), lambda: _advancing(plan), e, *arguments)
        return _write(e, advance(e, n, p, plan)) if found is _FAILED else found

    def settle(self, e: Entries, factor: float | torch.Tensor | None, due: bool) -> None:
        """`step.settle`, written into the entries."""
        if self._compiles(e):
            given = None if factor is None else _vector((factor,), e.displacement.dtype, e.displacement.device)
            if self._run(("settle", due), lambda: _settling(due), e, given) is not _FAILED:
                return
        _write(e, settle(e, factor, due))

    def _compiles(self, e: Entries) -> bool:
        return self.compiled and e.displacement.numel() > 1  # a length of 1 would be compiled for itself

    def _once(self, values: tuple[Any, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """The numbers of a step, brought to the device once for all its parameters."""
        key = (values, dtype, device)
        if key not in self._packed:
            self._packed.clear()
            self._packed[key] = _vector(values, dtype, device)
        return self._packed[key]

    def _run(self, key: Any, make: Callable[[], Callable[..., Any]], *arguments: Any) -> Any:
        """Call a compiled function; `_FAILED`, with nothing changed, if it cannot be compiled here."""
        kinds = tuple(getattr(x, "dtype", None) for x in arguments[0]), arguments[0].displacement.device
        arguments = (_no_views(arguments[0]), *arguments[1:])
        fresh = (key, kinds) not in self._functions
        if fresh:
            self._functions[key, kinds] = torch.compile(make(), dynamic=True, fullgraph=True, options=_OPTIONS)
        if not fresh:
            return self._functions[key, kinds](*arguments)
        started = time.perf_counter()
        try:
            found = self._functions[key, kinds](*arguments)
        except (torch._dynamo.exc.TorchDynamoException, OSError) as error:
            self.compiled = False
            _log.warning("the optimizer's step runs eagerly, it cannot be compiled here: %s", _first_line(error))
            return _FAILED
        self.seconds += time.perf_counter() - started
        _log.info("a part of the optimizer's step was compiled, %.1f s so far", self.seconds)
        return found


_FAILED = object()


def _worth_checking(guards: Any) -> list[bool]:
    """Of what dynamo would check before every call: tensors alone. Plans and dtypes have functions of their own."""
    return [guard.guard_type in ("TENSOR_MATCH", "SHAPE_ENV", "DUPLICATE_INPUT") for guard in guards]


_OPTIONS: dict[str, str | int | bool | Callable[..., Any]] = {"compile_threads": 1, "guard_filter_fn": _worth_checking}


def _no_views(e: Entries) -> Entries:
    """The same memory without a base: dynamo would compile for the shapes of what a tensor is a view of."""
    return Entries(*(None if tensor is None else tensor.data for tensor in e))  # type: ignore[arg-type]


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _write(e: Entries, new: New) -> torch.Tensor | None:
    for name in New._fields[:-1]:
        value, target = getattr(new, name), getattr(e, name)
        if value is not None and value is not target:
            target.copy_(value)
    return new.found


def _advancing(plan: Plan) -> Callable[..., torch.Tensor | None]:
    def run(
        e: Entries, base: torch.Tensor, cuts: torch.Tensor, places: torch.Tensor, rooms: torch.Tensor
    ) -> torch.Tensor | None:
        n = Numbers(*[base[i] for i in range(8)], *[cuts[i] for i in range(4)])
        p = Places(*[places[i] for i in range(_PLACES)], *[rooms[i] for i in range(2)])
        return _write(e, advance(e, n, p, plan))

    return _own(run)


def _settling(due: bool) -> Callable[..., None]:
    def run(e: Entries, factor: torch.Tensor | None) -> None:
        _write(e, settle(e, None if factor is None else factor[0], due))

    return _own(run)


def _own(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with a code object of its own: dynamo counts recompilations by code object, and functions of different plans share one."""
    assert isinstance(function, FunctionType)
    code: CodeType = function.__code__.replace()
    return FunctionType(code, function.__globals__, function.__name__, function.__defaults__, function.__closure__)


def _vector(values: tuple[Any, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Numbers and tensors [] as one tensor on the device, without waiting for it."""
    host = torch.tensor([0 if isinstance(value, torch.Tensor) else value for value in values], dtype=dtype)
    there = host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)
    for place, value in enumerate(values):
        if isinstance(value, torch.Tensor):
            there[place] = value
    return there
