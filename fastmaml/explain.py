"""What fastmaml makes of a model: its Program, the backend that runs it, and why the others do not."""

import os
from typing import Any

import torch
from torch import Tensor, nn

from . import forms
from .arguments import check_count, understood
from .backends import BACKENDS, Problem, factored_weights, keeps_factors, problem_for, why_not
from .backends.cuda import Sizes
from .backends.precision import check_precision, chosen
from .losses import resolve
from .optimizers import SGD, counted_weights, update_rule
from .program import Op, Program

_ROUNDING = {
    "ieee": "of float32 numbers",
    "tf32": "of numbers rounded to TF32, summed in float32",
    "bf16": "of numbers rounded to bfloat16, summed in float32",
}


class Explanation(str):
    """A text that a console shows as it is."""

    def __repr__(self) -> str:
        return str(self)


def explain(
    model: nn.Module,
    x: Tensor,
    loss: Any = None,
    *,
    steps: int | None = None,
    queries: int | None = None,
    optimizer: SGD | None = None,
    step_weights: Any = None,
    fast_weights: Any = None,
    precision: str | None = None,
) -> Explanation:
    """The layer ops with shapes and parameters, the backend that backend=None takes, and why not each other.

    With `steps`, also the form of each linear layer's fast weights in meta_loss, and why.

    x: [T, N, *example], as for the functions of fastmaml.functional; its values are not looked at
    loss: as there; without one, what is said holds for `apply`
    queries: query examples of a task (default: N); optimizer, step_weights, fast_weights, precision: as for
        meta_loss
    """
    if not isinstance(x, Tensor) or x.dim() < 2:
        got = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"x must have shape [T, N, ...], got {got}")
    check_count("queries", queries, 1)
    check_precision(precision)
    meant = None if loss is None else resolve(understood(loss, model, x))
    T, N = x.shape[:2]
    calls = Sizes(0, N) if meant is None else Sizes(N, queries or N)
    problem = problem_for(model, tuple(x.shape[2:]), meant, calls)
    rule = update_rule(optimizer)
    name, reasons = _chosen(problem, x, calls)
    lines = [*_program_lines(model, problem), "", *_backend_lines(name, reasons, x, precision, rule)]
    if steps is not None:
        check_count("steps", steps, 0)
        losses = forms.query_losses(counted_weights(step_weights, steps))
        sizes = T, N, queries or N, steps, losses, bool(rule)
        if reasons.get(name, "") is None:
            lines += ["", *_form_lines(problem, name, sizes, fast_weights)]
    return Explanation("\n".join(lines))


def _program_lines(model: nn.Module, problem: Problem) -> list[str]:
    kind, program = type(model).__name__, problem.program
    if program is None:
        return [f"{kind} has no Program: {problem.why_no_program}"]
    sizes = dict(zip(problem.names, problem.shapes, strict=True))
    frozen = {name for name, adapt in zip(problem.names, problem.adapt, strict=True) if not adapt}
    rows = [("#0", "input", _batch(program.buffers[0]), "", "")]
    rows += [_row(op, program, sizes, frozen) for op in program.ops]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [f"{kind}: {len(program.ops)} layer ops on each task's N examples, result in #{program.output}"]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        lines.append(("  " + "  ".join(cells)).rstrip())
    read = {name for op in program.ops for name in op.params}
    if unused := [name for name in problem.names if name not in read]:
        lines.append(f"  unused, so their gradient is zero: {', '.join(unused)}")
    return lines


def _row(op: Op, program: Program, sizes: dict[str, tuple[int, ...]], frozen: set[str]) -> tuple[str, ...]:
    attrs = ", ".join(f"{key}={value:g}" for key, value in op.attrs)
    reads = ", ".join(f"#{b}" for b in op.inputs)
    names = [p for p in op.params if p is not None]
    weights = ", ".join(f"{p} {list(sizes[p])}{' frozen' if p in frozen else ''}" for p in names)
    call = f"{op.name}({reads}{'; ' + attrs if attrs else ''})"
    return f"#{op.output}", call, _batch(program.buffers[op.output]), op.module, weights


def _batch(shape: tuple[int, ...]) -> str:
    return f"[N{''.join(f', {n}' for n in shape)}]"


def _chosen(problem: Problem, x: Tensor, sizes: Sizes) -> tuple[str, dict[str, str | None]]:
    """The backend that backend=None takes, or "none", and of each why it cannot run this, None if it can."""
    reasons = {name: why_not(name, problem, x.device, x.dtype, sizes) for name in BACKENDS}
    able = (name for name, why in reasons.items() if why is None and not BACKENDS[name].EMULATED)
    return os.environ.get("FASTMAML_BACKEND") or next(able, "none"), reasons


def _backend_lines(
    first: str,
    reasons: dict[str, str | None],
    x: Tensor,
    precision: str | None,
    rule: tuple[float, ...],
) -> list[str]:
    forced = os.environ.get("FASTMAML_BACKEND")
    on = f"{x.device.type}, {str(x.dtype).removeprefix('torch.')}"
    lines = [f"backend: {first} ({on}{', by FASTMAML_BACKEND' if forced else ''})"]
    if forced and forced not in reasons:
        lines.append(f"  but backend must be one of {list(BACKENDS)}")
    for name, why in reasons.items():
        if BACKENDS[name].EMULATED and why is None:
            lines.append(f"  {'' if name == first else 'not '}{name}: emulated here, runs when named")
        elif name != first:
            lines.append(f"  not {name}: {why or f'it could, but {first} comes first'}")
        elif why:
            lines.append(f"  but {name} cannot run this: {why}")
        if why is None and x.dtype is torch.float32 and hasattr(BACKENDS[name], "at"):
            lines.append(f"  {name}'s products: {_ROUNDING[chosen(precision)]}")
        if why is None and rule and (other := getattr(BACKENDS[name], "WITH_OPTIMIZER", None)):
            lines.append(f"  {name} has no kernels for this optimizer: inner loops with it run on {other}")
    return lines


def _form_lines(
    problem: Problem, backend: str, given: tuple[int, int, int, int, int, bool], fast_weights: Any
) -> list[str]:
    sizes = forms.Sizes(*given, gpu=backend == "triton")
    none_own = (False,) * len(problem.names)
    factored = factored_weights(problem, backend, given, none_own, 1, fast_weights)
    more = f", losses after {sizes.losses} of them" if sizes.losses > 1 else ""
    more += ", an optimizer" if sizes.optimizer else ""
    lines = [
        f"fast weights in meta_loss: T={sizes.T} N={sizes.N}, {sizes.Q} query examples, {sizes.K} steps{more}"
    ]
    if not keeps_factors(backend, sizes.optimizer):
        what = f"factored weights{'' if backend == 'cuda' else ' with an optimizer'}"
        lines.append(f"  {backend} has no kernels for {what}: where told to, meta_loss runs on torch")
    rows = []
    known = forms.layers(problem)
    side_by_side = any(layer.weight in factored and not layer.fixed_input for layer in known)
    for layer in known:
        name, shape = problem.names[layer.weight], f"[{layer.O}, {layer.I}]"
        if why := forms.why_dense(layer, none_own, False):
            rows.append((name, shape, "dense", f"it {why}"))
            continue
        dense, other = (
            forms.gpu_cost(layer, sizes, form) if sizes.gpu else forms.cost(layer, sizes, form, side_by_side)
            for form in forms.FORMS
        )
        form = "factored" if layer.weight in factored else "dense"
        told = "" if fast_weights is None else ", as told"
        rows.append((name, shape, form, f"factored would take {other / dense:.2g} of the dense time{told}"))
    if not rows:
        return [*lines, "  no linear layers"]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return lines + ["  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
