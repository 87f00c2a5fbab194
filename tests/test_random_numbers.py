"""A model that draws random numbers is refused: each sweep would draw others; gradients would be wrong."""

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from modules import Function, L
from torch import nn

import fastmaml
from fastmaml import functional, reference

T, N = 3, 4
AVAILABLE = [b.name for b in fastmaml.backends() if b.available]


def between(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(L(), nn.Sequential(*layers), L())


def noisy(self, x):
    return x + torch.rand(4)


DRAWING = {
    "Dropout": lambda: between(nn.Dropout(0.3)),
    "Dropout1d": lambda: between(nn.Unflatten(1, (2, 2)), nn.Dropout1d(0.3), nn.Flatten()),
    "AlphaDropout": lambda: between(nn.AlphaDropout(0.3)),
    "FeatureAlphaDropout": lambda: between(nn.FeatureAlphaDropout(0.3)),
    "RReLU": lambda: between(nn.RReLU()),
    "GRU": lambda: between(
        nn.Unflatten(1, (2, 2)),
        Function(lambda s, x: s.a(x)[0], a=nn.GRU(2, 2, 2, dropout=0.3)),
        nn.Flatten(),
    ),
    "Function": lambda: between(Function(noisy)),
    "inside a function": lambda: between(Function(lambda s, x: F.dropout(x))),
    "after a convolution": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 4)), nn.Conv1d(1, 2, 3, padding=1), nn.Flatten(), nn.Dropout(0.3), nn.Linear(8, 4)
    ),
}


DATA = torch.randn(T, N, 4), torch.randn(T, N, 4)


def call(model: nn.Module, backend: str | None, loss: Any = "mse") -> torch.Tensor:
    params = dict(model.named_parameters())
    return functional.meta_loss(model, params, DATA, DATA, loss=loss, lr=0.1, steps=2, backend=backend)


@pytest.mark.parametrize("name", DRAWING)
def test_no_backend_takes_it_and_the_error_names_the_module_and_the_cure(name):
    model, before = DRAWING[name](), torch.get_rng_state()
    for backend in (None, "torch"):
        with pytest.raises(RuntimeError) as caught:
            call(model, backend)
        said = str(caught.value)
        assert (
            "no backend can run this (cpu: " in said if backend is None else "backend 'torch' cannot" in said
        )
        path = "3" if name == "after a convolution" else r"1\.\d(\.a)?"
        assert re.search(rf"'{path}' \({name if name[0].isupper() else ''}", said)
        assert "fastmaml.reference" in said
        assert name == "RReLU" or "model.eval()" in said  # RReLU: vmap knows it in neither mode
    assert torch.equal(before, torch.get_rng_state())
    options = {"loss": "mse", "lr": 0.1, "steps": 2}
    reference.meta_loss(model, dict(model.named_parameters()), DATA, DATA, **options).backward()


@pytest.mark.parametrize("backend", AVAILABLE)
@pytest.mark.parametrize("cure", ["eval", "p"])
def test_dropout_that_draws_nothing_is_the_identity(backend, cure):
    dropouts = nn.Dropout(0.3), nn.AlphaDropout(0.3)
    model = between(*dropouts)
    first, _, last = model.children()
    x = torch.randn(T, N, 4)
    params = dict(model.named_parameters())
    with pytest.raises(RuntimeError, match=r"model\.eval"):
        functional.apply(model, params, x, backend=backend)
    if cure == "eval":
        model.eval()
    else:
        for dropout in dropouts:
            dropout.p = 0
    expected = last(first(x))
    torch.testing.assert_close(functional.apply(model, params, x, backend=backend), expected)
    model.train()
    dropouts[0].p = 0.5  # noticed, though neither the modules nor their mode changed
    with pytest.raises(RuntimeError, match=r"model\.eval"):
        functional.apply(model, params, x, backend=backend)


def test_attention_without_dropout_draws_nothing():
    attention = nn.MultiheadAttention(2, 1, batch_first=True)
    call(
        between(nn.Unflatten(1, (2, 2)), Function(lambda s, x: s.a(x, x, x)[0], a=attention), nn.Flatten()),
        backend="torch",
    )


def test_a_loss_that_draws_is_refused():
    with pytest.raises(RuntimeError, match="the model or the loss draws random numbers"):
        call(L(), "torch", loss=lambda out, y: F.mse_loss(F.dropout(out), y))
