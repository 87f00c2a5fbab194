"""trace(model) computes what model(x) computes, for the many ways in which people write modules."""

import pickle
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from modules import Function, L, W
from torch import Tensor, nn

from fastmaml.ops import OPS
from fastmaml.program import Op, Program, Unsupported, trace

LAYERS: dict[str, Callable[[list[Tensor], list[Tensor | None], dict[str, float]], Tensor]] = {
    "linear": lambda x, p, a: torch.einsum("...i,oi->...o", x[0], p[0]) + (0 if p[1] is None else p[1]),
    "batch_norm": lambda x, p, a: _norm(x[0], 0, p, a["eps"]),
    "layer_norm": lambda x, p, a: _norm(x[0], -1, p, a["eps"]),
    "relu": lambda x, p, a: torch.where(x[0] > 0, x[0], 0),
    "leaky_relu": lambda x, p, a: torch.where(x[0] > 0, x[0], a["negative_slope"] * x[0]),
    "tanh": lambda x, p, a: torch.tanh(x[0]),
    "sigmoid": lambda x, p, a: 1 / (1 + torch.exp(-x[0])),
    "gelu": lambda x, p, a: F.gelu(x[0], approximate="tanh" if a["tanh"] else "none"),
    "silu": lambda x, p, a: x[0] / (1 + torch.exp(-x[0])),
    "add": lambda x, p, a: x[0] + x[1],
    "flatten": lambda x, p, a: x[0].reshape(len(x[0]), -1),
}


def _norm(x: Tensor, axis: int, p: list[Tensor | None], eps: float) -> Tensor:
    h = x - x.mean(axis, keepdim=True)
    h = h / (h.square().mean(axis, keepdim=True) + eps).sqrt()
    h = h if p[0] is None else p[0] * h
    return h if p[1] is None else h + p[1]


def interpret(program: Program, params: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """Runs the Program on x [N, ..], holding it to what backends rely on."""
    N = len(x)
    values = {0: x.reshape(N, *program.buffers[0])}
    read = {program.output}
    for i, op in enumerate(program.ops):
        assert op.output == i + 1, "one buffer per op, in order"
        assert tuple(name for name, _ in op.attrs) == OPS[op.name].attrs
        assert len(op.params) == len(OPS[op.name].params)
        weights = [None if name is None else params[name] for name in op.params]
        values[op.output] = LAYERS[op.name]([values[b] for b in op.inputs], weights, dict(op.attrs))
        assert values[op.output].shape == (N, *program.buffers[op.output])
        read |= set(op.inputs)
    assert len(program.buffers) == len(program.ops) + 1
    assert read >= {op.output for op in program.ops}, "no op is left unread"
    return values[program.output]


class Residual(nn.Module):
    def __init__(self, width: int, pre_norm: bool = True) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width) if pre_norm else nn.Identity()
        self.up, self.down, self.act = nn.Linear(width, 2 * width), nn.Linear(2 * width, width), nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.act(self.up(self.norm(x))))


class MLP(nn.Module):
    """One shared activation, a ModuleList, hyperparameters in control flow."""

    def __init__(self, sizes: list[int], final: bool = True, skip: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in pairwise(sizes))
        self.act, self.final, self.skip = nn.ReLU(inplace=True), final, skip

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            h = layer(x)
            if i < len(self.layers) - 1 or self.final:
                h = self.act(h)
            x = x + h if self.skip and h.shape == x.shape else h
        return x


def tied() -> nn.Module:
    a, b = nn.Linear(4, 4), nn.Linear(4, 4)
    b.weight = a.weight
    return nn.Sequential(a, nn.Tanh(), b)


def in_place_after_view(self: Any, x: Tensor) -> Tensor:
    h = self.a(x).flatten(1)
    F.relu(h, inplace=True)
    h += h
    return h


def shape_checks(self: Any, x: Tensor) -> Tensor:
    n, c = x.shape
    assert x.dim() == 2, f"got {x.ndim} axes"
    assert x.size(-1) == c == self.a.in_features
    assert x.dtype == self.a.weight.dtype
    assert x.device == self.a.weight.device
    assert len(x) == n
    return self.a(x.reshape(len(x), -1))


def functional(self: Any, x: Tensor) -> Tensor:
    h = F.leaky_relu(F.leaky_relu_(F.linear(x, self.w, self.b)), 0.2)
    h = F.layer_norm(h, (4,), eps=1e-3)
    h = F.batch_norm(h, None, None, self.b, training=True)
    h = torch.add(F.silu(h), F.gelu(h, approximate="tanh"))
    return F.linear(torch.sigmoid(h) + h.tanh(), self.w)


def clone_then_change(self: Any, x: Tensor) -> Tensor:
    h = self.a(x)
    kept = h.clone()
    h.tanh_()
    return h + kept


def dead_code(self: Any, x: Tensor) -> Tensor:
    F.relu(self.b(x))
    return self.a(x)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: L(3, 2), (3,)),
    "linear without bias": (lambda: L(3, 2, bias=False), (3,)),
    "linear over rows": (lambda: nn.Sequential(L(3, 2), nn.LayerNorm(2), nn.Flatten(), L(10, 1)), (5, 3)),
    "sequential": (lambda: nn.Sequential(L(1, 40), nn.ReLU(), L(40, 40), nn.ReLU(), L(40, 1)), (1,)),
    "nested": (
        lambda: nn.Sequential(nn.Flatten(), nn.Sequential(L(6, 4), nn.Sequential(nn.SiLU())), L()),
        (2, 3),
    ),
    "every activation": (
        lambda: nn.Sequential(
            *(
                nn.ReLU(),
                L(),
                nn.LeakyReLU(0.3),
                nn.Tanh(),
                L(),
                nn.Sigmoid(),
                nn.GELU(),
                L(),
                nn.GELU("tanh"),
            ),
            *(nn.SiLU(), L(), nn.SiLU(inplace=True), L(), nn.LeakyReLU(inplace=True), nn.ReLU(inplace=True)),
        ),
        (4,),
    ),
    "shared activation, ModuleList": (lambda: MLP([3, 4, 4, 2]), (3,)),
    "hyperparameters decide": (lambda: MLP([3, 4, 4, 2], final=False, skip=True), (3,)),
    "residual blocks": (lambda: nn.Sequential(Residual(4), Residual(4, pre_norm=False)), (4,)),
    "functional": (lambda: Function(functional, w=W(4, 4), b=W(4)), (4,)),
    "shape checks": (lambda: Function(shape_checks, a=L()), (4,)),
    "x += ": (lambda: Function(in_place_after_view, a=L()), (4,)),
    "clone": (lambda: Function(clone_then_change, a=L()), (4,)),
    "in place on the input": (lambda: nn.Sequential(nn.ReLU(inplace=True), L()), (4,)),
    "sum of branches": (lambda: Function(lambda s, x: sum([s.a(x), s.b(x), x]), a=L(), b=L()), (4,)),
    "twice itself": (lambda: Function(lambda s, x: s.a(x + x), a=L()), (4,)),
    "a module twice": (lambda: Function(lambda s, x: s.a(torch.relu(s.a(x))), a=L()), (4,)),
    "view(size(0), -1)": (lambda: Function(lambda s, x: s.a(x.view(x.size(0), -1)), a=L(6)), (2, 3)),
    "view(-1, 6)": (lambda: Function(lambda s, x: s.a(x.view(-1, 6)), a=L(6)), (2, 3)),
    "flatten(1)": (lambda: Function(lambda s, x: s.a(x.flatten(1)), a=L(6)), (1, 2, 3)),
    "torch.flatten": (lambda: Function(lambda s, x: s.a(torch.flatten(x, start_dim=1)), a=L(6)), (2, 3)),
    "reshape(len(x), -1)": (lambda: Function(lambda s, x: s.a(x.reshape(len(x), -1)), a=L(6)), (2, 3)),
    "reshape(x.shape[0], ..)": (lambda: Function(lambda s, x: s.a(x.reshape(x.shape[0], 6)), a=L(6)), (6, 1)),
    "flat and not": (
        lambda: Function(lambda s, x: s.a(x).flatten(1) + s.b(x.flatten(1)), a=L(3, 2), b=L(6, 4)),
        (2, 3),
    ),
    "a number per example": (lambda: Function(lambda s, x: s.a(x.unsqueeze(1)), a=L(1, 2)), ()),
    "only flatten": (nn.Flatten, (2, 3)),
    "nothing": (nn.Identity, (2,)),
    "tied": (tied, (4,)),
    "tied by hand": (lambda: Function(lambda s, x: F.linear(s.a(x).relu(), s.a.weight), a=L()), (4,)),
    "unused": (lambda: Function(lambda s, x: s.a(x), a=L(), spare=L(2, 2), other=W(3)), (4,)),
    "dead code": (lambda: Function(dead_code, a=L(), b=L()), (4,)),
    "layer norm": (lambda: nn.Sequential(nn.LayerNorm(4, eps=1e-2), L(), nn.LayerNorm(4, bias=False)), (4,)),
    "layer norm without affine": (lambda: nn.LayerNorm(4, elementwise_affine=False), (4,)),
    "batch norm": (lambda: nn.Sequential(L(), nn.BatchNorm1d(4, eps=1e-2), nn.ReLU(), L()), (4,)),
    "batch norm without affine": (lambda: nn.BatchNorm1d(4, affine=False), (4,)),
    "batch norm without statistics": (lambda: nn.BatchNorm1d(4, track_running_stats=False), (4,)),
    "batch norm, cumulative": (lambda: nn.BatchNorm1d(4, momentum=None), (4,)),
    "dropout, p=0": (lambda: nn.Sequential(L(), nn.Dropout(0), nn.ReLU(), nn.AlphaDropout(0)), (4,)),
}


@pytest.mark.parametrize("name", MODELS)
def test_computes_what_the_model_computes(name: str) -> None:
    make, shape = MODELS[name]
    model = make().double()
    for p in model.parameters():
        nn.init.normal_(p)
    params, before = dict(model.named_parameters()), {n: b.clone() for n, b in model.named_buffers()}
    program = trace(model, shape)
    assert {n: b.tolist() for n, b in model.named_buffers()} == {n: b.tolist() for n, b in before.items()}
    x = torch.randn(5, *shape, dtype=torch.float64)
    y = interpret(program, params, x.clone())
    torch.testing.assert_close(y, model(x.clone()), rtol=1e-12, atol=1e-12)

    assert pickle.loads(pickle.dumps(program)) == program
    assert trace(model.eval(), shape) == program, "BatchNorm uses the current set's statistics in either mode"


def test_dropout_is_nothing_in_evaluation() -> None:
    model = nn.Sequential(L(), nn.Dropout(0.5), nn.ReLU(), nn.Dropout(0.1, inplace=True))
    assert [op.name for op in trace(model.eval(), (4,)).ops] == ["linear", "relu"]


def test_fields() -> None:
    model = nn.Sequential(
        nn.Flatten(), nn.ModuleDict({"body": nn.Linear(6, 2, bias=False)})["body"], nn.LeakyReLU()
    )
    expected = (
        Op("linear", (0,), 1, ("1.weight", None), (), "1"),
        Op("leaky_relu", (1,), 2, (), (("negative_slope", 0.01),), "2"),
    )
    assert trace(model, (2, 3)) == Program(((6,), (2,), (2,)), expected, 2)


def test_tied_weights_have_the_first_name() -> None:
    assert [op.params[0] for op in trace(tied(), (4,)).ops if op.params] == ["0.weight", "0.weight"]


def stale(self: Any, x: Tensor) -> Tensor:
    h = self.a(x)
    h.flatten(1).relu_()
    return F.linear(h, self.a.weight)


def test_a_view_of_what_changed_in_place() -> None:
    model = Function(stale, a=L(3, 3))
    with pytest.raises(Unsupported, match="changed in place"):
        trace(model, (2, 3))
    same_shape = Function(stale, a=L())  # flatten(1) of [N, 4] is [N, 4] in the same memory
    x = torch.randn(5, 4)
    y = interpret(trace(same_shape, (4,)), dict(same_shape.named_parameters()), x)
    torch.testing.assert_close(y, same_shape(x))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_traces_alike_without_gradients(mode: Callable[..., torch.autograd.grad_mode.no_grad]) -> None:
    model = MLP([3, 4, 2])
    with mode():
        program = trace(model, (3,))
    assert program == trace(model, (3,))


def test_the_models_own_tensors_stay() -> None:
    model = nn.Sequential(L(), nn.BatchNorm1d(4), nn.ReLU(inplace=True)).train()
    before = {name: (t.data_ptr(), t.clone()) for name, t in model.state_dict().items()}
    trace(model, (4,))
    for name, t in model.state_dict().items():
        assert t.data_ptr() == before[name][0]
        torch.testing.assert_close(t, before[name][1], rtol=0, atol=0)
    assert all(p.grad is None for p in model.parameters())


def test_is_fast() -> None:
    model = nn.Sequential(L(1, 40), nn.ReLU(), L(40, 40), nn.ReLU(), L(40, 1))
    took = []
    for _ in range(5):
        start = time.perf_counter()
        trace(model, (1,))
        took.append(time.perf_counter() - start)
    assert min(took) < 0.02  # about 0.5 ms on a quiet machine

    code = (
        "import sys; from torch import nn; from fastmaml.program import trace; trace(nn.Linear(1, 1), (1,)); "
    )
    code += "assert not {'sympy', 'torch._dynamo'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
