"""Whole meta-steps of every case: the meta-gradient in both forms, adapt, evaluate; on the cpu backend.

Each is first held to fastmaml.reference in float64, on a few of the case's tasks.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import fastmaml
from bench.cases import CASES, Case
from bench.measure import error
from bench.meta_step import RIGHT
from fastmaml import functional, reference

FEW = 2  # tasks of the check in float64
BACKEND = "cpu"
Run = Callable[[], list[Tensor]]


def _how(case: Case) -> dict[str, Any]:
    return {"loss": case.loss, "lr": case.lr, "steps": case.steps}


def _gradient(case: Case, dtype: torch.dtype) -> Run:
    model, (support, query) = case.model(dtype), case.data(dtype)
    params = dict(model.named_parameters())

    def run() -> list[Tensor]:
        _, grads = functional.meta_value_and_grad(
            model, params, support, query, **_how(case), backend=BACKEND
        )
        return list(grads.values())

    return run


def _backward(case: Case, dtype: torch.dtype) -> Run:
    model, (support, query) = case.model(dtype), case.data(dtype)
    params = dict(model.named_parameters())

    def run() -> list[Tensor]:
        for p in params.values():
            p.grad = None
        functional.meta_loss(model, params, support, query, **_how(case), backend=BACKEND).backward()
        return [p.grad for p in params.values() if p.grad is not None]

    return run


def _adapt(case: Case, dtype: torch.dtype) -> Run:
    maml = fastmaml.MAML(case.model(dtype), **_how(case), backend=BACKEND)
    support, _ = case.data(dtype)
    return lambda: list(maml.adapt(*support).values())


def _evaluate(case: Case, dtype: torch.dtype) -> Run:
    maml = fastmaml.MAML(case.model(dtype), **_how(case), backend=BACKEND)
    support, query = case.data(dtype)
    return lambda: [a for a in maml.evaluate(*support, *query) if a is not None]


@cache
def _true_gradient(case: Case) -> list[Tensor]:
    model, (support, query) = case.model(torch.float64), case.data(torch.float64)
    params = dict(model.named_parameters())
    return list(reference.meta_value_and_grad(model, params, support, query, **_how(case))[1].values())


def _true_weights(case: Case) -> list[Tensor]:
    model, (support, _) = case.model(torch.float64), case.data(torch.float64)
    fast = reference.inner_loop(model, dict(model.named_parameters()), *support, **_how(case))
    return [a.detach() for a in fast.values()]


@torch.no_grad()
def _true_evaluation(case: Case) -> list[Tensor]:
    model, (support, (x, y)) = case.model(torch.float64), case.data(torch.float64)
    losses, hits = [], []
    for k in range(case.steps + 1):
        how: dict[str, Any] = _how(case) | {"steps": k}
        params = dict(model.named_parameters())
        losses.append(reference.meta_loss(model, params, support, (x, y), **how, reduction="none"))
        if case.loss == "cross_entropy":
            output = reference.apply(model, reference.inner_loop(model, params, *support, **how), x)
            hits.append((output.argmax(-1) == y).double().mean(1))
    return [torch.stack(a) for a in (losses, hits) if a]


FUNCTIONS = {
    "meta_value_and_grad": (_gradient, _true_gradient),
    "meta_loss_backward": (_backward, _true_gradient),
    "adapt": (_adapt, _true_weights),
    "evaluate": (_evaluate, _true_evaluation),
}


@pytest.mark.benchmark(warmup=True, warmup_iterations=2, min_rounds=5, max_time=0.5)
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_meta_step(benchmark, case: Case, function: str) -> None:
    build, truth = FUNCTIONS[function]
    few = replace(case, tasks=FEW)
    assert error(build(few, torch.float64)(), truth(few)) <= RIGHT
    benchmark.group = f"meta-step {case.name}"
    found = benchmark(build(case, torch.float32))
    assert all(a.isfinite().all() for a in found)
