"""The kernel of a small MLP's whole inner loop against plain autograd, held to it as the passes are."""

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from test_kernels import check, types
from torch import Tensor


@dataclass
class WholeLoop:
    support: tuple[Tensor | None, ...]
    query: tuple[Tensor | None, ...]
    w: Tensor
    lr: Tensor
    scale: Tensor
    kept: Tensor
    v: Tensor | None
    loss: Tensor


def check_mlp(widths: tuple[int, ...], sizes: tuple[int, ...], act: Any, classes: bool, variant: int) -> None:
    """variant: which of the options. Where the flat vectors hold no parameter, NaN is in them and stays."""
    torch.manual_seed(variant)
    (I, H, G, O), (T, N, Q, K) = widths, sizes
    places, end = [], 0
    for size in (H * I, H, G * H, G, O * G, O):
        places.append(end)
        end += size + 3
    w = torch.full((1 if variant % 2 else T, end), math.nan).double()
    for at, after in zip(places, [*places[1:], end], strict=True):
        w[:, at : after - 3] = torch.randn(len(w), after - 3 - at).double() / 2

    def examples(n: int, weighted: bool) -> tuple[Tensor | None, ...]:
        y = torch.randint(O, (T, n)) if classes else torch.randn(T, n, O).double()
        return torch.randn(T, n, I).double(), y, torch.rand(T, n).double() if weighted else None

    v = None if variant == 3 else torch.zeros(T, end).double()
    case = WholeLoop(
        examples(N, variant == 1), examples(Q, variant == 2), w,
        torch.rand(K, (1, 6)[variant % 2]).double() / 2, torch.rand(1).double(),
        torch.zeros(K, T, end).double(), v, torch.zeros(T).double(),
    )  # fmt: skip
    how = {"classes": classes, "smoothing": 0.1 * (variant % 2), "steps": K, "first_order": variant == 2}
    check(
        lambda passes, c: passes.mlp(*vars(c).values(), widths, tuple(places), act, **how),
        case,
        lambda c: [t for t in (c.kept, c.v, c.loss) if t is not None],
    )


@pytest.mark.parametrize("variant", range(4))
@pytest.mark.parametrize("classes", [False, True], ids=["mse", "cross_entropy"])
def test_whole_loop_of_each(classes: bool, variant: int) -> None:
    act = types.Activation(("tanh", "silu")[variant % 2])
    check_mlp((1, 17, 5, 3), (2, 5, 3, 2), act, classes, variant)
