"""What has no layer op is refused before any work, naming the module and the reason."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from modules import Function, L, W
from torch import Tensor, nn

from fastmaml.program import Unsupported, trace


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x + x

    @staticmethod
    def backward(ctx, g: Tensor) -> Tensor:
        return g


def no_grad(self: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        h = self.a(x)
    return h + x


def hooked() -> nn.Module:
    model = nn.Sequential(L(), nn.ReLU())
    model[1].register_full_backward_hook(lambda *_: None)
    return model


def inner(f: Callable[..., Any], **parts: nn.Module | Tensor) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Identity(), nn.Sequential(nn.Tanh(), Function(f, **parts)))


REFUSED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str, str]] = {
    "convolution": (
        lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU()),
        (1, 8, 8),
        "0",
        "conv2d has no layer op",
    ),
    "pooling": (lambda: nn.Sequential(L(), nn.Sequential(nn.MaxPool1d(2))), (2, 4), "1.0", "max_pool1d"),
    "dropout": (lambda: nn.Sequential(L(), nn.Dropout(0.2)), (4,), "1", "p=0.2 in training mode"),
    "batch norm of signals": (lambda: nn.BatchNorm1d(4), (4, 3), "", r"shape \[C\] only"),
    "layer norm over two axes": (lambda: nn.LayerNorm([4, 3]), (4, 3), "", "last axis only"),
    "multiplication": (inner(lambda s, x: x * torch.sigmoid(x)), (4,), "1.1", "F.silu"),
    "matmul": (inner(lambda s, x: x @ s.a.weight.t(), a=L()), (4,), "1.1", "F.linear"),
    "a parameter as a value": (
        inner(lambda s, x: x + s.b, b=W(4)),
        (4,),
        "1.1",
        r"parameter 1\.1\.b as a value",
    ),
    "a constant": (inner(lambda s, x: x + 1), (4,), "1.1", "constant 1"),
    "alpha": (inner(lambda s, x: torch.add(x, x, alpha=2)), (4,), "1.1", "alpha=2"),
    "broadcasting": (inner(lambda s, x: s.a(x) + s.b(x), a=L(), b=L(4, 1)), (4,), "1.1", "one shape"),
    "detach": (inner(lambda s, x: x.detach()), (4,), "1.1", "detach"),
    "no_grad": (inner(no_grad, a=L()), (4,), "1.1.a", "no_grad"),
    "own autograd function": (inner(lambda s, x: Doubled.apply(x)), (4,), "1.1", "custom autograd function"),
    "several outputs": (lambda: Function(lambda s, x: (x, x)), (4,), "", "returned tuple"),
    "examples merged": (
        inner(lambda s, x: s.a(x.view(-1, 4)), a=L()),
        (2, 4),
        "1.1",
        r"\[N, 2, 4\] to \[2 N, 4\]",
    ),
    "examples reshaped": (inner(lambda s, x: x.view(len(x), 2, 3)), (6,), "1.1", "only flattening"),
    "squeeze": (inner(lambda s, x: s.a(x).squeeze(-1), a=L(4, 1)), (4,), "1.1", "keep the last axis"),
    "number of examples": (
        lambda: Function(lambda s, x: s.a(x) if len(x) > 1 else x, a=L()),
        (4,),
        "",
        "number of exam",
    ),
    "values of x": (inner(lambda s, x: s.a(x) if x.sum() > 0 else x, a=L()), (4,), "1.1", "sum"),
    "values of parameters": (
        inner(lambda s, x: x if s.a.weight.mean() > 0 else s.a(x), a=L()),
        (4,),
        "1.1",
        "mean",
    ),
    "constants": (inner(lambda s, x: x + torch.ones(4)), (4,), "1.1", "ones"),
    "a weight that is no parameter": (
        inner(lambda s, x: F.linear(x, s.c), c=nn.Buffer(torch.ones(4, 4))),
        (4,),
        "1.1",
        "is not one of model.named_parameters",
    ),
    "computed weights": (
        lambda: nn.Sequential(L(), nn.utils.parametrizations.weight_norm(L())),
        (4,),
        "1.parametrizations.weight.0",
        "_weight_norm",
    ),
    "hooks": (hooked, (4,), "1", "backward hooks"),
    "an error of its own": (
        inner(lambda s, x: x.no_such_thing()),
        (4,),
        "1.1",
        "AttributeError.*no_such_thing",
    ),
    "recurrence": (lambda: nn.Sequential(nn.GRU(4, 4)), (3, 4), "0", "no layer op"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_naming_the_module_and_the_reason(name: str) -> None:
    make, shape, module, why = REFUSED[name]
    with pytest.raises(Unsupported, match=why) as caught:
        trace(make(), shape)
    assert caught.value.module == module
    assert (f"'{module}' (" if module else "the model (") in str(caught.value)


@pytest.mark.parametrize(
    ("model", "shape", "message"),
    [
        (
            nn.Sequential(nn.ReLU(), L(17, 5)),
            (16,),
            "'1' (Linear): input must have shape [N, .., 17], got [N, 16]",
        ),
        (nn.LayerNorm(3), (2, 4), "input must have shape [N, .., 3], got [N, 2, 4]"),
        (nn.Sequential(nn.BatchNorm1d(3)), (4,), "'0' (BatchNorm1d): weight must have shape [4], got [3]"),
        (nn.LazyLinear(3), (4,), "parameter weight has no shape yet"),
    ],
)
@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_an_input_that_cannot_fit_is_an_error(model: nn.Module, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        trace(model, shape)
