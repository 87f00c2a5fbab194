"""What the passes of every op take. T tasks, M rows (examples times inner axes), C columns."""

from typing import NamedTuple

from torch import Tensor


class Buffer(NamedTuple):
    """One buffer of the Program on one set: [T, M, C] each, contiguous; None: not there, or zero."""

    value: Tensor
    grad: Tensor | None = None
    t_value: Tensor | None = None
    t_grad: Tensor | None = None


NOTHING = Buffer(None)  # pyright: ignore[reportArgumentType]


class Param(NamedTuple):
    """A parameter [T, *shape] and its tangent, `lr * tangent`; shared by all tasks where stride(0) is 0.

    lr: one number [1], or one for each element [*shape]; None: 1
    """

    value: Tensor
    tangent: Tensor | None = None
    lr: Tensor | None = None


class Update(NamedTuple):
    """Where a parameter's gradient goes: dst = base + sign * scale * lr * gradient.

    dst, base: [T, *shape], base None: 0;  lr: as in Param;  scale: [1] or [T], None: 1
    """

    dst: Tensor
    base: Tensor | None = None
    lr: Tensor | None = None
    scale: Tensor | None = None
    sign: int = 1


class Activation(NamedTuple):
    """y = f(z) behind a linear or norm layer, in the same kernel. `name` as in fastmaml/ops."""

    name: str = "none"
    attr: float = 0.0  # the slope of leaky_relu; 1 for gelu's tanh

    @property
    def reads_input(self) -> bool:
        """Are f' and f'' found from z? From y else."""
        return self.name in ("gelu", "silu") or (self.name == "leaky_relu" and self.attr < 0)

    @property
    def curved(self) -> bool:
        return self.name not in ("none", "leaky_relu")


NO_ACTIVATION = Activation()


class Norm(NamedTuple):
    """A norm of a linear layer's y, in the layer's kernel where a program of it can hold whole groups."""

    w: Param | None
    b: Param | None
    y: Buffer
    z: Buffer | None
    statistics: Tensor
    act: Activation
    eps: float
    axis: int  # 0: over the rows of a task, 1: over the columns
