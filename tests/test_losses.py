"""Which losses are told apart, and which of torch's own run on the kernels."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmaml import MAML, CrossEntropy, explain, functional, losses, reference
from fastmaml.backends import cpu, prepare, problem_for

T, N, I, C = 2, 6, 3, 5
KERNELS = "torch" if cpu.available() else "cpu"


def name_of(loss: object) -> str:
    """The repr of a function has an address, which is another one in each process that runs tests."""
    return getattr(loss, "__name__", repr(loss))


def torch_mse() -> list[Any]:
    return [F.mse_loss, nn.MSELoss()]


def torch_cross_entropy() -> list[Any]:
    return [F.cross_entropy, nn.CrossEntropyLoss(), nn.CrossEntropyLoss(label_smoothing=0.1)]


@pytest.fixture
def given():
    """A model and its two sets: x, values [T, N, C], labels [T, N]."""
    model = nn.Sequential(nn.Linear(I, 7), nn.Tanh(), nn.Linear(7, C)).double()
    x = torch.randn(2, T, N, I, dtype=torch.float64)
    return model, x, torch.randn(2, T, N, C, dtype=torch.float64), torch.randint(C, (2, T, N))


def runs_on(model, x: Tensor, loss, *ys) -> str:
    """The backend that takes it by itself, without warning if that has kernels."""
    meant = functional.understood(loss, model, x, *ys)
    return prepare(model, tuple(x.shape[2:]), meant, x.device, x.dtype, None)[1]


def agree(model, x, y, loss, backend) -> None:
    """All functions give what torch's loss gives in the reference."""
    params, call = dict(model.named_parameters()), {"loss": loss, "backend": backend}
    sets = (x[0], y[0]), (x[1], y[1])
    for _ in range(2):  # a call like the last one is checked otherwise
        found = functional.meta_value_and_grad(model, params, *sets, lr=0.1, steps=2, **call)
        expected = reference.meta_value_and_grad(model, params, *sets, lr=0.1, steps=2, **call)
        torch.testing.assert_close(found, expected)
    for name, args in {"value_and_grad": (), "hvp": (params,), "inner_loop": ()}.items():
        how = {"lr": 0.1, "steps": 2} if name == "inner_loop" else {}
        found, expected = (
            getattr(m, name)(model, params, *args, *sets[0], **call, **how) for m in (functional, reference)
        )
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("loss", torch_mse(), ids=name_of)
def test_mse_of_torch_is_ours(given, loss):
    model, x, values, _ = given
    assert runs_on(model, x[0], loss, values[0]) == KERNELS
    agree(model, x, values, loss, KERNELS)
    assert f"backend: {KERNELS}" in explain(model, x[0], loss=loss)


@pytest.mark.parametrize("loss", torch_cross_entropy(), ids=name_of)
def test_cross_entropy_of_torch_is_ours(given, loss):
    model, x, _, labels = given
    assert runs_on(model, x[0], loss, labels[0], (labels[1], None)) == KERNELS
    agree(model, x, labels, loss, KERNELS)


def test_without_kernels_torch_s_losses_are_what_they_are(given):
    model, x, values, labels = given
    model = nn.Sequential(model, nn.Softplus())
    for y, loss in [*((values, a) for a in torch_mse()), *((labels, a) for a in torch_cross_entropy())]:
        assert functional.understood(loss, model, x[0], y[0]) is loss
        agree(model, x, y, loss, "torch")


def test_one_set_may_keep_a_loss_from_the_kernels(given):
    """Labels to ignore are left out by torch's loss, and there is one loss for both sets."""
    model, x, _, labels = given
    labels[1, :, 4:] = losses.IGNORED
    for loss in torch_cross_entropy():
        assert functional.understood(loss, model, x[0], labels[0]) is not loss
        assert functional.understood(loss, model, x[0], *labels) is loss
        agree(model, x, labels, loss, "torch")
    fewer = torch.stack([x[1], x[1].flip(0)])[:, :, :4]
    params, call = dict(model.named_parameters()), {"lr": 0.1, "steps": 1, "backend": "torch"}
    some = (fewer[0], labels[1, :, :4])
    ignored = functional.meta_loss(model, params, some, (x[1], labels[1]), loss=F.cross_entropy, **call)
    torch.testing.assert_close(
        ignored, functional.meta_loss(model, params, some, some, loss="cross_entropy", **call)
    )


def test_class_probabilities_go_to_torch_s_cross_entropy(given):
    model, x, values, _ = given
    for loss in torch_cross_entropy():
        agree(model, x, values.softmax(-1), loss, "torch")


def test_labels_of_more_axes_go_to_torch_s_cross_entropy():
    model = nn.Linear(I, C).double()
    x, y = torch.randn(2, T, N, 4, I, dtype=torch.float64), torch.randint(4, (2, T, N, C))
    for loss in torch_cross_entropy():
        agree(model, x, y, loss, "torch")
        maml = MAML(model, loss=loss, lr=0.1, steps=1, backend="torch")
        assert maml.evaluate(x[0], y[0], x[1], y[1]).accuracy is None


def test_labels_of_another_type_go_to_torch_s_cross_entropy(given):
    model, x, _, labels = given
    for loss in torch_cross_entropy():
        assert functional.understood(loss, model, x[0], labels[0].to(torch.uint8)) is loss


@pytest.mark.filterwarnings("ignore:Using a target size")
def test_targets_that_broadcast_go_to_torch_s_mse(given):
    model, x, values, _ = given
    one = values[..., :1]
    for loss in torch_mse():
        assert functional.understood(loss, model, x[0], one[0]) is loss
        agree(model, x, one, loss, "torch")
        assert functional.understood(loss, model, x[0], values[0].float()) is loss


@pytest.mark.parametrize(
    "loss",
    [
        nn.MSELoss(reduction="sum"),
        nn.CrossEntropyLoss(weight=torch.rand(C, dtype=torch.float64)),
        nn.CrossEntropyLoss(ignore_index=2),
        nn.CrossEntropyLoss(reduction="sum"),
        F.l1_loss,
    ],
    ids=name_of,
)
def test_what_means_something_else_stays_a_callable(given, loss):
    model, x, values, labels = given
    y = labels if isinstance(loss, nn.CrossEntropyLoss) else values
    assert functional.understood(loss, model, x[0], y[0]) is loss
    agree(model, x, y, loss, "torch")


def test_torch_s_losses_take_no_weight_per_example(given):
    """F.cross_entropy would take it for one per class, where there are as many."""
    model, x, _, labels = given
    weight = torch.rand(T, N, dtype=torch.float64)
    for loss in torch_cross_entropy():
        with pytest.raises(ValueError, match="no weight per example, as that of y"):
            functional.value_and_grad(
                model, dict(model.named_parameters()), x[0], (labels[0], weight), loss=loss, backend="torch"
            )


@dataclass
class Scaled:
    """Has __eq__, and so no __hash__."""

    scale: float

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        return self.scale * (output - target).square().mean()


def test_a_loss_that_cannot_be_hashed_is_known_by_identity(given):
    model, x, values, _ = given
    one, equal, other = Scaled(1.0), Scaled(1.0), Scaled(2.0)
    for loss in (one, other):
        agree(model, x, values, loss, "torch")
    known = [problem_for(model, (I,), losses.resolve(a)) for a in (one, one, equal)]
    assert known[0] is known[1]
    assert known[0] is not known[2]


class Learned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return self.scale * (output - target).square().mean()


def test_a_loss_that_learns_is_refused_where_it_would_not(given):
    model, x, values, _ = given
    params, support, query = dict(model.named_parameters()), (x[0], values[0]), (x[1], values[1])
    loss = Learned()
    call: dict[str, Any] = {"loss": loss, "lr": 0.1, "steps": 1, "backend": "torch"}
    expected = reference.meta_loss(model, params, support, query, **call)
    assert torch.autograd.grad(expected, [loss.scale])[0].abs() > 0
    with torch.no_grad():
        found = functional.meta_loss(model, params, support, query, **call)
    torch.testing.assert_close(found, expected.detach())
    for y in (values[0], (values[0], None)):
        with pytest.raises(ValueError, match=r"\['scale'\] get no gradient .* fastmaml\.reference"):
            functional.meta_loss(model, params, (x[0], y), query, **call)
    loss.requires_grad_(False)
    torch.testing.assert_close(functional.meta_loss(model, params, support, query, **call), expected)


def test_a_smoothing_that_is_none_is_said(given):
    model, x, _, labels = given
    params = dict(model.named_parameters())
    loss = nn.CrossEntropyLoss(label_smoothing=1.5)
    with pytest.raises(ValueError, match="label_smoothing must be in"):
        functional.value_and_grad(model, params, x[0], labels[0], loss=loss)
    assert losses.built_in(nn.CrossEntropyLoss(label_smoothing=0.1)) == CrossEntropy(0.1)
