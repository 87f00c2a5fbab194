"""What an inner optimizer makes of a gradient, and its derivative, for parameters [T, *shape] each.

c = min(1, max_norm / |g_k|),    M_{k+1} = momentum M_k + c g_k + weight_decay W_k
"""

import math

import torch
from torch import Tensor

Weights = list[Tensor]  # [T, *shape] per parameter
State = tuple[Weights, Weights | None]  # W_k, M_k: see optimizers.py; None where the rule is ()


def _clip(problem, g: Weights, most: float) -> tuple[Tensor, Tensor]:
    each = [wide(a).flatten(1).square().sum(1) for a, ok in zip(g, problem.adapt, strict=True) if ok]
    norm = torch.stack(each or [wide(g[0].new_zeros(len(g[0])))]).sum(0).sqrt()
    return clipping(norm, most, g[0].dtype)


def wide(a: Tensor) -> Tensor:
    """In a dtype where squares neither overflow nor cancel; not every device has float64"""
    return a.float() if a.device.type == "mps" else a.double()


def clipping(norm: Tensor, most: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """c = min(1, most / (|g| + 1e-6)) and dc / d(|g|^2 / 2), [T] each of that dtype"""
    c = most / (norm + 1e-6)
    slope = torch.where((c < 1) & (norm > 0), -c / ((norm + 1e-6) * norm), 0.0)
    return c.clamp(max=1.0).to(dtype), slope.to(dtype)


def _each(a: Tensor, like: Tensor) -> Tensor:
    """[T] beside [T, *shape]"""
    return a.view(-1, *[1] * (like.dim() - 1))


def next_momentum(rule: tuple[float, ...], m: Tensor, g: Tensor, w: Tensor) -> Tensor:
    """M_{k+1} = momentum M_k + c g_k + weight_decay W_k; g: clipped"""
    return rule[0] * m + g + rule[1] * w


def descent(problem, state: State, g: Weights, rule) -> Weights:
    """M_{k+1} of each parameter"""
    w, m = state
    if m is None:
        return g
    if (most := rule[2]) < math.inf:
        c, _ = _clip(problem, g, most)
        g = [_each(c, a) * a for a in g]
    return [next_momentum(rule, b, a, p) for p, b, a in zip(w, m, g, strict=True)]


def through_clip(problem, n: Weights, g: Weights, rule) -> Weights:
    """The derivative of c g by g, times n: c n + c' <g, n> g"""
    if not rule or rule[2] == math.inf:
        return n
    c, slope = _clip(problem, g, rule[2])
    along = slope * torch.stack([(a * b).flatten(1).sum(1) for a, b in zip(g, n, strict=True)]).sum(0)
    return [
        _each(c, a) * a + _each(along, b) * b if ok else a
        for a, b, ok in zip(n, g, problem.adapt, strict=True)
    ]
