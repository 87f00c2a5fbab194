"""fastmaml.functional can stand in for fastmaml.reference: same names, same arguments, same defaults."""

import inspect

import pytest
import torch
from cases import error
from torch import nn

from fastmaml import functional, reference
from fastmaml.backends import cpu

NAMES = ["apply", "value_and_grad", "hvp", "inner_loop", "meta_loss", "meta_value_and_grad"]
BACKENDS = ["torch"] if cpu.available() is not None else ["cpu", "torch"]


def _public(module) -> set[str]:
    functions = inspect.getmembers(module, inspect.isfunction)
    return {n for n, f in functions if f.__module__ == module.__name__ and not n.startswith("_")}


def test_names() -> None:
    assert _public(functional) == _public(reference) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_signature(name: str) -> None:
    ours, theirs = (
        [(p.name, p.kind, p.default) for p in inspect.signature(getattr(m, name)).parameters.values()]
        for m in (functional, reference)
    )
    assert ours == theirs


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("how", [{}, {"chunk_tasks": 2}, {"first_order": True, "checkpoint_every": 1}])
def test_meta_value_and_grad(backend: str, reduction: str, own: bool, how: dict) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    model[0].bias.requires_grad_(False)  # frozen: the inner loop leaves it, the meta-gradient has it
    T = 3
    params = {
        n: torch.randn((T, *p.shape) if own else p.shape, dtype=torch.float64)
        for n, p in model.named_parameters()
    }
    support, query = (
        (torch.randn(T, n, 3, dtype=torch.float64), torch.randn(T, n, 2, dtype=torch.float64)) for n in (4, 5)
    )
    call = {"loss": "mse", "lr": 0.1, "steps": 3, "reduction": reduction} | how
    value, grads = functional.meta_value_and_grad(model, params, support, query, backend=backend, **call)
    truth, expected = reference.meta_value_and_grad(model, params, support, query, **call)
    assert error(value, truth) < 1e-12
    assert list(grads) == list(expected)
    for n in grads:
        assert grads[n].shape == expected[n].shape
        assert error(grads[n], expected[n]) < 1e-12, n


def test_meta_value_and_grad_has_no_reduction_none() -> None:
    model = nn.Linear(1, 1)
    x = torch.randn(2, 3, 1)
    with pytest.raises(ValueError, match='"mean" or "sum"'):
        functional.meta_value_and_grad(
            model,
            dict(model.named_parameters()),
            (x, x),
            (x, x),
            loss="mse",
            lr=0.1,
            steps=1,
            reduction="none",
        )
