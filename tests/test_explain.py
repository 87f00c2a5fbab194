"""explain() says what a model became, which backend runs it, and why not the others."""

import re
from typing import Any

import pytest
import torch
from torch import nn

from fastmaml import SGD, functional
from fastmaml.autograd import run_meta
from fastmaml.explain import explain


def test_explain_shows_ops_backends_and_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, 3), nn.LeakyReLU(0.2), nn.Linear(3, 2))
    model.register_parameter("spare", nn.Parameter(torch.zeros(2)))
    model[1].bias.requires_grad_(False)
    x = torch.zeros(2, 5, 2, 3)
    said = str(explain(model, x, loss="cross_entropy"))
    for part in (
        "[N, 6]",
        "1.weight [3, 6], 1.bias [3] frozen",
        "leaky_relu(#1; negative_slope=0.2)",
        "[N, 2]",
    ):
        assert part in said
    assert "gradient is zero: spare" in said
    assert "not torch: it could" in said or "not cpu:" in said
    assert repr(explain(model, x)).startswith("Sequential: 3 layer ops")

    said = explain(nn.Conv2d(2, 1, 1), torch.zeros(2, 5, 2, 3, 3), loss="mse")
    assert "has no Program: the model (Conv2d): conv2d has no layer op" in said
    assert "backend: torch" in said
    monkeypatch.setenv("FASTMAML_BACKEND", "torch")
    assert "by FASTMAML_BACKEND" in explain(model, x)
    with pytest.raises(ValueError, match=re.escape("x must have shape [T, N, ...], got [3]")):
        explain(model, torch.zeros(3))


@pytest.mark.parametrize("optimizer", [None, SGD(0.9)], ids=str)
@pytest.mark.parametrize("form", [None, "factored", {"2.weight": "factored"}], ids=str)
@pytest.mark.parametrize("backend", ["cpu", "triton", "cuda", "torch"])
def test_the_forms_it_tells_are_those_that_run(
    backend: str, form: Any, optimizer: SGD | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1024, 32), nn.ReLU(), nn.Linear(32, 5))
    (x, y), (x_q, y_q) = ((torch.randn(4, n, 1024), torch.randint(5, (4, n))) for n in (5, 8))
    monkeypatch.setenv("FASTMAML_BACKEND", backend)
    how = {"steps": 2, "optimizer": optimizer, "fast_weights": form}
    said = explain(model, x, "cross_entropy", queries=8, **how)
    if f"but {backend} cannot run this" in said:
        assert "fast weights in meta_loss" not in said
        pytest.skip(f"no backend {backend} for these tensors")
    ran = []
    monkeypatch.setattr(
        functional, "run_meta", lambda how, *data: (ran.append(how[-1]), run_meta(how, *data))[1]
    )
    params = dict(model.named_parameters())
    functional.meta_value_and_grad(model, params, (x, y), (x_q, y_q), loss="cross_entropy", lr=0.1, **how)
    told = dict(re.findall(r"^  (\S+) +\[\d+, \d+\] +(dense|factored)", said, re.MULTILINE))
    names = list(params)
    assert told == {n: "factored" if names.index(n) in ran[0] else "dense" for n in ("0.weight", "2.weight")}
    without_kernels = backend == "cuda" or (backend == "triton" and optimizer is not None)
    assert (f"{backend} has no kernels for factored weights" in said) == without_kernels
