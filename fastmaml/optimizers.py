"""What the inner loop does besides plain descent: its optimizer, and the weights of losses on every step."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from types import NoneType
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class SGD:
    """One step of torch.nn.utils.clip_grad_norm_ and torch.optim.SGD, on every task's own weights W:

        g <- g min(1, max_grad_norm / (|g| + 1e-6)),   M <- momentum M + g + weight_decay W,   W <- W - lr M

    with M = 0 before the first step, and |g| over all parameters of a task that the model has not frozen.
    A parameter that the loss does not depend on has g = 0, and decays like the others (torch.optim skips it).
    lr is an argument of its own. The derivative goes through all of it; for the first order g is a constant.
    """

    momentum: float = 0.0
    weight_decay: float = 0.0
    max_grad_norm: float | None = None

    def __post_init__(self) -> None:
        for name in ("momentum", "weight_decay", "max_grad_norm"):
            value = getattr(self, name)
            if name == "max_grad_norm" and value is None:
                continue
            value = number(name, value)
            object.__setattr__(self, name, value)  # a float, whatever came
            if name == "max_grad_norm" and not value > 0:
                raise ValueError(f"max_grad_norm must be more than 0, got {value}")
            if name != "max_grad_norm" and not 0 <= value < math.inf:
                raise ValueError(f"{name} must be 0 or more, got {value}")

    @property
    def rule(self) -> tuple[float, ...]:
        """(momentum, weight_decay, max_grad_norm or infinity) for the backends; () for plain descent."""
        most = math.inf if self.max_grad_norm is None else self.max_grad_norm
        rule = self.momentum, self.weight_decay, most
        return () if rule == (0.0, 0.0, math.inf) else rule


def number(name: str, value: Any) -> float:
    """A real number of any kind, 0-d arrays and tensors too, as a float."""
    if isinstance(value, Tensor) and value.requires_grad:
        raise ValueError(f"{name} has no derivative here: detach it, or use fastmaml.reference")
    plain = value.item() if getattr(value, "shape", None) == () else value
    if isinstance(plain, bool) or not isinstance(plain, Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    try:
        plain = float(plain)
    except OverflowError:
        raise ValueError(f"{name} must fit a float, got a number that does not") from None
    if math.isnan(plain):
        raise ValueError(f"{name} must be a number, got NaN")
    return plain


def check_optimizer(optimizer: Any) -> None:
    if not isinstance(optimizer, (SGD, NoneType)):
        kind = type(optimizer)
        raise TypeError(
            f"optimizer must be a fastmaml.SGD or None, got {kind.__module__}.{kind.__qualname__}"
        )


def update_rule(optimizer: SGD | None) -> tuple[float, ...]:
    """SGD.rule, () for None."""
    check_optimizer(optimizer)
    return optimizer.rule if optimizer else ()


def check_step_weights(step_weights: Any, steps: int) -> None:
    """Is it None, or something that holds one item for each step?"""
    if step_weights is None:
        return
    sequence = isinstance(step_weights, Sequence) and not isinstance(step_weights, (str, bytes))
    if not sequence and not getattr(step_weights, "shape", ()):  # neither an array nor a tensor
        raise TypeError(f"step_weights must be a sequence of numbers, got {step_weights!r}")
    if len(step_weights) != steps or steps == 0:
        raise ValueError(
            f"step_weights must hold a number for each of {steps} steps, got {len(step_weights)}"
        )


def loss_weights(step_weights: Sequence[float] | Tensor | None, steps: int) -> tuple[float, ...] | None:
    """step_weights as floats."""
    check_step_weights(step_weights, steps)
    if step_weights is None:
        return None
    weights = tuple([number(f"step_weights[{i}]", w) for i, w in enumerate(step_weights)])
    if math.inf in map(abs, weights):
        raise ValueError(f"step_weights must be finite, got {list(weights)}")
    return weights


def counted_weights(step_weights: Sequence[float] | Tensor | None, steps: int) -> tuple[float, ...]:
    """The same for the backends: () where only the loss after the last step counts, as it is."""
    weights = loss_weights(step_weights, steps)
    return () if weights is None or weights == (*[0.0] * (steps - 1), 1.0) else weights
