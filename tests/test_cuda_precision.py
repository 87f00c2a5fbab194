"""The `cuda` backend with TF32 and bfloat16 operands: on a GPU where there is one, else its emulation.

tests/cuda/test_mma.cpp holds the products to the engine of csrc/cpu bit by bit, on numbers that rounding
keeps.
"""

from collections.abc import Callable, Iterator
from typing import Any

import naive_passes
import pytest
import torch
from cases import error
from test_cuda_values import DEVICE, MODELS, SIZES, mlp
from test_random_programs import KNOWN
from torch import Tensor, nn

import fastmaml
from fastmaml import functional, reference
from fastmaml.backends import cuda
from fastmaml.explain import explain
from fastmaml.losses import MSE

pytestmark = pytest.mark.skipif(cuda.available() is not None, reason=cuda.available() or "")

# what rounding moves a number by at most, of itself: half of its last place
UNIT = {"tf32": 2.0**-11, "bf16": 2.0**-8}
FLOAT = 2.0**-24
OF_TORCH = {"ieee": "highest", "tf32": "high", "bf16": "medium"}
ROUNDED = pytest.mark.parametrize("precision", list(UNIT))


def rounded(a: Tensor, precision: str) -> Tensor:
    """TF32 keeps 10 bits, ties away from zero; bfloat16 has 7, ties to even."""
    if precision == "bf16":
        return a.bfloat16().float()
    return ((a.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def slack(precision: str, n: int) -> float:
    """What a sum of n products is off by, of that of their absolute values: (1 + u)^2 - 1 for the operands of
    each, and a float32 rounding for each of the sums, of the update and of the operands' own making."""
    u = UNIT[precision]
    return 2 * u + u * u + (n + 8) * FLOAT


@ROUNDED
def test_operands_are_rounded_to_the_nearest(precision: str) -> None:
    """Times 1, ties included: of TF32 they lie at 2^-11, of bfloat16 at 2^-8."""
    x = torch.tensor([a + b * 2**-c for a in (1, -1, 3) for b in (1, 3, 5, -1) for c in range(6, 14)])
    x = torch.cat([x, x * 2**60, x * 2**-60])[None, :, None].to(DEVICE)
    model, w = nn.Linear(1, 1, bias=False), torch.ones(1, 1).to(x)
    out = functional.apply(model, {"weight": w}, x, backend="cuda", precision=precision)
    assert torch.equal(out, rounded(x, precision))
    assert not torch.equal(out, x)


@ROUNDED
@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"N{s[0]}-C{s[1]}")
def test_a_layer_is_as_far_off_as_rounding_allows(size: tuple[int, int], precision: str) -> None:
    """Every product of y = x w^T + b, of the mse's gradients and of their tangents, number by number."""
    (N, I), O, T = size, 7, 2
    model = nn.Linear(I, O).to(DEVICE)
    double = {"dtype": torch.float64, "device": DEVICE}
    x, y = torch.randn(T, N, I, **double).float(), torch.randn(T, N, O, **double).float()
    params = {n: p.detach() for n, p in model.named_parameters()}
    v = {n: torch.randn_like(p) for n, p in params.items()}

    def everything(f, dtype, **how) -> list[Tensor]:
        cast = lambda d: {n: a.to(dtype) for n, a in d.items()}  # noqa: E731
        ws = {n: p.requires_grad_() for n, p in cast(params).items()}
        at, call = x.to(dtype, copy=True).requires_grad_(), (y.to(dtype),)
        out = f.apply(model.to(dtype), ws, at, **how)
        _, grads = f.value_and_grad(model, ws, at, *call, loss="mse", **how)
        along = sum((g * cast(v)[n]).sum() for n, g in grads.items())
        assert isinstance(along, Tensor)
        second = torch.autograd.grad(along, [ws["weight"], at])
        return [a.detach().double() for a in (out, grads["weight"], *second)]

    truth = everything(reference, torch.float64)
    actual = everything(functional, torch.float32, backend="cuda", precision=precision)
    # the same formulas on absolute values: |y|, |d| and what either is off by
    w, t_w, b, t_b = (a.abs().double() for a in (params["weight"], v["weight"], params["bias"], v["bias"]))
    x_, s = x.abs().double(), 2 / (N * O)
    y_, t_y = x_ @ w.mT + b, x_ @ t_w.mT + t_b
    off_y, off_t_y = slack(precision, I) * y_, slack(precision, I) * t_y
    d, t_d = s * (y_ + y.abs()), s * t_y
    off_d, off_t_d = s * off_y + 4 * FLOAT * d, s * off_t_y + 4 * FLOAT * t_d

    def off(a: Tensor, off_a: Tensor, b: Tensor, n: int) -> Tensor:
        return slack(precision, n) * (a @ b) + (1 + slack(precision, n)) * (off_a @ b)

    bounds = [
        off_y,
        off(d.mT, off_d.mT, x_, N),
        off(t_d.mT, off_t_d.mT, x_, N).sum(0),
        off(t_d, off_t_d, w, O) + off(d, off_d, t_w, O),
    ]
    for i, (got, wanted, bound) in enumerate(zip(actual, truth, bounds, strict=True)):
        assert ((got - wanted).abs() <= bound).all(), (i, ((got - wanted).abs() / bound).max())
    if I > 4:  # and so far off that the operands must have been rounded
        assert all(error(a, t) > UNIT[precision] / 64 for a, t in zip(actual, truth, strict=True))


def meta_gradients(f: Any, name: str, dtype: torch.dtype, **how: Any) -> list[Tensor]:
    make, N, Q, steps = MODELS[name]
    torch.manual_seed(0)
    model, T = make().to(DEVICE, dtype), 2
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    I, O = linear[0].in_features, linear[-1].out_features
    x = [torch.randn(T, n, I, dtype=torch.float64, device=DEVICE).to(dtype) for n in (N, Q)]
    y = [torch.randn(T, n, O, dtype=torch.float64, device=DEVICE).to(dtype) for n in (N, Q)]
    lr = torch.tensor(0.02, dtype=dtype, device=DEVICE, requires_grad=True)
    leaves = [*model.parameters(), lr, *(a.requires_grad_() for a in x)]
    sets = list(zip(x, y, strict=True))
    params, form = dict(model.named_parameters()), {"fast_weights": "dense"}
    value = f.meta_loss(model, params, *sets, loss=MSE(), lr=lr, steps=steps, **form, **how)
    return [value.detach().double(), *(g.double() for g in torch.autograd.grad(value, leaves))]


@ROUNDED
@pytest.mark.parametrize("name", ["smooth sine", "policy", "wide", "many examples"])
def test_a_model_rounds_where_plain_torch_does(
    name: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the same sweeps in plain torch with rounded operands. A sum of float32 may come out on the
    other side of a tie there: few numbers differ by their last place then, but what they lead to agrees no
    more, so the distance is held to a quarter of the whole effect of rounding. That, from the reference, is
    at most 2 u for each product that a result comes through one after another: forward and back, plain and
    tangent, each layer of each step."""
    if cuda.EMULATED:
        monkeypatch.setattr(cuda, "shared_limit", lambda device: 1 << 20)

    def product(a: Tensor, b: Tensor, _: str) -> Tensor:
        return rounded(a, precision) @ rounded(b, precision)

    monkeypatch.setattr(naive_passes, "product", product)
    monkeypatch.setitem(KNOWN, "naive", naive_passes.backend())
    truth = meta_gradients(reference, name, torch.float64)
    actual = meta_gradients(functional, name, torch.float32, backend="cuda", precision=precision)
    plain = meta_gradients(functional, name, torch.float32, backend="naive")
    layers, steps = len(MODELS[name][0]()) // 2 + 1, MODELS[name][3]
    for got, same, wanted in zip(actual, plain, truth, strict=True):
        size, off = wanted.abs().max(), (got - wanted).abs()
        assert off.max() <= 4 * layers * (steps + 1) * 2 * UNIT[precision] * size
        assert (got - same).square().mean().sqrt() <= off.square().mean().sqrt() / 4 + 16 * FLOAT * size
    assert max(map(error, actual, truth)) > UNIT[precision] / 4


@pytest.fixture
def torchs() -> Iterator[Callable[[str], None]]:
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision("highest")


def test_it_is_as_told_or_as_torchs_setting_says(torchs: Callable[[str], None]) -> None:
    model, x = mlp(3, 9, 4).to(DEVICE), torch.randn(2, 5, 3).to(DEVICE)
    run = lambda **how: functional.apply(model, dict(model.named_parameters()), x, backend="cuda", **how)  # noqa: E731
    told = {precision: run(precision=precision) for precision in OF_TORCH}
    assert torch.equal(run(), told["ieee"])
    assert len({tuple(a.flatten().tolist()) for a in told.values()}) == 3
    for precision, name in OF_TORCH.items():
        torchs(name)
        assert torch.equal(run(), told[precision])
        assert torch.equal(run(precision="tf32"), told["tf32"])


def test_every_function_and_its_derivative_takes_it() -> None:
    """The products of each are rounded: none is lost on the way to the kernels."""
    model = mlp(3, 9, 4).to(DEVICE)
    x, y = torch.randn(2, 5, 3).to(DEVICE), torch.randn(2, 5, 4).to(DEVICE)
    params = {n: p.detach().requires_grad_() for n, p in model.named_parameters()}
    v, call = {n: torch.randn_like(p) for n, p in params.items()}, {"loss": "mse", "backend": "cuda"}
    steps = {**call, "lr": 0.1, "steps": 2}

    def backward(total: Any) -> Tensor:
        return torch.autograd.grad(total, params["0.weight"])[0]

    def results(precision: str) -> list[Tensor]:
        how: dict[str, Any] = {"precision": precision}
        out = functional.apply(model, params, x, backend="cuda", **how)
        value, grads = functional.value_and_grad(model, params, x, y, **call, **how)
        fast = functional.inner_loop(model, params, x, y, **steps, **how)
        loss = functional.meta_loss(model, params, (x, y), (x, y), **steps, **how)
        maml = fastmaml.MAML(model, loss="mse", lr=0.1, steps=2, backend="cuda", **how)
        return [
            out, backward((out * y).sum()), value, *grads.values(),
            backward(sum((grads[n] * v[n]).sum() for n in v)),
            *functional.hvp(model, params, v, x, y, **call, **how).values(),
            *fast.values(), backward(sum((fast[n] * v[n]).sum() for n in v)),
            loss, backward(loss),
            *functional.meta_value_and_grad(model, params, (x, y), (x, y), **steps, **how)[1].values(),
            maml(x, y, x, y), *maml.adapt(x, y).values(), maml.evaluate(x, y, x, y).loss,
        ]  # fmt: skip

    for exact, rounded_ in zip(results("ieee"), results("bf16"), strict=True):
        assert 1e-5 < error(rounded_.detach(), exact.detach().double()) < 0.1


def test_explain_shows_it(torchs: Callable[[str], None]) -> None:
    model, x = mlp(3, 9, 4).to(DEVICE), torch.zeros(2, 5, 3, device=DEVICE)
    assert "cuda's products: of float32 numbers" in explain(model, x)
    assert "cuda's products: of numbers rounded to TF32" in explain(model, x, precision="tf32")
    torchs("medium")
    assert "cuda's products: of numbers rounded to bfloat16" in explain(model, x)
    assert "products" not in explain(model.double(), x.double())
    with pytest.raises(ValueError, match="precision must be one of"):
        explain(model, x, precision="fp32")


def test_float64_is_never_rounded() -> None:
    model, x = mlp(3, 9, 4).to(DEVICE, torch.float64), torch.randn(2, 5, 3).to(DEVICE, torch.float64)
    params = dict(model.named_parameters())
    found = [functional.apply(model, params, x, backend="cuda", precision=told) for told in OF_TORCH]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
