"""Which backend runs what. A backend is a module with equal signatures: see `cpu.py`."""

import math
import os
import warnings
import weakref
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

from torch import device as Device
from torch import dtype as DType
from torch import nn

from .. import forms
from ..losses import Loss, resolve
from ..program import Program, Unsupported, trace
from . import cpu, cuda, torch, triton  # the backends here, which hide the libraries of that name

# in order of preference
BACKENDS: dict[str, ModuleType] = {"cuda": cuda, "triton": triton, "cpu": cpu, "torch": torch}


@dataclass(frozen=True, eq=False)
class Problem:
    """A model, an example's shape and a loss: all that a backend must know besides the tensors."""

    model_ref: "weakref.ref[nn.Module]"
    example_shape: tuple[int, ...]
    program: Program | None
    why_no_program: str | None
    loss: Loss | None
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    adapt: tuple[bool, ...]  # False: frozen, the inner loop leaves it
    # by itemsize, made beforehand: torch.compile can read such a dict, not fill one nor call a method here
    encoded: dict[int, Any] = field(default_factory=dict)  # the program as the cpu backend passes it on
    layouts: dict[int, Any] = field(default_factory=dict)  # see layout()
    strided: dict[int, Any] = field(default_factory=dict)  # (shape, stride, offset) of each parameter
    memo: dict[Any, Any] = field(default_factory=dict)  # what backends derive from the rest
    traced: set[int] = field(default_factory=set)  # numbers of examples that the Program was seen to hold for

    def like(self, other: "Problem") -> bool:
        """Has it the same Program, parameters and loss?"""
        mine, its = ((p.program, p.names, p.shapes, p.adapt, p.loss, p.example_shape) for p in (self, other))
        return self.program is not None and mine == its

    @property
    def model(self) -> nn.Module:
        model = self.model_ref()
        assert model is not None
        return model

    def layout(self, itemsize: int) -> tuple[tuple[int, ...], int]:
        """Each parameter's offset in the flat vector, a multiple of 64 bytes, and the vector's length P."""
        return self.layouts[itemsize]

    def __post_init__(self) -> None:
        strides = [tuple(math.prod(s[i + 1 :]) for i in range(len(s))) for s in self.shapes]
        for itemsize in (2, 4, 8):
            unit, at, offsets = 64 // itemsize, 0, []
            for shape in self.shapes:
                offsets.append(at)
                at += -(-math.prod(shape) // unit) * unit
            self.layouts[itemsize] = tuple(offsets), at
            self.strided[itemsize] = list(zip(self.shapes, strides, offsets, strict=True))


_problems: "weakref.WeakKeyDictionary[nn.Module, dict]" = weakref.WeakKeyDictionary()


def check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"the model must be an nn.Module, got {type(model).__name__}")


def problem_for(
    model: nn.Module, example_shape: tuple[int, ...], loss: Loss | None, examples: tuple[int, ...] = ()
) -> Problem:
    """The Problem, made once and again whenever modules, their mode, hooks, plain attributes (`layer.eps`),
    or what is frozen change. What a model reads from lists, dicts or objects of its own may change unnoticed.

    examples: numbers of them that it is called with. A model that computes something else for some number of
    examples has no Program.
    """
    check_model(model)
    state = _state(model)
    known = _problems.setdefault(model, {})
    key = (tuple(example_shape), loss)
    before = known.get(key)
    if before is None or before[0] != state:
        problem = _made(model, key[0], loss)
        if before is not None and problem.like(before[1]):
            problem = before[1]  # with all that backends have made of it
        if len(known) >= 64:  # a fresh lambda for every call must not fill the memory
            known.clear()
    else:
        problem = before[1]
        if problem.traced.issuperset(examples):
            return problem
    if problem.program is not None and (why := _varies(model, problem, examples)):
        problem = replace(problem, program=None, why_no_program=why, encoded={}, memo={})
    problem.traced.update(examples)
    known[key] = state, problem
    return problem


def _made(model: nn.Module, example_shape: tuple[int, ...], loss: Loss | None) -> Problem:
    parameters = dict(model.named_parameters())
    program, why = None, None
    try:
        program = trace(model, example_shape)
    except Unsupported as error:
        why = str(error)
    shapes = tuple(tuple(p.shape) for p in parameters.values())
    adapt = tuple(p.requires_grad for p in parameters.values())
    return Problem(weakref.ref(model), example_shape, program, why, loss, tuple(parameters), shapes, adapt)


def _varies(model: nn.Module, problem: Problem, examples: tuple[int, ...]) -> str | None:
    """Why the Program is not what the model computes for one of these numbers of examples."""
    for n in sorted({n for n in examples if n > 0} - problem.traced):
        try:
            same = trace(model, problem.example_shape, n) == problem.program
        except Unsupported:
            same = False
        if not same:
            return f"the model ({type(model).__name__}) computes something else for {n} examples"
    return None


def _state(model: nn.Module) -> list[Any]:
    """What a changed model changes. Every call asks, so it goes past nn.Module's own, slower, ways to ask."""
    state: list[Any] = []
    modules: list[Any] = [model]
    plain = _PLAIN
    for m in modules:
        if m is None:
            continue
        d = m.__dict__
        state += (id(m), type(m), len(d["_forward_hooks"]), len(d["_forward_pre_hooks"]))
        for a in d.values():  # hyperparameters, and `training`
            if type(a) in plain:
                state.append(a)
        if own := d["_parameters"]:
            for name, p in own.items():
                if p is not None:
                    state += (name, id(p), p.requires_grad, p.shape)
        if children := d["_modules"]:
            modules += children.values()
    return state


_PLAIN = frozenset({bool, int, float, str, type(None)})


def prepare(
    model: nn.Module,
    example_shape: tuple[int, ...],
    loss: Any,
    device: Device,
    dtype: DType,
    name: str | None,
    sizes: cuda.Sizes | None = None,
) -> tuple[Problem, str]:
    """The Problem and the name of the backend that runs it. `loss` may be a name, a Loss, or None.

    sizes: of the call, None within torch.compile
    """
    problem = problem_for(model, example_shape, None if loss is None else resolve(loss), sizes or ())
    chosen = choose(problem, device, dtype, name, sizes)
    if sizes is None and chosen is torch and loss is not None:  # dynamo fails at its jvp
        raise RuntimeError(
            "the gradients of the torch backend do not run within torch.compile: "
            "call them outside of it, or under torch.compiler.disable"
        )
    return problem, next(n for n, backend in BACKENDS.items() if backend is chosen)


# what torch.compiler.assume_constant_result does, which would import the compiler: a second
prepare._dynamo_marked_constant = True  # type: ignore[attr-defined]


def keeps_factors(name: str, optimizer: bool) -> bool:
    """Does that backend have factored weights? In the others they have to be asked for, and run on torch."""
    return name in ("cpu", "torch") or (name != "cuda" and not optimizer)


def factored_weights(
    problem: Problem,
    name: str,  # of the backend
    sizes: tuple[int, int, int, int, int, bool],  # those of forms.Sizes up to `optimizer`
    own: tuple[bool, ...],
    S: int,  # step sizes of a step
    fast_weights: Any,
) -> tuple[int, ...]:
    """The weights that stay factored: forms.choose, remembered."""
    if fast_weights is None and not keeps_factors(name, sizes[-1]):
        return ()
    forms.check(fast_weights)
    if fast_weights is not None and not isinstance(fast_weights, str):
        fast_weights = tuple(fast_weights.items())
    key = "factored", name, sizes, own, S, fast_weights
    if key not in problem.memo:
        told = dict(fast_weights) if isinstance(fast_weights, tuple) else fast_weights
        per_element = S not in (1, len(problem.names))
        known = forms.Sizes(*sizes, gpu=name == "triton")
        problem.memo[key] = forms.choose(problem, known, own, per_element, told)
    return problem.memo[key]


def factored_weights_of(
    model: nn.Module, example_shape: tuple[int, ...], loss: Any, *args: Any
) -> tuple[int, ...]:
    """The same for torch.compile, which can pass a model to a function it does not follow, but no Problem."""
    return factored_weights(problem_for(model, example_shape, resolve(loss)), *args)


factored_weights_of._dynamo_marked_constant = True  # type: ignore[attr-defined]


_warned: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()


def why_not(
    name: str, problem: Problem, device: Device, dtype: DType, sizes: cuda.Sizes | None
) -> str | None:
    """None, or why the backend of that name cannot run a call of these sizes."""
    why = BACKENDS[name].supports(problem, device, dtype)
    if why is None and name == "cuda":
        return cuda.misfit(problem, device, dtype, sizes)
    if why is None and name == "triton":
        return triton.misfit(problem, sizes)
    return why


def check_name(name: str | None) -> None:
    if name is not None and name not in BACKENDS:
        raise ValueError(f"backend must be one of {list(BACKENDS)}, got {name!r}")


def choose(
    problem: Problem,
    device: Device,
    dtype: DType,
    name: str | None = None,
    sizes: cuda.Sizes | None = None,
) -> ModuleType:
    """The backend of that name (or of FASTMAML_BACKEND), else the first that can.

    Raises ValueError for an unknown name, RuntimeError with the reasons when the named one, or none, can.
    """
    name = name or os.environ.get("FASTMAML_BACKEND") or None
    by_size = name in ("cuda", "triton") or device.type == "cuda"
    key = (name, device, dtype, sizes) if by_size else (name, device, dtype)
    if key in problem.memo:
        return problem.memo[key]
    check_name(name)
    if name is not None:
        if why := why_not(name, problem, device, dtype, sizes):
            raise RuntimeError(f"backend {name!r} cannot run this: {why}")
        chosen = BACKENDS[name]
    else:
        reasons = {
            n: why_not(n, problem, device, dtype, sizes)
            for n, b in BACKENDS.items()
            if not b.EMULATED and b.DEVICE in (None, device.type)
        }
        first = next((n for n, why in reasons.items() if why is None), None)
        if first is None:
            why = "; ".join(f"{n}: {why}" for n, why in reasons.items())
            raise RuntimeError(f"no backend can run this ({why})")
        chosen = BACKENDS[first]
        if first == "torch" and problem.model not in _warned:
            _warned.add(problem.model)
            why = "; ".join(f"{n}: {why}" for n, why in reasons.items() if why)
            warnings.warn(f"fastmaml falls back to its torch backend ({why})", stacklevel=4)
    problem.memo[key] = chosen
    return chosen


def at(name: str, precision: str | None) -> Any:
    """The functions of that backend, their products in that precision where it has several."""
    backend = BACKENDS[name]
    return backend if precision is None or not hasattr(backend, "at") else backend.at(precision)


@dataclass(frozen=True)
class BackendInfo:
    name: str
    available: bool
    note: str  # why it is absent, or what it runs on


def backends() -> list[BackendInfo]:
    """Every backend, in order of preference, and whether this installation has it."""
    why, why_triton, why_cuda = cpu.available(), triton.available(), cuda.available()
    return [
        BackendInfo("cuda", why_cuda is None, why_cuda or cuda.note()),
        BackendInfo("triton", why_triton is None, why_triton or triton.note()),
        BackendInfo("cpu", why is None, why or f"C++ kernels, {cpu.isa()}"),
        BackendInfo("torch", True, "torch.func, any module and loss, any device"),
    ]
