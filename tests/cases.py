"""Random networks, tasks and step sizes, drawn by hypothesis; and how two results are compared."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from fastmaml.losses import MSE, CrossEntropy
from fastmaml.optimizers import SGD

SMOOTH = [nn.Tanh, nn.Sigmoid, nn.SiLU, nn.GELU, lambda: nn.GELU(approximate="tanh")]
KINKED = [nn.ReLU, nn.LeakyReLU]
WIDTHS = [1, 2, 3, 5, 7, 8, 9, 13, 16, 17, 24, 31, 40]


class Residual(nn.Module):
    """x + f(x), as people write it"""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


@dataclass(repr=False)
class Case:
    """One draw: a float64 model, its tasks, step sizes; `to`: the same in another dtype or place."""

    model: nn.Module
    params: dict[str, Tensor]
    support: tuple[Tensor, Any]
    query: tuple[Tensor, Any]
    loss: Any
    lr: Any
    steps: int
    first_order: bool
    fast_weights: Any = None
    optimizer: SGD | None = None
    step_weights: list[float] | None = None

    def __repr__(self) -> str:
        sizes = [tuple(x.shape) for x, _ in (self.support, self.query)]
        how = f"steps={self.steps}, first_order={self.first_order}, fast_weights={self.fast_weights}"
        return f"Case({self.model}, {sizes}, {self.loss}, {how}, {self.optimizer}, {self.step_weights})"

    def to(self, dtype: torch.dtype | None = None, device: Any = None) -> "Case":
        def cast(a: Any) -> Any:
            if isinstance(a, Tensor):
                new = a.detach().to(device, dtype if a.is_floating_point() else None)
                return new.requires_grad_(a.requires_grad)
            if isinstance(a, (tuple, list)):
                return type(a)(cast(b) for b in a)
            return {n: cast(b) for n, b in a.items()} if isinstance(a, dict) else a

        params, support, query, lr = map(cast, (self.params, self.support, self.query, self.lr))
        return replace(self, params=params, support=support, query=query, lr=lr)

    def leaves(self) -> dict[str, list[Tensor]]:
        """What to differentiate by, in groups that are compared at one scale."""
        lrs = self.lr if isinstance(self.lr, list) else [self.lr]
        flat = [
            a for lr in lrs for a in (lr.values() if isinstance(lr, dict) else [lr]) if isinstance(a, Tensor)
        ]
        groups = {
            "params": list(self.params.values()),
            "lr": flat,
            "x_s": [self.support[0]],
            "x_q": [self.query[0]],
        }
        return {
            name: kept for name, group in groups.items() if (kept := [a for a in group if a.requires_grad])
        }


@st.composite
def networks(draw, smooth: bool, norms: bool, max_width: int) -> tuple[nn.Module, int, int, bool]:
    widths = [w for w in WIDTHS if w <= max_width]
    activations = SMOOTH if smooth else SMOOTH + 3 * KINKED
    width = first = draw(st.sampled_from(widths))
    layers: list[nn.Module] = []
    has_batch_norm = False
    for _ in range(draw(st.integers(0, 3))):
        out = draw(st.sampled_from(widths))
        layers.append(nn.Linear(width, out, bias=draw(st.booleans())))
        width = out
        kind = draw(st.sampled_from(["none", "none", "batch", "layer"] if norms else ["none"]))
        if kind == "batch":
            layers.append(nn.BatchNorm1d(width, affine=draw(st.booleans())))
            has_batch_norm = True
        elif kind == "layer" and width > 2:
            layers.append(nn.LayerNorm(width, elementwise_affine=draw(st.booleans())))
        layers.append(draw(st.sampled_from(activations))())
        if draw(st.integers(0, 3)) == 0:
            block = nn.Linear(width, width)
            layers += [Residual(nn.Sequential(block, draw(st.sampled_from(activations))()))]
            if draw(st.booleans()):
                layers.append(Residual(block))  # tied
    out = draw(st.sampled_from([1, 2, 3, 5, 9]))
    layers.append(nn.Linear(width, out))
    if draw(st.booleans()):
        holder = draw(st.sampled_from([a for a in layers if isinstance(a, nn.Linear)]))
        holder.register_parameter("unused", nn.Parameter(torch.randn(width, 2)))
    if draw(st.booleans()):
        layers.insert(0, nn.Flatten())
    return nn.Sequential(*layers).double(), first, out, has_batch_norm


@st.composite
def step_sizes(draw, params: dict[str, Tensor], steps: int, scale: float) -> Any:
    def one() -> Any:
        form = draw(st.sampled_from(["float", "tensor", "per tensor", "per tensor", "per element"]))
        if form == "float":
            return scale
        if form == "tensor":
            return torch.tensor(scale, dtype=torch.float64, requires_grad=True)
        shape = (lambda p: p.shape) if form == "per element" else (lambda p: ())
        return {
            n: (scale * torch.rand(shape(p), dtype=torch.float64)).requires_grad_() for n, p in params.items()
        }

    return [one() for _ in range(steps)] if draw(st.booleans()) else one()


@st.composite
def forms(draw, model: nn.Module, own: bool, lr: Any) -> Any:
    """What to pass as fast_weights: for all layers, or for each of those that can be factored."""
    uses = [p for m in model.modules() if isinstance(m, nn.Sequential) for p in _weights(m)]
    each = [
        a for row in (lr if isinstance(lr, list) else [lr]) if isinstance(row, dict) for a in row.values()
    ]
    if own or any(isinstance(a, Tensor) and a.dim() for a in each):
        return draw(st.sampled_from([None, "dense"]))
    can = [n for n, p in model.named_parameters() if p.dim() == 2 and sum(p is w for w in uses) == 1]
    one = draw(st.sampled_from([None, "dense", "factored", "mixed"]))
    return {n: draw(st.sampled_from(["dense", "factored"])) for n in can} if one == "mixed" else one


def _weights(sequential: nn.Sequential) -> list[Tensor]:
    """Of the linear layers in it, as often as it has them."""
    found = []
    for m in sequential:
        m = m.inner if isinstance(m, Residual) else m
        found += [m.weight] if isinstance(m, nn.Linear) else []
    return found


@st.composite
def optimizers(draw) -> SGD | None:
    if draw(st.booleans()):
        return None
    momentum, decay = draw(st.sampled_from([0.0, 0.9])), draw(st.sampled_from([0.0, 0.3, 0.3]))
    return SGD(momentum, decay, draw(st.sampled_from([None, 0.1, 1.0])))


@st.composite
def cases(draw, smooth: bool = False, norms: bool = True, max_width: int = 40) -> Case:
    torch.manual_seed(draw(st.integers(0, 2**16)))
    model, I, O, batch_norm = draw(networks(smooth, norms, max_width))
    T = draw(st.sampled_from([1, 2, 3, 3, 4, 5, 70]))
    steps = draw(st.sampled_from([0, 1, 1, 2, 3, 5, 10]))
    if T * steps > 100:
        steps = 1
    N, Q = (
        draw(st.sampled_from([2, 3, 5, 10, 25] if batch_norm else [1, 2, 3, 5, 10, 25])) for _ in range(2)
    )
    loss = draw(st.sampled_from([MSE(), CrossEntropy(), CrossEntropy(label_smoothing=0.1)]))
    weighted = draw(st.booleans())

    def tasks(n: int) -> tuple[Tensor, Any]:
        x = torch.randn(T, n, I, dtype=torch.float64, requires_grad=True)
        y = (
            torch.randint(O, (T, n))
            if isinstance(loss, CrossEntropy)
            else torch.randn(T, n, O, dtype=torch.float64)
        )
        return x, (y, torch.rand(T, n, dtype=torch.float64) + 0.1) if weighted else y

    own = draw(st.integers(0, 3)) == 0
    params = {}
    for name, p in model.named_parameters():
        value = p.detach() + 0.1 * torch.randn((T, *p.shape) if own else p.shape, dtype=torch.float64)
        params[name] = value.requires_grad_()
    if draw(st.integers(0, 3)) == 0:
        next(model.parameters()).requires_grad_(False)
    plain = dict(model.named_parameters())
    lr = draw(step_sizes(plain, steps, draw(st.sampled_from([0.01, 0.1]))))
    first_order = draw(st.booleans())
    fast_weights = draw(forms(model, own, lr))
    support, query, optimizer = tasks(N), tasks(Q), draw(optimizers())
    weights = [draw(st.sampled_from([0.0, 0.5, 1.0])) for _ in range(steps)]
    return Case(
        model, params, support, query, loss, lr, steps, first_order, fast_weights, optimizer,
        weights if weights and draw(st.booleans()) else None,
    )  # fmt: skip


def gradients(value: Tensor, case: Case) -> dict[str, Tensor]:
    """{group: its gradients, flat}, zero where there is none"""
    leaves = case.leaves()
    flat = [a for group in leaves.values() for a in group]
    grads = iter(
        torch.autograd.grad(value, flat, allow_unused=True) if value.requires_grad else [None] * len(flat)
    )
    result = {}
    for name, group in leaves.items():
        result[name] = torch.cat(
            [(torch.zeros_like(a) if g is None else g).flatten() for a, g in zip(group, grads, strict=False)]
        )
    return result


def error(actual: Tensor, truth: Tensor) -> float:
    """Largest difference over the largest number"""
    if truth.numel() == 0:
        return 0.0
    difference, size = (actual.double() - truth).abs().max(), truth.abs().max()
    return float(difference / size) if size > 1e-12 else float(difference)
