"""Small ways to write a model."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Function(nn.Module):
    """A model whose forward is `f(self, x)`, with the given submodules and parameters."""

    def __init__(self, f: Callable[..., Any], **parts: nn.Module | Tensor) -> None:
        super().__init__()
        self.f = f
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.f(self, x)


def L(i: int = 4, o: int = 4, **kwargs: bool) -> nn.Linear:
    return nn.Linear(i, o, **kwargs)


def W(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape))
