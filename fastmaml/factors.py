"""`apply` and `inner_loop` on fast weights that stay factors: the torch backend does it, on every device."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import forms
from .backends import BACKENDS, Problem, factored_weights, torch_factored
from .forms import FactoredWeight


def places(ws: Sequence[Any]) -> list[int]:
    """Where there are FactoredWeights among the parameters."""
    return [i for i, w in enumerate(ws) if isinstance(w, FactoredWeight)]


def of_tasks(problem: Problem, ws: Sequence[Any], tasks: slice) -> list[Any]:
    """The parameters of these tasks."""
    return [p[tasks] if p.dim() > len(s) else p for p, s in zip(ws, problem.shapes, strict=True)]


def apply(problem: Problem, ws: Sequence[Any], x: Tensor, chunk: int | None) -> Tensor:
    """The model's output [T, N, *out]."""
    size = chunk or len(x)
    chunks = [slice(start, start + size) for start in range(0, len(x), size)]
    run = [(of_tasks(problem, ws, some), x[some]) for some in chunks]
    return torch.cat([torch_factored.apply(BACKENDS["torch"], problem, w, x_t) for w, x_t in run])


def chosen(
    problem: Problem, ws: Sequence[Any], x: Tensor, lr: Tensor, rule: tuple[float, ...], fast_weights: Any
) -> list[int]:
    """The places of the weights that come out of an inner loop as factors: those asked for, and those that
    were so before; lr [K, S]."""
    (T, N), (K, S) = x.shape[:2], lr.shape
    kept = places(ws)
    if fast_weights is None and not kept:
        return kept
    forms.check(fast_weights)
    named = fast_weights if isinstance(fast_weights, Mapping) else dict.fromkeys(problem.names, fast_weights)
    if told := [problem.names[i] for i in kept if named.get(problem.names[i]) == "dense"]:
        raise ValueError(f"{told} come as factors: pass their .dense() to go on with matrices")
    if kept and S not in (1, len(ws)):
        raise ValueError("factors need one step size for a tensor, not one for each element")
    if fast_weights in (None, "dense"):
        return kept
    own = tuple(
        w.dim() > len(s) and not isinstance(w, FactoredWeight)
        for w, s in zip(ws, problem.shapes, strict=True)
    )
    asked = factored_weights(problem, "torch", (T, N, N, K, 1, bool(rule)), own, S, fast_weights)
    return sorted({*asked, *kept})


def parts_of(ws: Sequence[Any]) -> list[Tensor]:
    """The parameters as tensors, three for each FactoredWeight."""
    return [a for w in ws for a in ((w.theta, w.d, w.x) if isinstance(w, FactoredWeight) else (w,))]


def shared(problem: Problem, ws: Sequence[Any]) -> list[bool]:
    """Of parts_of(ws): do all tasks have it, so that its gradient is summed over them?"""
    return [
        one
        for w, s in zip(ws, problem.shapes, strict=True)
        for one in ((True, False, False) if isinstance(w, FactoredWeight) else (w.dim() == len(s),))
    ]


def whole(parts: Sequence[Tensor], where: Sequence[int], count: int) -> list[Any]:
    """`count` parameters of such tensors, FactoredWeights at the places `where`."""
    rest = iter(parts)
    return [
        FactoredWeight(next(rest), next(rest), next(rest)) if i in where else next(rest) for i in range(count)
    ]


def check_differentiable(problem: Problem, ws: Sequence[Any], x: Tensor, y: Sequence[Any]) -> None:
    """As far as can be said without a dual sweep."""
    dense = [w.theta if isinstance(w, FactoredWeight) else w for w in ws]
    backend = BACKENDS["torch"]
    if not backend._has_jvp(problem, backend._own(problem, dense, 1), x, y):
        raise RuntimeError(torch_factored.NO_JVP)
