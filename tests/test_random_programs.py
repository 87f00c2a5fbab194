"""Every function and every derivative of each backend against `fastmaml.reference`, on random programs."""

from typing import Any

import naive_passes
import pytest
import torch
from cases import Case, cases, error, gradients
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastmaml import functional, reference
from fastmaml.backends import BACKENDS as KNOWN
from fastmaml.backends import cpu
from fastmaml.backends.sweep import Frames

# no shrinking: a draw is a whole network with its tasks, and costs a second in the reference
CHECK = settings(
    deadline=None,
    derandomize=True,
    suppress_health_check=[*HealthCheck],  # pyright: ignore[reportArgumentType]
    print_blob=False,
    phases=[Phase.explicit, Phase.generate],
)
BACKENDS = ["torch"] if cpu.available() is not None else ["cpu", "torch"]


def meta_loss(f, c: Case, **how) -> Tensor:
    return f.meta_loss(
        c.model,
        c.params,
        c.support,
        c.query,
        loss=c.loss,
        lr=c.lr,
        steps=c.steps,
        first_order=c.first_order,
        fast_weights=c.fast_weights,
        optimizer=c.optimizer,
        step_weights=c.step_weights,
        **how,
    )


def inner_loop(f, c: Case, **how) -> Tensor:
    how |= {"lr": c.lr, "steps": c.steps, "first_order": c.first_order, "optimizer": c.optimizer}
    fast = f.inner_loop(c.model, c.params, *c.support, loss=c.loss, **how)
    return torch.stack([_mix(w) for w in fast.values()]).sum()


def value_and_grad(f, c: Case, **how) -> Tensor:
    value, grads = f.value_and_grad(c.model, c.params, *c.query, loss=c.loss, **how)
    return _mix(value) + sum(_mix(g) for g in grads.values())


def apply(f, c: Case, **how) -> Tensor:
    return _mix(f.apply(c.model, c.params, c.query[0], **how))


def _mix(a: Tensor) -> Tensor:
    """A number that depends on every element in its own way"""
    places = torch.arange(a.numel(), dtype=torch.float64, device=a.device)
    return (a * torch.sin(places).to(a.dtype).view(a.shape)).sum()


FUNCTIONS = [meta_loss, inner_loop, value_and_grad, apply]


def conditioning(function, c: Case, how: dict) -> float:
    """The relative change of the reference's own result over that of the parameters, for one of 1e-13; or
    over what float32 rounds, if more: little left of large numbers need not change with the parameters."""
    before = _everything(function, reference, c, how)
    generator = torch.Generator().manual_seed(0)
    moved = Case(**vars(c))
    moved.params = {
        n: (
            p.detach() * (1 + 1e-13 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
        ).requires_grad_()
        for n, p in c.params.items()
    }
    after = _everything(function, reference, moved, how)
    c.model.float()
    rounded = _everything(function, reference, c.to(torch.float32), how)
    c.model.double()
    changes = (after, 1e-13), (rounded, torch.finfo(torch.float32).eps)
    return max(error(found[n], before[n]) / by for found, by in changes for n in before)


def _everything(function, f, c: Case, how: dict) -> dict[str, Tensor]:
    value = function(f, c, **how)
    return {"value": value.detach().reshape(1), **gradients(value, c)}


def test_what_is_compared_is_where_the_tensors_are() -> None:
    """A meta tensor does not mix with those of the CPU, as one of a GPU does not."""
    a = torch.zeros(2, 3, requires_grad=True)
    case = Case(torch.nn.Identity(), {"w": a}, (a, a), (a, a), None, a, 1, False).to(torch.float64, "meta")
    found = gradients(_mix(case.lr), case)  # by the others: zeros
    assert {(g.device.type, g.dtype) for g in found.values()} == {("meta", torch.float64)}


def test_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KNOWN, "naive", naive_passes.backend())
    new = Frames._new

    def filled(self, b: int, wanted: bool) -> Any:
        a = new(self, b, wanted)
        return a if a is None else a.fill_(float("nan"))  # read before it is written, it shows

    monkeypatch.setattr(Frames, "_new", filled)

    @settings(CHECK, max_examples=300)
    @given(
        case=cases(), function=st.sampled_from(FUNCTIONS + 2 * [meta_loss, inner_loop]), knobs=st.booleans()
    )
    def check(case: Case, function, knobs: bool) -> None:
        how: dict = {"chunk_tasks": 2} if knobs else {}
        if knobs and function in (meta_loss, inner_loop):
            how["checkpoint_every"] = 2
        if function is meta_loss:
            how["reduction"] = "sum"
        truth = _everything(function, reference, case, how)
        for backend in [*BACKENDS, "naive"]:
            drawn = case
            actual = _everything(function, functional, drawn, {**how, "backend": backend})
            errors = {n: error(actual[n], truth[n]) for n in truth}
            if not all(e <= 1e-10 for e in errors.values()):  # only as far as the draw is ill-conditioned
                bound = 100 * torch.finfo(torch.float64).eps * conditioning(function, case, how)
                assert all(e < bound for e in errors.values()), (backend, errors)

    check()


def test_float32_is_as_accurate_as_the_reference() -> None:
    @settings(CHECK, max_examples=100)
    @given(case=cases(smooth=True, norms=False, max_width=24))
    def check(case: Case) -> None:
        truth = _everything(meta_loss, reference, case, {})
        single = case.to(torch.float32)
        case.model.float()
        same = _everything(meta_loss, reference, single, {})
        for backend in BACKENDS:
            actual = _everything(meta_loss, functional, single, {"backend": backend})
            for n in truth:
                floor = 16 * torch.finfo(torch.float32).eps
                ours, theirs = error(actual[n], truth[n]), error(same[n], truth[n])
                assert ours <= 2 * theirs + floor, f"{backend}, {n}: {ours:.1e} off, reference {theirs:.1e}"

    check()


def test_hvp() -> None:
    @settings(CHECK, max_examples=60)
    @given(case=cases())
    def check(case: Case) -> None:
        v = {n: torch.randn_like(p).detach() for n, p in case.params.items()}
        call = case.model, case.params, v, *case.query
        truth = reference.hvp(*call, loss=case.loss)
        scale = max(float(a.detach().abs().max()) for a in truth.values())
        for backend in BACKENDS:
            actual = functional.hvp(*call, loss=case.loss, backend=backend)
            for n in truth:
                worst = float((actual[n] - truth[n]).detach().abs().max())
                assert worst <= 1e-10 * scale + 1e-12, (backend, n)

    check()
