"""The linear layers of any model, caught on their way into torch: what torch_factored.py does with them."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from ..forms import LinearLayer


class Caught(TorchFunctionMode):
    """Catches the linear layers of these weights, and keeps their inputs."""

    def __init__(self, thetas: list[Tensor], parts: Sequence[tuple[Any, ...] | None]) -> None:
        super().__init__()
        self.parts = {id(theta): part for theta, part in zip(thetas, parts, strict=True)}
        self.x: dict[int, Tensor] = {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if (
            func is not F.linear
            or id(weight := args[1] if len(args) > 1 else kwargs["weight"]) not in self.parts
        ):
            return func(*args, **kwargs)
        key = id(weight)
        if key in self.x:
            raise RuntimeError(
                "a weight that several layers use cannot be factored: pass fast_weights='dense'"
            )
        x = args[0] if args else kwargs["input"]
        y = func(*args, **kwargs)
        rows = self.x[key] = x.reshape(-1, x.shape[-1])
        part = self.parts[key]
        if part is None:
            return y
        d_j, x_j, a, b, probe, omega = part
        if omega is not None:
            bias = args[2] if len(args) > 2 else kwargs.get("bias")
            y = omega * (y if bias is None else F.linear(x, weight)) + (0.0 if bias is None else bias)
        more = -(rows @ x_j.mT) @ d_j
        if probe is not None:
            more = more + probe
        if a is not None:
            more = more + (rows @ b.mT) @ a
        return y + more.reshape(y.shape)


class _Uses(TorchFunctionMode):
    """Listens to what a model does with its weights."""

    def __init__(self, weights: list[Tensor]) -> None:
        super().__init__()
        self.place = {id(w): i for i, w in enumerate(weights)}
        self.linear: dict[int, int] = {}  # rows that a weight is multiplied with as a linear layer's
        self.uses: Counter[int] = Counter()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for a in tree_leaves((args, kwargs)):
            if id(a) in self.place:
                self.uses[self.place[id(a)]] += 1
        if func is F.linear:
            x, weight = (args[i] if len(args) > i else kwargs[n] for i, n in enumerate(("input", "weight")))
            if id(weight) in self.place and weight.dim() == 2:
                self.linear[self.place[id(weight)]] = x.numel() // x.shape[-1]
        return func(*args, **kwargs)


def linear_layers(
    output: Callable[[list[Tensor]], Any], weights: list[Tensor], examples: int
) -> list[LinearLayer]:
    """Those that a model without a Program calls by F.linear; output(weights) runs it on `examples` examples.

    A weight that anything else reads, too, counts as tied.
    """
    with _Uses(weights) as seen, torch.no_grad():
        output(weights)
    return [
        LinearLayer(i, weights[i].shape[1], weights[i].shape[0], rows // examples, False, seen.uses[i] > 1)
        for i, rows in sorted(seen.linear.items())
        if rows % examples == 0
    ]
