"""The `triton` backend, whole: interpreted on the CPU, or on the GPU where there is one."""

import gc
import importlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import naive_passes
import pytest
import torch
import torch.nn.functional as F
from cases import Case, cases, error
from hypothesis import given, settings
from hypothesis import strategies as st
from rounding import UNIT, as_on_a_gpu
from test_random_programs import CHECK, FUNCTIONS, KNOWN, _everything, conditioning, inner_loop, meta_loss
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastmaml
from fastmaml import functional, reference
from fastmaml.backends import BACKENDS, backends, problem_for, small_mlp, triton
from fastmaml.backends.engine import Engine
from fastmaml.backends.sweep import make_plan
from fastmaml.forms import LinearLayer, Sizes, fastest
from fastmaml.losses import MSE, CrossEntropy

pytest.importorskip("triton")
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"


def mlp(*widths: int, act: Any = nn.ReLU, norm: bool = False) -> nn.Module:
    layers: list[nn.Module] = []
    for i, o in pairwise(widths[:-1]):
        layers += [nn.Linear(i, o), *([nn.BatchNorm1d(o)] if norm else []), act()]
    return nn.Sequential(*layers, nn.Linear(widths[-2], widths[-1])).double()


def case_of(model: nn.Module, loss: Any, T: int, N: int, Q: int, steps: int, **how: Any) -> Case:
    torch.manual_seed(0)
    I, O = model[0].in_features, model[-1].out_features  # pyright: ignore

    def tasks(n: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(T, n, I, dtype=torch.float64, requires_grad=True)
        y = torch.randint(O, (T, n)) if isinstance(loss, CrossEntropy) else torch.randn(T, n, O).double()
        return x, y

    params = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    lr = torch.tensor(0.05, dtype=torch.float64, requires_grad=True)
    return Case(model, params, tasks(N), tasks(Q), loss, lr, steps, how.get("first_order", False))


def on_device(case: Case) -> Case:
    return case.to(device=DEVICE)


def check(case: Case, function=meta_loss, how: dict[str, Any] | None = None) -> None:
    how = how or {}
    truth = _everything(function, reference, case, how)
    actual = _everything(function, functional, on_device(case), {**how, "backend": "triton"})
    errors = {n: error(actual[n].cpu(), truth[n]) for n in truth}
    if not all(e <= 1e-10 for e in errors.values()):
        bound = 100 * torch.finfo(torch.float64).eps * conditioning(function, case, how)
        assert all(e < bound for e in errors.values()), errors


def test_random_programs() -> None:
    @settings(CHECK, max_examples=30)
    @given(
        case=cases(max_width=17), function=st.sampled_from(FUNCTIONS + 2 * [meta_loss]), knobs=st.booleans()
    )
    def test(case: Case, function, knobs: bool) -> None:
        if case.support[0].shape[0] * max(case.steps, 1) > 15 and not GPU:
            return  # the interpreter takes a millisecond for a tile
        how: dict = {"chunk_tasks": 2} if knobs else {}
        if knobs and function in FUNCTIONS[:2]:
            how["checkpoint_every"] = 2
        check(case, function, how)

    test()


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize(
    ("model", "loss", "sizes"),
    [
        (mlp(1, 40, 40, 1), MSE(), (3, 10, 10, 2)),
        (mlp(11, 100, 100, 6, act=nn.Tanh), MSE(), (2, 7, 9, 2)),
        (mlp(784, 256, 128, 64, 64, 5, norm=True), CrossEntropy(), (2, 5, 8, 1)),
    ],
    ids=["sine", "policy", "omniglot-mlp"],
)
def test_models(model: nn.Module, loss: Any, sizes: tuple[int, ...], first_order: bool) -> None:
    T, N, Q, steps = sizes
    check(case_of(model, loss, T, N, Q, steps, first_order=first_order))


@pytest.mark.parametrize("loss", [MSE(), CrossEntropy(0.1)], ids=["mse", "cross_entropy"])
@pytest.mark.parametrize("act", [nn.ReLU, nn.Tanh, nn.GELU, nn.Sigmoid])
def test_one_program_a_task(act: Any, loss: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a small network whose meta-gradient by the parameters alone is wanted"""
    runs = []
    monkeypatch.setattr(small_mlp.SmallMlp, "load", lambda e, q: (runs.append(1), Engine.load(e, q)))
    for number, (lr, first_order) in enumerate([(0.1, False), (0.1, True), (None, False)]):
        case = case_of(
            mlp(3, 20, 17, 4, act=act), loss, 3, 5 + 10 * (number == 0), 6, 3, first_order=first_order
        )
        for x, _ in (case.support, case.query):
            x.requires_grad_(False)
        names = case.params
        case.lr = lr or {n: torch.rand((), dtype=torch.float64) / 10 for n in names}
        if number == 2:
            weights = torch.rand(3, 5, dtype=torch.float64) + 0.1
            case = replace(case, support=(case.support[0], (case.support[1], weights)))
        if GPU:
            case = case.to(torch.float32)
            case.model.float()
        truth = _everything(meta_loss, reference, case, {})
        actual = _everything(meta_loss, functional, on_device(case), {"backend": "triton"})
        assert all(error(actual[n].cpu(), truth[n]) <= (1e-4 if GPU else 1e-13) for n in truth)
    assert len(runs) == 3


def test_a_norm_joins_the_linear_layer_before_it() -> None:
    """But not one that takes an activation of it"""
    layers = [nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.LayerNorm(4)]
    model = nn.Sequential(
        *layers, nn.Linear(4, 130), nn.LayerNorm(130), nn.GELU(), nn.Linear(130, 2)
    ).double()
    nodes = make_plan(problem_for(model, (3,), MSE()), naive_passes.types).nodes
    assert [node.joins for node in nodes if node.name.endswith("norm")] == [True, False, True]
    check(case_of(model, MSE(), 2, 4, 6, 2))


def test_float32_is_as_accurate_as_the_reference() -> None:
    case = case_of(mlp(5, 33, 17, 3, act=nn.Tanh), MSE(), 3, 6, 4, 3)
    truth = _everything(meta_loss, reference, case, {})
    single = case.to(torch.float32)
    case.model.float()
    same = _everything(meta_loss, reference, single, {})
    actual = _everything(meta_loss, functional, on_device(single), {"backend": "triton"})
    for n in truth:
        floor = 16 * torch.finfo(torch.float32).eps
        assert error(actual[n].cpu(), truth[n]) <= 2 * error(same[n], truth[n]) + floor


def rms(a: Tensor) -> float:
    return float(a.double().square().mean().sqrt())


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
@pytest.mark.parametrize(
    ("widths", "sizes"),
    [((5, 33, 17, 3), (3, 6, 4, 3)), ((1, 40, 40, 1), (3, 10, 10, 5))],
    ids=["small", "sine"],
)
@as_on_a_gpu()
def test_whole_loops_round_where_plain_torch_does(
    widths: tuple[int, ...], sizes: tuple[int, ...], precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the same sweeps in plain torch with rounded operands. A float32 sum may come out on the other
    side of a step of rounding there, so the distance is held to a quarter of the whole effect of rounding."""
    monkeypatch.setitem(BACKENDS, "naive", naive_passes.backend(precision))
    T, N, Q, steps = sizes
    case = case_of(mlp(*widths, act=nn.Tanh), MSE(), T, N, Q, steps)
    truth = _everything(meta_loss, reference, case, {})
    single = case.to(torch.float32)
    case.model.float()
    same = _everything(meta_loss, functional, single, {"backend": "naive"})
    how = {"backend": "triton", "precision": precision}
    actual = {n: a.cpu() for n, a in _everything(meta_loss, functional, on_device(single), how).items()}
    for n in truth:
        assert rms(actual[n] - same[n]) <= rms(actual[n] - truth[n]) / 4 + 2**-20 * rms(truth[n])
    assert UNIT[precision] < max(error(actual[n], truth[n]) for n in truth) < 8 * UNIT[precision]


@pytest.fixture
def torchs() -> Iterator[Callable[[str], None]]:
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision("highest")


@as_on_a_gpu()
def test_products_are_as_told_or_as_torchs_setting_says(torchs: Callable[[str], None]) -> None:
    model, x = mlp(5, 33, 3).float(), torch.randn(2, 6, 5, device=DEVICE)
    params = {n: p.detach().to(DEVICE) for n, p in model.named_parameters()}
    run = lambda **how: functional.apply(model, params, x, backend="triton", **how)  # noqa: E731
    told = {precision: run(precision=precision) for precision in ("ieee", "tf32", "bf16")}
    assert len({tuple(a.flatten().tolist()) for a in told.values()}) == 3
    for precision, setting in (("ieee", "highest"), ("tf32", "high"), ("bf16", "medium")):
        torchs(setting)
        assert torch.equal(run(), told[precision])
        assert torch.equal(run(precision="ieee"), told["ieee"])


def test_factored_layers_are_chosen_by_counts() -> None:
    """Wide layers with few rows stay factored on a GPU; narrow ones and many rows do not."""
    wide = LinearLayer(0, 1024, 1024, 1, False, False)
    narrow = LinearLayer(1, 40, 40, 1, False, False)
    assert fastest([wide, narrow], Sizes(32, 5, 75, 5, 1, False, True)) == {0}
    assert fastest([wide], Sizes(32, 1000, 75, 5, 1, False, True)) == set()


def test_inner_axes_and_parameters_that_nothing_uses() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)
            self.unused = nn.Parameter(torch.ones(2))

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.tanh(self.first(x)))

    model = Model().double()
    params = {n: p.detach().to(DEVICE) for n, p in model.named_parameters()}
    x, y = torch.randn(2, 5, 4, 3).double().to(DEVICE), torch.randn(2, 5, 4, 2).double().to(DEVICE)
    out = functional.apply(model, params, x, backend="triton")
    truth = reference.apply(model, params, x)
    assert out.shape == truth.shape == (2, 5, 4, 2)
    torch.testing.assert_close(out, truth)
    how = {"loss": MSE(), "lr": 0.1, "steps": 2, "optimizer": fastmaml.SGD(0.0, 0.5)}
    fast = functional.inner_loop(model, params, x, y, **how, backend="triton")
    for n, w in reference.inner_loop(model, params, x, y, **how).items():
        torch.testing.assert_close(fast[n], w)


def test_the_step_size_of_a_parameter_that_nothing_uses() -> None:
    model = mlp(3, 4, 2, act=nn.Tanh)
    model.register_parameter("unused", nn.Parameter(torch.ones(5).double()))
    case = case_of(model, MSE(), 2, 4, 5, 2)
    case.lr = {n: torch.tensor(0.1, dtype=torch.float64, requires_grad=True) for n in case.params}
    case.optimizer = fastmaml.SGD(0.9, 0.1)
    check(case, inner_loop)


class Nothing(nn.Module):
    """Its output depends on no parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(F.layer_norm(x, (3,)))


@pytest.mark.parametrize(
    "model", [Nothing(), nn.Sequential(nn.LayerNorm(3, elementwise_affine=False), nn.Tanh(), nn.Linear(3, 3))]
)
def test_ops_before_any_parameter(model: nn.Module) -> None:
    """A gradient by x goes through them"""
    model = model.double()
    params = {n: p.detach().requires_grad_() for n, p in model.named_parameters()}
    tasks = [(torch.randn(2, n, 3).double(), torch.randn(2, n, 3).double()) for n in (4, 5)]
    for x, _ in tasks:
        x.requires_grad_()
    case = Case(model, params, tasks[0], tasks[1], MSE(), 0.1, 2, False)
    check(case)


def test_each_form_has_an_engine_and_one_of_inference_mode_serves_training() -> None:
    model = mlp(3, 40, 40, 2)
    case = on_device(case_of(model, MSE(), 2, 3, 4, 2))
    with torch.inference_mode():
        meta_loss(functional, case, backend="triton")
    first = meta_loss(functional, case, backend="triton")
    second = meta_loss(functional, replace(case, fast_weights="factored"), backend="triton")
    torch.testing.assert_close(first, second)
    problem = problem_for(model, (3,), MSE())
    engines = [recorded.engine for recorded in problem.memo["triton"].values()]
    assert sorted(len(engine.sweep.rows) for engine in engines)[-1] == 3
    assert sorted(len(engine.sweep.rows) for engine in engines)[0] == 0


class Allocations(TorchDispatchMode):
    """The ops that make memory"""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        given, result = (
            {a.untyped_storage().data_ptr() for a in tree_leaves(of) if isinstance(a, Tensor)}
            for of in ((args, kwargs), made)
        )
        self.names += [func._schema.name] * bool(result - given)
        return made


@pytest.mark.parametrize("each", [False, True], ids=["a step size", "one for each tensor"])
@pytest.mark.parametrize(
    ("form", "optimizer"),
    [("dense", None), ("factored", None), ("dense", fastmaml.SGD(0.9, 0.1))],
    ids=["dense", "factored", "an optimizer"],
)
def test_a_run_allocates_nothing(
    form: str, each: bool, optimizer: fastmaml.SGD | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside its kernels, which do nothing here"""
    names = importlib.import_module("fastmaml.kernels").__all__
    passes = SimpleNamespace(**dict.fromkeys(names, lambda *_, **__: None) | {"types": naive_passes.types})
    monkeypatch.setitem(KNOWN, "none", naive_passes.backend(passes=passes))
    run, made = Engine.run, []

    def watched(engine: Engine) -> None:
        with Allocations() as allocations:
            run(engine)
        made.append(allocations.names)

    monkeypatch.setattr(Engine, "run", watched)
    case = case_of(mlp(3, 40, 40, 2, norm=True), MSE(), 2, 3, 4, 3)
    if each:
        case.lr = {n: torch.tensor(0.1, dtype=torch.float64, requires_grad=True) for n in case.params}
    case = replace(case, fast_weights=form, step_weights=[0.0, 0.5, 1.0], optimizer=optimizer)
    meta_loss(functional, case, backend="none")
    for x, _ in (case.support, case.query):
        x.requires_grad_(False)
    meta_loss(functional, case, backend="none")
    assert made == [[]] * 4


def test_engines_go_with_their_model() -> None:
    model = mlp(2, 5, 1)
    case = on_device(case_of(model, MSE(), 2, 3, 4, 2))
    meta_loss(functional, case, backend="triton")
    problem = problem_for(model, (2,), MSE())
    engine = weakref.ref(next(iter(problem.memo["triton"].values())).engine)
    gc.disable()
    try:
        problem.memo.clear()
        assert engine() is None
    finally:
        gc.enable()


def test_a_second_call_with_other_data_and_the_first_again() -> None:
    model = mlp(2, 5, 1, act=nn.Tanh)
    one, other = (case_of(model, MSE(), 2, 3, 4, 2) for _ in range(2))
    other = replace(other, support=(other.support[0] * 2, other.support[1] + 1))
    first = _everything(meta_loss, functional, on_device(one), {"backend": "triton"})
    check(other)
    again = _everything(meta_loss, functional, on_device(one), {"backend": "triton"})
    assert all(torch.equal(first[n], again[n]) for n in first)


def test_results_are_copies() -> None:
    model = mlp(2, 5, 1)
    case = on_device(case_of(model, MSE(), 2, 3, 4, 2))
    how = {"loss": MSE(), "lr": 0.1, "steps": 1, "backend": "triton"}
    fast = functional.inner_loop(model, case.params, *case.support, **how)
    before = {n: w.detach().clone() for n, w in fast.items()}
    functional.inner_loop(model, case.params, case.support[0] + 1, case.support[1], **how)
    assert all(torch.equal(fast[n], before[n]) for n in before)


@pytest.mark.skipif(GPU, reason="there is a GPU")
def test_emulation_is_named_so_and_never_chosen() -> None:
    model = mlp(2, 5, 1)
    x = torch.randn(2, 3, 2, dtype=torch.float64)
    assert "triton: emulated here, runs when named" in fastmaml.explain(model, x)
    assert "backend: triton" not in fastmaml.explain(model, x)
    (info,) = (info for info in backends() if info.name == "triton")
    assert info.available
    assert "emulation" in info.note


def test_what_it_does_not_take_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp(2, 5, 1)
    x = torch.randn(2, 3, 2)
    problem = problem_for(model, (2,), MSE())
    assert "float16" in str(triton.supports(problem, torch.device(DEVICE), torch.float16))
    monkeypatch.setattr(triton, "EMULATED", False)
    assert triton.supports(problem, x.device, x.dtype) == "it takes CUDA tensors, not cpu"
    monkeypatch.setattr(triton, "kernels", lambda: "triton cannot be imported (for this test)")
    assert triton.supports(problem, torch.device("cuda"), x.dtype) == triton.kernels()


@pytest.mark.parametrize(
    ("norm", "loss", "why"),
    [
        (nn.BatchNorm1d, MSE(), "a batch norm over the rows of a task has 6 numbers, it takes 5"),
        (nn.LayerNorm, MSE(), "a layer norm has 7 numbers, it takes 5"),
        (nn.Identity, CrossEntropy(), "an output of classes has 7 numbers, it takes 5"),
    ],
)
def test_a_group_too_long_for_a_program_is_refused_before_anything_runs(
    norm: Any, loss: Any, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.import_module("fastmaml.kernels"), "GROUP_MOST", 5)
    outputs = 7 if norm is not nn.BatchNorm1d else 3
    model = nn.Sequential(nn.Linear(2, outputs), norm(outputs), nn.Linear(outputs, outputs)).double()
    case = on_device(case_of(model, loss, 2, 4, 6, 1))
    with pytest.raises(RuntimeError, match=f"backend 'triton' cannot run this: {why}"):
        meta_loss(functional, case, backend="triton")
    problem = problem_for(model, (2,), loss)
    assert triton.misfit(problem, (4, 5)) == (None if norm is nn.BatchNorm1d else why)


def test_naive_passes_are_the_same_namespace() -> None:
    kernels = importlib.import_module("fastmaml.kernels")
    assert set(kernels.__all__) - {"GROUP_MOST", "MLP_MOST"} <= set(dir(naive_passes))
