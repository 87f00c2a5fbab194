"""Bad input gets a clear error before any work, on every backend alike."""

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from modules import Function, L
from torch import nn

import fastmaml
from fastmaml import CrossEntropy, functional, reference

T, N, I, C = 2, 4, 3, 5


@pytest.fixture
def model():
    return nn.Sequential(nn.Linear(I, 7), nn.Tanh(), nn.Linear(7, C))


@pytest.fixture
def given(model):
    """Valid arguments of meta_loss, for a test to spoil one of."""
    x, y = torch.randn(T, N, I), torch.randn(T, N, C)
    return {
        "model": model,
        "params": dict(model.named_parameters()),
        "support": (x, y),
        "query": (x, y),
        "loss": "mse",
        "lr": 0.1,
        "steps": 2,
        "backend": "torch",
    }


def raises(error, match, given, **spoiled):
    with pytest.raises(error, match=match):
        functional.meta_loss(**(given | spoiled))


def test_valid_arguments_pass(given):
    assert functional.meta_loss(**given).shape == ()


@pytest.mark.parametrize(
    ("x", "error", "match"),
    [
        (torch.randn(N, I), ValueError, r"support x must have shape \[T, N, ...\]"),
        (torch.randn(0, N, I), ValueError, r"T, N >= 1, got \[0, 4, 3\]"),
        (torch.randn(T, 0, I), ValueError, r"T, N >= 1"),
        (torch.zeros(T, N, I, dtype=torch.int64), TypeError, "floating point, got torch.int64"),
        (torch.randn(T, N, I).double(), TypeError, r"dtype torch.float64, as x, got torch.float32"),
        (torch.randn(T, N, I).tolist(), TypeError, "must be a tensor, got list"),
    ],
)
def test_x(given, x, error, match):
    raises(error, match, given, support=(x, given["support"][1]))


def test_params_that_are_no_dict(given):
    raises(TypeError, "must be a dict name -> tensor, got list", given, params=list(given["params"].values()))


def test_a_call_like_the_last_one_is_checked_too(model, monkeypatch):
    """A signature stands for the checks then: whatever it leaves out goes unnoticed."""
    params = dict(model.named_parameters())
    x, y = torch.randn(T, N, I), torch.randint(C, (T, N))
    call = {"loss": "cross_entropy", "lr": 0.1, "steps": 1}

    def run(params=params, x_s=x, y_s: Any = y, x_q=x, y_q=y, **how):
        return functional.meta_loss(model, params, (x_s, y_s), (x_q, y_q), **(call | how))

    first = run()
    assert torch.equal(run(), first)
    for error, match, spoiled in [
        (
            ValueError,
            "support y must hold labels from 0 to 4, got 0 to 5",
            {"y_s": torch.tensor(T * [[0, 1, 2, 5]])},
        ),
        (ValueError, "query y must hold labels", {"y_q": -torch.ones_like(y)}),
        (ValueError, "query y must have shape", {"y_q": y[:, :2].contiguous()}),
        (TypeError, "class indices", {"y_s": y.int()}),
        (TypeError, "query x must be torch.float32", {"x_q": x.double()}),
        (ValueError, "missing", {"params": params | {"more": x}}),
        (ValueError, "steps must be at least 0", {"steps": -1}),
        (TypeError, "steps must be an integer", {"steps": 1.0}),  # equal to that of the last call
        (TypeError, "steps must be an integer", {"steps": True}),
        (ValueError, "loss must be one of", {"loss": "mean"}),
        (TypeError, "optimizer must be", {"optimizer": 0.9}),
        (ValueError, "fast_weights must be None", {"fast_weights": ["0.weight"]}),
        (ValueError, r"query x must have shape \[T, N", {"x_q": x[0, 0]}),
        (ValueError, "chunk_tasks must be at least 1", {"chunk_tasks": 0}),
        (ValueError, "precision must be one of", {"precision": "tf16"}),
        (ValueError, "list of 3", {"lr": [0.1, 0.1, 0.1]}),
    ]:
        with pytest.raises(error, match=match):
            run(**spoiled)
        assert torch.equal(run(), first)
    more: dict[str, Any]
    for more in ({"lr": 0.2}, {"steps": 2}, {"optimizer": fastmaml.SGD(0, 0.1)}, {"lr": 1}):
        assert not torch.equal(run(**more), first)
    weights = torch.tensor([0.5, 0.5])
    both = run(steps=2, step_weights=weights)
    assert torch.allclose(run(steps=2, step_weights=weights.mul_(2)), 2 * both)
    with pytest.raises(ValueError, match="no derivative here"):
        run(steps=2, step_weights=weights.requires_grad_())
    run(step_weights=(1.0,))
    with pytest.raises(TypeError, match="must be a number"):
        run(step_weights=(True,))
    monkeypatch.setenv("FASTMAML_BACKEND", "none")
    with pytest.raises(ValueError, match="backend must be one of"):
        run()
    monkeypatch.delenv("FASTMAML_BACKEND")
    reordered = {n: params[n] for n in reversed(params)}
    assert torch.equal(run(params=reordered), first)
    assert torch.equal(run(params=reordered), first)
    assert not torch.equal(run(y_s=(y, torch.rand(T, N))), first)
    assert torch.equal(run(x_s=x.mT.contiguous().mT), first)


def test_x_that_the_model_cannot_take(given):
    x = torch.randn(T, N, I + 1)
    with pytest.raises((ValueError, RuntimeError)):
        functional.meta_loss(
            **(given | {"support": (x, given["support"][1]), "query": (x, given["query"][1])})
        )


def test_support_and_query_are_of_the_same_tasks(given):
    x, y = given["query"]
    raises(ValueError, r"query x must have shape \[2, 4, 3\], got \[1, 4, 3\]", given, query=(x[:1], y[:1]))
    raises(ValueError, "query x must have shape", given, query=(torch.randn(T, N, I + 1), y))
    raises(TypeError, "query x must be torch.float32", given, query=(x.double(), y))


def test_targets(given):
    x, y = given["support"]
    raises(
        ValueError, r"support y must have shape \[2, 4, 5\], got \[2, 4, 4\]", given, support=(x, y[..., :4])
    )
    raises(ValueError, r"query y must have shape \[2, 4, 5\], got \[2, 3, 5\]", given, query=(x, y[:, :3]))
    raises(TypeError, "support y must have dtype torch.float32", given, support=(x, y.double()))
    raises(ValueError, "reference", given, support=(x, y.clone().requires_grad_()))
    raises(
        ValueError, r"weight of support y must have shape \[2, 4\]", given, support=(x, (y, torch.rand(T)))
    )


def test_targets_that_are_no_tensors(given):
    x, y = given["support"]
    wanted = r"y must be a tensor or a pair \(target, weight\), got "
    raises(TypeError, f"support {wanted}NoneType", given, support=(x, None))
    raises(TypeError, f"query {wanted}ndarray", given, query=(x, y.numpy()))
    raises(TypeError, f"query {wanted}list of 3", given, query=(x, [*y, y]))
    raises(TypeError, f"query {wanted}tuple of 1", given, query=(x, (y,)))
    raises(
        TypeError,
        "weight of support y must be a tensor or None, got ndarray",
        given,
        support=(x, (y, np.ones((T, N)))),
    )
    with pytest.raises(TypeError, match=f"^{wanted}NoneType"):
        functional.value_and_grad(given["model"], given["params"], x, None, loss="mse")


@pytest.mark.parametrize("name", ["support", "query"])
def test_sets_are_pairs(given, name):
    x, y = given[name]
    raises(TypeError, rf"{name} must be a pair \(x, y\), got Tensor", given, **{name: x})
    raises(TypeError, rf"{name} must be a pair \(x, y\), got tuple of 3", given, **{name: (x, y, y)})
    raises(TypeError, rf"{name} must be a pair \(x, y\), got NoneType", given, **{name: None})


def test_models(given):
    raises(TypeError, "model must be an nn.Module, got function", given, model=lambda x: x)
    raises(TypeError, "model must be an nn.Module, got type", given, model=nn.Linear)
    with pytest.raises(TypeError, match=r"nn\.Module"):
        functional.apply(lambda x: x, {}, given["support"][0])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"nn\.Module"):
        fastmaml.explain(lambda x: x, given["support"][0])  # type: ignore[arg-type]


def test_a_model_with_more_than_one_output(given):
    model = Function(lambda self, x: (self.a(x), x), a=L(I, C))
    spoiled = {"model": model, "params": dict(model.named_parameters())}
    raises(TypeError, "the model must return one tensor, returned tuple", given, **spoiled)
    with pytest.raises(TypeError, match="must return one tensor"):
        reference.apply(model, spoiled["params"], given["support"][0])


@pytest.mark.parametrize("label", [-1, C])
def test_labels_for_a_model_without_kernels(given, label):
    model = nn.Sequential(nn.Linear(I, C), nn.Softplus())
    x, good = given["support"][0], torch.randint(C, (T, N))
    given |= {"model": model, "params": dict(model.named_parameters()), "loss": "cross_entropy"}
    given |= {"support": (x, good), "query": (x, good)}
    functional.meta_loss(**given)
    bad = good.clone()
    bad[0, 1] = label
    raises(ValueError, rf"labels must be from 0 to 4: .*{label}", given, query=(x, bad))


def test_labels(given):
    x, _ = given["support"]
    good = torch.randint(C, (T, N))
    given |= {"support": (x, good), "query": (x, good), "loss": "cross_entropy"}
    functional.meta_loss(**given)
    for bad in (good.clone().fill_(C), good - C):
        raises(ValueError, "query y must hold labels from 0 to 4", given, query=(x, bad))
    raises(TypeError, "class indices of dtype torch.int64", given, query=(x, good.float()))
    raises(ValueError, r"must have shape \[2, 4\]", given, query=(x, good[..., None]))


def test_params(given):
    params = given["params"]
    short = {n: p for n, p in params.items() if n != "0.bias"}
    raises(ValueError, r"missing \['0.bias'\], unexpected \[\]", given, params=short)
    raises(ValueError, r"missing \[\], unexpected \['more'\]", given, params=params | {"more": torch.ones(1)})
    wide = params | {"0.bias": torch.randn(8)}
    raises(ValueError, r"params\['0.bias'\] must have shape \[7\] or \[2, 7\], got \[8\]", given, params=wide)
    raises(TypeError, "dtype", given, params=params | {"0.bias": torch.randn(7).double()})
    for bad, kind in ((np.zeros(7, np.float32), "ndarray"), (0.0, "float"), (None, "NoneType")):
        raises(
            TypeError,
            rf"params\['0.bias'\] must be a tensor, got {kind}",
            given,
            params=params | {"0.bias": bad},
        )


def test_lr(given):
    names = list(given["params"])
    raises(ValueError, r"a list of steps = 2, got a list of 3", given, lr=[0.1] * 3)
    raises(TypeError, "lr must be a number.*got str", given, lr="0.1")
    raises(ValueError, r"missing \['2.bias'\]", given, lr=dict.fromkeys(names[:-1], 0.1))
    raises(ValueError, r"unexpected \['more'\]", given, lr=dict.fromkeys([*names, "more"], 0.1))
    wide = dict.fromkeys(names, 0.1) | {"0.bias": torch.rand(6)}
    raises(ValueError, r"lr\['0.bias'\] must broadcast to \[7\], got \[6\]", given, lr=wide)
    listed = r"lr must have shape \[\], got \[2\]: .* a list of numbers or 0-d tensors"
    raises(ValueError, listed, given, lr=torch.rand(2))
    raises(ValueError, r"a list of steps = 2, got a list of 1", given, lr=nn.ParameterList([torch.ones(())]))


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.int64, Fraction])
def test_lr_of_any_kind_of_number(given, kind):
    lr = kind(Fraction(1, 4)) if kind is not np.int64 else kind(1)
    for each in (lr, [lr, lr], dict.fromkeys(given["params"], lr)):
        plain = {"lr": float(lr)}
        assert torch.equal(
            functional.meta_loss(**(given | {"lr": each})), functional.meta_loss(**(given | plain))
        )


@pytest.mark.parametrize(
    ("option", "value", "error"),
    [
        ("steps", -1, ValueError),
        ("steps", 1.5, TypeError),
        ("steps", None, TypeError),
        ("chunk_tasks", 0, ValueError),
        ("checkpoint_every", 0, ValueError),
        ("reduction", "max", ValueError),
        ("loss", "hinge", ValueError),
        ("loss", 3, TypeError),
        ("loss", nn.MSELoss, TypeError),
        ("loss", CrossEntropy, TypeError),
        ("backend", "gpu", ValueError),
        ("precision", "fp16", ValueError),
        ("precision", torch.bfloat16, ValueError),
    ],
)
def test_options(given, option, value, error):
    raises(error, option, given, **{option: value})


def test_batch_norm_needs_two_examples(given):
    model = nn.Sequential(nn.Linear(I, C), nn.BatchNorm1d(C))
    x, y = given["query"]
    spoiled = {"model": model, "params": dict(model.named_parameters()), "query": (x[:, :1], y[:, :1])}
    raises(ValueError, "more than 1 value per channel", given, **spoiled)


def test_a_named_backend_that_cannot_says_why(given):
    model = nn.Sequential(nn.Linear(I, C), nn.Softplus())
    spoiled = {"model": model, "params": dict(model.named_parameters()), "backend": "cpu"}
    raises(RuntimeError, "cpu", given, **spoiled)


def test_falling_to_the_torch_backend_warns_once(given):
    model = nn.Sequential(nn.Linear(I, C), nn.Softplus())
    given |= {"model": model, "params": dict(model.named_parameters()), "backend": None}
    with pytest.warns(UserWarning, match="torch backend"):
        functional.meta_loss(**given)
    functional.meta_loss(**given)


def test_one_derivative_more_names_the_reference(given):
    params = list(given["params"].values())
    loss = functional.meta_loss(**given)
    grads = torch.autograd.grad(loss, params, create_graph=True)
    with pytest.raises(RuntimeError, match=r"fastmaml\.reference"):
        grads[0].sum().backward()
    x, y = given["support"]
    options = {"loss": "mse", "backend": "torch"}
    product = functional.hvp(given["model"], given["params"], given["params"], x, y, **options)
    with pytest.raises(RuntimeError, match=r"fastmaml\.reference"):
        product["0.weight"].sum().backward()


def test_nan_in_is_nan_out(given):
    for backend in [b.name for b in fastmaml.backends() if b.available]:
        x, y = torch.full((T, N, I), torch.nan), given["support"][1]
        labels = torch.randint(C, (T, N))
        assert functional.meta_loss(**(given | {"support": (x, y), "backend": backend})).isnan()
        classes = {
            "support": (x, labels),
            "query": (x, labels),
            "loss": CrossEntropy(0.1),
            "backend": backend,
        }
        assert functional.meta_loss(**(given | classes)).isnan()
