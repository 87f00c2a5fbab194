"""What docs/why.py prints: grad(vmap(task)) is wrong through LayerNorm and BatchNorm, fastmaml is right."""

import runpy
from pathlib import Path

import pytest
import torch
from torch.func import vmap

from fastmaml import reference

why = runpy.run_path(str(Path(__file__).parents[1] / "docs" / "why.py"))
Problem, relative_error = why["Problem"], why["relative_error"]

FAULTY = ["LayerNorm", "BatchNorm1d", "conv + BatchNorm2d"]
RIGHT = ["conv + GroupNorm"]
WHAT = ["meta-gradient", "HVP"]
TOLERANCE = 1e-6  # of central differences; the fault is 2e-3 and more


@pytest.fixture(scope="module")
def routes():
    """(model, what) -> {route: gradient [P]}, each computed once."""
    known = {}

    def of(name: str, what: str) -> dict[str, torch.Tensor]:
        if (name, what) not in known:
            known[name, what] = Problem(name).gradients(what)
        return known[name, what]

    return of


@pytest.mark.parametrize("what", WHAT)
@pytest.mark.parametrize("name", FAULTY + RIGHT)
@pytest.mark.parametrize("route", ["loop", "fast"])
def test_right(routes, name, what, route):
    found = routes(name, what)
    assert relative_error(found[route], found["truth"]) < TOLERANCE


@pytest.mark.parametrize("what", WHAT)
@pytest.mark.parametrize("name", FAULTY)
@pytest.mark.xfail(strict=True, raises=AssertionError, reason="pytorch/functorch#534")
def test_grad_of_vmap(routes, name, what):
    """Passes, and so fails as strict xfail, on a torch that is mended: docs/why.md then has to say so."""
    found = routes(name, what)
    assert relative_error(found["vmap"], found["truth"]) < TOLERANCE


@pytest.mark.parametrize("what", WHAT)
@pytest.mark.parametrize("name", RIGHT)
def test_grad_of_vmap_without_fault(routes, name, what):
    found = routes(name, what)
    assert relative_error(found["vmap"], found["truth"]) < TOLERANCE


@pytest.mark.parametrize("name", FAULTY + RIGHT)
def test_first_derivatives_are_right_in_vmap(name):
    problem = Problem(name)
    slope = vmap(lambda x, y: problem.slope(problem.params, x, y))(*problem.support)
    each = [problem.slope(problem.params, x, y) for x, y in zip(*problem.support, strict=True)]
    torch.testing.assert_close(slope, torch.stack(each), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", FAULTY + RIGHT)
def test_reference(routes, name):
    problem = Problem(name)
    params = {n: p.clone().requires_grad_() for n, p in problem.params.items()}
    loss = reference.meta_loss(
        problem.model, params, problem.support, problem.query, loss="mse", lr=why["LR"], steps=1
    )
    gradients = torch.autograd.grad(loss, list(params.values()))
    truth = routes(name, "meta-gradient")["truth"]
    assert relative_error(torch.cat([g.reshape(-1) for g in gradients]), truth) < TOLERANCE

    products = reference.hvp(problem.model, problem.params, problem.v, *problem.support, loss="mse")
    product = torch.cat([h.mean(0).reshape(-1) for h in products.values()])
    assert relative_error(product, routes(name, "HVP")["truth"]) < TOLERANCE
