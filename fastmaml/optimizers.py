"""The optimizer of the inner loop."""

import math
from dataclasses import dataclass


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
        for name in ("momentum", "weight_decay"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or isinstance(value, bool):
                raise TypeError(f"{name} must be a number, got {value!r}")
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} must be 0 or more, got {value}")
        norm = self.max_grad_norm
        if norm is not None and (not isinstance(norm, (int, float)) or isinstance(norm, bool)):
            raise TypeError(f"max_grad_norm must be a number or None, got {norm!r}")
        if norm is not None and not norm > 0:
            raise ValueError(f"max_grad_norm must be more than 0, got {norm}")

    @property
    def rule(self) -> tuple[float, ...]:
        """(momentum, weight_decay, max_grad_norm or infinity) for the backends; () for plain descent."""
        most = math.inf if self.max_grad_norm is None else float(self.max_grad_norm)
        rule = float(self.momentum), float(self.weight_decay), most
        return () if rule == (0.0, 0.0, math.inf) else rule
