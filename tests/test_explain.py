"""explain() says what a model became, which backend runs it, and why not the others."""

import re

import pytest
import torch
from torch import nn

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
