"""The generic sweep and the recursion over it, driven by passes in plain torch, against the reference."""

import importlib
from types import ModuleType, SimpleNamespace

import naive_passes
import pytest
from cases import Case, cases, error
from hypothesis import given, settings
from hypothesis import strategies as st
from test_random_programs import CHECK, FUNCTIONS, _everything, conditioning, meta_loss

from fastmaml import functional, reference
from fastmaml.backends import BACKENDS
from fastmaml.backends.engine import Engine
from fastmaml.backends.request import Functions, Request, Result

torch = importlib.import_module("torch")


@pytest.fixture
def naive(monkeypatch: pytest.MonkeyPatch) -> str:
    """A backend of the naive passes, whose name it returns."""

    def run(request: Request) -> Result:
        engine = Engine(naive_passes, request)
        for _ in range(2):  # the second call finds its buffers used
            engine.load(request)
            engine.run()
        return engine.result()

    functions = Functions(run)
    names = "apply", "apply_backward", "value_and_grad", "value_and_grad_backward", "inner_loop"
    names = *names, "inner_loop_backward", "meta_loss"
    backend = SimpleNamespace(
        **{name: getattr(functions, name) for name in names}, supports=lambda *_: None, EMULATED=True
    )
    monkeypatch.setitem(BACKENDS, "naive", backend)  # pyright: ignore[reportArgumentType]
    return "naive"


def test_random_programs(naive: str) -> None:
    @settings(CHECK, max_examples=200)
    @given(case=cases(), function=st.sampled_from(FUNCTIONS + 2 * [meta_loss]), knobs=st.booleans())
    def check(case: Case, function, knobs: bool) -> None:
        case.fast_weights = None
        how: dict = {"chunk_tasks": 2} if knobs else {}
        if knobs and function in FUNCTIONS[:2]:
            how["checkpoint_every"] = 2
        truth = _everything(function, reference, case, how)
        actual = _everything(function, functional, case, {**how, "backend": naive})
        errors = {n: error(actual[n], truth[n]) for n in truth}
        if not all(e <= 1e-10 for e in errors.values()):
            bound = 100 * torch.finfo(torch.float64).eps * conditioning(function, case, how)
            assert all(e < bound for e in errors.values()), errors

    check()


def test_the_kernels_offer_what_the_sweep_asks_for() -> None:
    kernels: ModuleType = importlib.import_module("fastmaml.kernels")
    assert {n for n in kernels.__all__ if n != "types"} <= set(dir(naive_passes))
