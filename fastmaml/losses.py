"""The losses that have kernels. Each is called for one task and returns the mean over its examples."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Loss = Callable[..., Tensor]
IGNORED = -100  # the label that torch's cross entropy leaves out, unless told of another


@dataclass(frozen=True)
class MSE:
    """(output - target)^2, mean over the elements of an example, then over the examples."""

    def __call__(
        self,
        output: Tensor,  # [N, *out]
        target: Tensor,  # [N, *out]
        weight: Tensor | None = None,  # [N]
    ) -> Tensor:
        if output.shape != target.shape:
            raise ValueError(
                f"the target must have the output's shape {list(output.shape)}, got {list(target.shape)}"
            )
        each = (output - target).square().reshape(len(output), -1).mean(1)
        return _mean(each, weight)


@dataclass(frozen=True)
class CrossEntropy:
    """-log softmax(output)[target]; label_smoothing s makes the target (1 - s) one_hot + s / C,."""

    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.label_smoothing <= 1.0:
            raise ValueError(f"label_smoothing must be in [0, 1], got {self.label_smoothing}")

    def __call__(
        self,
        output: Tensor,  # [N, C]
        target: Tensor,  # [N], int64 in [0, C)
        weight: Tensor | None = None,  # [N]
    ) -> Tensor:
        log_p = torch.log_softmax(output, -1)
        try:
            each = -log_p.gather(-1, target[:, None])[:, 0]
        except RuntimeError as error:
            if "out of bounds" not in str(error):
                raise
            raise ValueError(f"labels must be from 0 to {output.shape[-1] - 1}: {error}") from error
        if self.label_smoothing:
            each = (1 - self.label_smoothing) * each - self.label_smoothing * log_p.mean(-1)
        return _mean(each, weight)


def _mean(each: Tensor, weight: Tensor | None) -> Tensor:
    return each.mean() if weight is None else (weight * each).sum() / weight.sum()


NAMED: dict[str, Loss] = {"mse": MSE(), "cross_entropy": CrossEntropy()}


@dataclass(frozen=True, eq=False)
class _Unhashable:
    """A callable that cannot be hashed, such as a plain dataclass: known by its identity."""

    loss: Loss

    def __call__(self, *args: Tensor) -> Tensor:
        return self.loss(*args)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Unhashable) and other.loss is self.loss

    def __hash__(self) -> int:
        return id(self.loss)


def resolve(loss: str | Loss) -> Loss:
    """The loss of that name, or the callable itself. ValueError for an unknown name, else TypeError."""
    if isinstance(loss, str):
        if loss not in NAMED:
            raise ValueError(f"loss must be one of {sorted(NAMED)} or a callable, got {loss!r}")
        return NAMED[loss]
    if isinstance(loss, type):
        raise TypeError(
            f"loss must be an object of the class {loss.__name__}, not the class: {loss.__name__}()"
        )
    if not callable(loss):
        raise TypeError(f"loss must be one of {sorted(NAMED)} or a callable, got {type(loss).__name__}")
    try:
        hash(loss)
    except TypeError:
        return _Unhashable(loss)
    return loss


def built_in(loss: Any) -> Loss | None:
    """What a loss of torch's means, for targets that fit the other: see arguments.understood."""
    if loss is F.mse_loss or (type(loss) is nn.MSELoss and loss.reduction == "mean"):
        return MSE()
    if loss is F.cross_entropy:
        return CrossEntropy()
    if type(loss) is nn.CrossEntropyLoss:
        as_usual = loss.reduction == "mean" and loss.weight is None and loss.ignore_index == IGNORED
        return CrossEntropy(loss.label_smoothing) if as_usual else None
    return None
