"""`apply` and `inner_loop` on fast weights that stay factors: the torch backend does it, on every device."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .backends import BACKENDS, Problem, factored_weights, torch_factored
from .forms import FactoredWeight


def places(ws: Sequence[Any]) -> list[int]:
    """Where there are FactoredWeights among the parameters."""
    return [i for i, w in enumerate(ws) if isinstance(w, FactoredWeight)]


def of_tasks(problem: Problem, ws: Sequence[Any], tasks: slice) -> list[Any]:
    """The parameters of these tasks."""
    return [p[tasks] if p.dim() > len(s) else p for p, s in zip(ws, problem.shapes, strict=True)]


def _chunks(T: int, chunk: int | None) -> list[slice]:
    size = chunk or T
    return [slice(start, start + size) for start in range(0, T, size)]


def apply(problem: Problem, ws: Sequence[Any], x: Tensor, chunk: int | None) -> Tensor:
    """The model's output [T, N, *out]."""
    run = [(of_tasks(problem, ws, some), x[some]) for some in _chunks(len(x), chunk)]
    return torch.cat([torch_factored.apply(BACKENDS["torch"], problem, w, x_t) for w, x_t in run])


@torch.no_grad()
def inner_loop(
    problem: Problem, ws: Sequence[Any], x: Tensor, y: Sequence[Tensor | None], lr: Tensor,
    rule: tuple[float, ...], chunk: int | None, fast_weights: Any,
) -> dict[str, Tensor | FactoredWeight]:  # fmt: skip
    """Fast weights, those asked for and those that were so before as factors; lr [K, S]."""
    (T, N), (K, S) = x.shape[:2], lr.shape
    kept = places(ws)
    named = fast_weights if isinstance(fast_weights, Mapping) else {}
    if told := [problem.names[i] for i in kept if named.get(problem.names[i]) == "dense"]:
        raise ValueError(f"{told} come as factors: pass their .dense() to go on with matrices")
    if kept and S not in (1, len(ws)):
        raise ValueError("factors need one step size for a tensor, not one for each element")
    own = tuple(
        w.dim() > len(s) and not isinstance(w, FactoredWeight)
        for w, s in zip(ws, problem.shapes, strict=True)
    )
    asked = (
        factored_weights(problem, "torch", (T, N, N, K, 1, bool(rule)), own, S, fast_weights)
        if fast_weights
        else ()
    )
    parts = [
        torch_factored.inner_loop(
            BACKENDS["torch"], problem, of_tasks(problem, ws, some), lr, x[some],
            [None if a is None else a[some] for a in y], steps=K, rule=rule, factored=sorted({*asked, *kept}),
        )
        for some in _chunks(T, chunk)
    ]  # fmt: skip
    return {n: _joined(each) for n, each in zip(problem.names, zip(*parts, strict=True), strict=True)}


def _joined(parts: Sequence[Tensor | FactoredWeight]) -> Tensor | FactoredWeight:
    if not isinstance(parts[0], FactoredWeight):
        return torch.cat(list(parts))  # type: ignore[arg-type]
    return FactoredWeight(
        parts[0].theta, *(torch.cat([getattr(w, side) for w in parts]) for side in ("d", "x"))
    )
