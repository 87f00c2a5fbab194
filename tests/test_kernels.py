"""Every pass of every op of the Triton kernels against the same pass in plain torch.

Interpreted on the CPU, or on the GPU where there is one. Outputs start as NaN, and NaN lies around tensors.
"""

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import naive_passes
import pytest
import torch
from rounding import UNIT, as_on_a_gpu
from torch import Tensor

triton = pytest.importorskip("triton")
kernels = importlib.import_module("fastmaml.kernels")
types = naive_passes.types
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# T, M, I, O: a one, odd ones, one past a tile, a model's
SIZES = [(1, 1, 1, 1), (2, 3, 5, 7), (2, 65, 17, 66), (3, 10, 40, 40)]
ACTIVATIONS = [
    types.Activation(*a)
    for a in (
        ("none",), ("leaky_relu", 0.0), ("leaky_relu", 0.1), ("leaky_relu", -0.5), ("tanh",), ("sigmoid",),
        ("gelu", 0.0), ("gelu", 1.0), ("silu",),
    )
]  # fmt: skip


def guarded(a: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy with NaN (or -1) on both sides, of the same strides over tasks."""
    value = a.to(dtype if a.is_floating_point() else a.dtype)
    shared = a.dim() > 0 and a.stride(0) == 0
    dense = value[:1] if shared else value
    edge = math.nan if value.is_floating_point() else -1
    memory = torch.full((dense.numel() + 128,), edge, dtype=value.dtype, device=DEVICE)
    inner = memory[64 : 64 + dense.numel()].view(dense.shape)
    inner.copy_(dense)
    return inner.expand(a.shape) if shared else inner


def margins_are_whole(a: Tensor) -> bool:
    if not a.is_floating_point():
        return True
    memory = a.as_strided((a.untyped_storage().nbytes() // a.element_size(),), (1,), 0)
    return bool(memory[:64].isnan().all() and memory[-64:].isnan().all())


def each_tensor(a: Any) -> list[Tensor]:
    if isinstance(a, Tensor):
        return [a]
    if isinstance(a, dict):
        a = list(a.values())
    return [t for b in a for t in each_tensor(b)] if isinstance(a, (tuple, list)) else []


def copied(a: Any, dtype: torch.dtype, known: dict[int, Tensor]) -> Any:
    """The same structure; one tensor stays one."""
    if isinstance(a, Tensor):
        if id(a) not in known:
            known[id(a)] = guarded(a, dtype)
        return known[id(a)]
    if isinstance(a, dict):
        return {n: copied(b, dtype, known) for n, b in a.items()}
    if isinstance(a, tuple):
        parts = [copied(b, dtype, known) for b in a]
        return type(a)(*parts) if hasattr(a, "_fields") else tuple(parts)
    return a


@dataclass
class Layer:
    """What the passes of one layer read and write, its values and tangents made by the naive ones."""

    x: Any
    w: Any
    b: Any
    y: Any
    z: Any
    act: Any
    statistics: Tensor
    updates: tuple[Any, Any]


def param(shape: tuple[int, ...], own: bool, lr: str) -> Any:
    rest = shape[1:]
    value = torch.randn(shape) if own else torch.randn(1, *rest).expand(shape)
    rate = None if lr == "none" else torch.rand(1) if lr == "number" else torch.rand(rest)
    return types.Param(value, torch.randn(shape), rate)


def update(shape: tuple[int, ...], base: bool, lr: str, scale: int, sign: int) -> Any:
    rate = None if lr == "none" else torch.rand(1) if lr == "number" else torch.rand(shape[1:])
    return types.Update(
        torch.full(shape, math.nan),
        torch.randn(shape) if base else None,
        rate,
        torch.rand(scale) if scale else None,
        sign,
    )


def layer(op: str, sizes: tuple[int, ...], act: Any, variant: int) -> Layer:
    """variant: which of the options of the parameters, the tangents and the updates"""
    T, M, I, O = sizes
    O = I if op in ("batch_norm", "layer_norm", "elementwise") else O
    lr = ("none", "number", "elements")[variant % 3]
    moves = variant % 4 != 3

    def buffer(C: int) -> Any:
        return types.Buffer(*(torch.randn(T, M, C) for _ in range(4)))

    x, y, z = buffer(I), buffer(O), buffer(O)
    if not moves:
        x = x._replace(t_value=None)
    shapes = ((T, O, I), (T, O)) if op == "linear" else ((T, O), (T, O))
    w, b = (param(shape, variant % 2 == 0, lr) for shape in shapes)
    if variant % 5 == 4:
        w, b = w._replace(tangent=None), b._replace(tangent=None)
    updates = tuple(
        update(shape, variant % 2 == 1, lr, (0, 1, T)[variant % 3], (1, -1)[variant % 2]) for shape in shapes
    )
    if act.name == "none":
        z = None
    else:
        z = z._replace(value=z.value if act.reads_input else None, t_value=z.t_value if act.curved else None)
    made = Layer(x, w, b, y, z, act, torch.randn(T, I if op == "batch_norm" else M, 4), updates)  # pyright: ignore[reportArgumentType]
    for field, value in vars(made).items():
        setattr(made, field, copied(value, torch.float64, {}))
    if op != "elementwise" or moves:
        for dual in (False, True):
            forward(naive_passes, op, made, dual)
    return made


def forward(passes: Any, op: str, a: Layer, dual: bool) -> None:
    if op == "linear":
        passes.linear_forward(a.x, a.w, a.b, a.y, a.z, a.act, dual=dual)
    elif op == "elementwise":
        passes.elementwise_forward(a.x, a.y, a.act, dual=dual)
    else:
        run = getattr(passes, f"{op}_forward")
        run(a.x, a.w, a.b, a.y, a.z, a.statistics, a.act, eps=1e-3, dual=dual)


def backward(passes: Any, op: str, a: Layer, dual: bool, add: bool) -> None:
    if op == "linear":
        passes.linear_backward_input(a.x, a.w, a.y, a.z, a.act, add=add, dual=dual)
        passes.linear_backward_weight(a.x, a.y, a.z, *a.updates, a.act, dual=dual)
    elif op == "elementwise":
        passes.elementwise_backward(a.x, a.y, a.act, add=add, dual=dual)
    else:
        run = getattr(passes, f"{op}_backward")
        run(
            a.x, a.w, a.y, a.z, a.statistics, *a.updates, a.act, wants_x=True, add=add, dual=dual
        )  # fmt: skip


def written(op: str, a: Layer, way: str, dual: bool, add: bool) -> list[Tensor]:
    """What a pass is to write in full."""
    if way == "forward":
        out = [b.t_value if dual else b.value for b in (a.y, a.z) if b is not None]
        out = out[:1] if op == "elementwise" else out
        if op.endswith("_norm") and not (dual and a.x.t_value is None):
            out.append(a.statistics[..., 2:] if dual else a.statistics[..., :2])
    else:
        out = [] if add else [a.x.t_grad if dual else a.x.grad]
    return [t for t in out if t is not None]


def check(run: Callable[[Any, Any], None], case: Any, outputs: Callable[[Any], list[Tensor]]) -> None:
    """run(passes, case), by kernels in both dtypes and by the naive passes; case: a dataclass of tensors."""
    truth = fresh(case, torch.float64, outputs)
    run(naive_passes, truth)
    same = fresh(case, torch.float32, outputs)
    run(naive_passes, same)
    for dtype in (torch.float64, torch.float32):
        actual = fresh(case, dtype, outputs)
        run(kernels, actual)
        for mine, t, s in zip(*map(each_tensor, map(tuple, map(fields, (actual, truth, same)))), strict=True):
            assert margins_are_whole(mine)
            assert torch.equal(mine.isnan(), t.isnan())
            difference = (mine.double() - t.double()).abs().nan_to_num().max()
            size = t.double().abs().nan_to_num().max()
            if dtype is torch.float64:
                assert difference <= 1e-13 * (size + 1)
            else:
                theirs = (s.double() - t.double()).abs().nan_to_num().max()
                assert difference <= 2 * theirs + 16 * torch.finfo(dtype).eps * size


def fields(case: Any) -> list[Any]:
    return list(vars(case).values())


def fresh(case: Any, dtype: torch.dtype, outputs: Callable[[Any], list[Tensor]]) -> Any:
    known: dict[int, Tensor] = {}
    made = replace(case, **{name: copied(value, dtype, known) for name, value in vars(case).items()})
    for t in outputs(made):
        t.fill_(math.nan)
    return made


def check_layer(op: str, way: str, sizes: tuple[int, ...], dual: bool, act: Any, variant: int) -> None:
    torch.manual_seed(variant)
    case, add = layer(op, sizes, act, variant), variant % 2 == 0
    if op == "elementwise" and dual and way == "forward" and case.x.t_value is None:
        return  # nothing moves: the sweep leaves it out

    def run(passes: Any, a: Layer) -> None:
        if way == "forward":
            forward(passes, op, a, dual)
        else:
            backward(passes, op, a, dual, add)

    check(run, case, lambda a: written(op, a, way, dual, add))


OPS = ["linear", "batch_norm", "layer_norm", "elementwise"]
plain_and_dual = pytest.mark.parametrize("dual", [False, True], ids=["plain", "dual"])
both_ways = pytest.mark.parametrize("way", ["forward", "backward"])
of_all_sizes = pytest.mark.parametrize("sizes", SIZES, ids=lambda s: "T{}-M{}-I{}-O{}".format(*s))


@plain_and_dual
@of_all_sizes
@both_ways
@pytest.mark.parametrize("op", OPS)
def test_layers(op: str, way: str, sizes: tuple[int, ...], dual: bool) -> None:
    if op == "batch_norm" and sizes[1] == 1:
        sizes = (1, 2, 1, 1)
    for number, act in enumerate(ACTIVATIONS):
        if op != "elementwise" or act.name != "none":
            check_layer(op, way, sizes, dual, act, number + sum(sizes))


@dataclass
class Normed:
    """A linear layer and the norm of its output, which its forward pass computes"""

    x: Any
    w: Any
    b: Any
    y: Any
    norm: Any


def check_normed(axis: int, sizes: tuple[int, ...], dual: bool, act: Any, variant: int) -> None:
    torch.manual_seed(variant)
    T, M, _, O = sizes
    a = layer("linear", sizes, ACTIVATIONS[0], variant)
    after = layer(("batch_norm", "layer_norm")[axis], (T, M, O, O), act, variant + 1)
    norm = types.Norm(after.w, after.b, after.y, after.z, after.statistics, act, 1e-3, axis)
    case = Normed(a.x, a.w, a.b if variant % 2 else None, a.y, norm)

    def run(passes: Any, c: Normed, dual: bool) -> None:
        passes.linear_forward(c.x, c.w, c.b, c.y, None, norm=c.norm, dual=dual)

    def outputs(c: Normed) -> list[Tensor]:
        buffers = [b for b in (c.y, c.norm.y, c.norm.z) if b is not None]
        out = [b.t_value if dual else b.value for b in buffers]
        return [
            *(t for t in out if t is not None),
            c.norm.statistics[..., 2:] if dual else c.norm.statistics[..., :2],
        ]

    run(naive_passes, case, False)
    check(lambda passes, c: run(passes, c, dual), case, outputs)


@plain_and_dual
@pytest.mark.parametrize("axis", [0, 1], ids=["batch_norm", "layer_norm"])
@pytest.mark.parametrize(
    "sizes",
    [(1, 2, 1, 2), (2, 5, 17, 66), (2, 65, 5, 130), (2, 130, 17, 65)],
    ids=lambda s: "T{}-M{}-I{}-O{}".format(*s),
)
def test_norm_behind_linear(axis: int, sizes: tuple[int, ...], dual: bool) -> None:
    """In one kernel, or in two where a group is longer than a block"""
    for number, act in enumerate(ACTIVATIONS[::4]):
        check_normed(axis, sizes, dual, act, number)


# small enough for an executor of the compiler's own representation, which sees races too
small_ones = pytest.mark.parametrize("sizes", [(2, 17, 40, 7), (2, 33, 17, 33)], ids=["rows", "blocks"])


@plain_and_dual
@both_ways
@small_ones
@pytest.mark.parametrize("op", OPS)
def test_one_of_each(op: str, sizes: tuple[int, ...], way: str, dual: bool) -> None:
    check_layer(op, way, sizes, dual, types.Activation("tanh"), 2)


@plain_and_dual
@small_ones
@pytest.mark.parametrize("axis", [0, 1], ids=["batch_norm", "layer_norm"])
def test_one_norm_behind_linear(axis: int, sizes: tuple[int, ...], dual: bool) -> None:
    check_normed(axis, sizes, dual, types.Activation("tanh"), 1)


@dataclass
class Kept:
    rows: Tensor
    stack: Tensor
    base: Tensor | None
    lr: Tensor | None
    scale: Tensor | None


@pytest.mark.parametrize("sizes", [(2, 3, 7), (3, 33, 40)], ids=["rows", "blocks"])
def test_one_of_each_kept_row(sizes: tuple[int, ...]) -> None:
    """In the place of some rows of a stack"""
    T, R, C = sizes
    for variant in range(4):
        base = None if variant % 2 else torch.randn(T, R, C).double()
        lr, scale = (torch.rand(1).double(), torch.rand(1 if variant % 2 else T).double())
        a = Kept(torch.randn(T, R, C).double(), torch.zeros(T, R + 4, C).double(), base, lr, scale)
        if variant > 1:
            a = replace(a, lr=None) if variant == 2 else replace(a, scale=None)

        def run(passes: Any, c: Kept, sign: int = (1, -1)[variant % 2]) -> None:
            passes.rows_update(c.rows, types.Update(c.stack[:, 2:-2], c.base, c.lr, c.scale, sign))

        check(run, a, lambda c: [c.stack])


@dataclass
class Sum:
    a: Any
    b: Any
    y: Any


@plain_and_dual
@of_all_sizes
def test_add(sizes: tuple[int, ...], dual: bool) -> None:
    T, M, I, _ = sizes
    a, b, y = (types.Buffer(*(torch.randn(T, M, I).double() for _ in range(4))) for _ in range(3))
    out = lambda c: [c.y.t_value if dual else c.y.value]  # noqa: E731
    for second in (b, None, b._replace(t_value=None)):
        check(lambda p, c: p.add_forward(c.a, c.b, c.y, dual=dual), Sum(a, second, y), out)
    into = lambda c: [c.a.t_grad if dual else c.a.grad]  # noqa: E731
    check(lambda p, c: p.add_backward(c.a, c.y, add=False, dual=dual), Sum(a, b, y), into)
    check(lambda p, c: p.add_backward(c.a, c.y, add=True, dual=dual), Sum(a, b, y), lambda _: [])


@dataclass
class Output:
    z: Any
    target: Tensor
    weight: Tensor | None
    loss: Tensor


@plain_and_dual
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (3, 5, 5), (2, 70, 3), (2, 25, 33), (1, 3, 1100)])
@pytest.mark.parametrize("loss", ["mse", "cross_entropy", "smoothed"])
def test_losses(loss: str, sizes: tuple[int, int, int], weighted: bool, dual: bool) -> None:
    T, N, C = sizes
    z = types.Buffer(*(3 * torch.randn(T, N, C).double() for _ in range(4)))
    target = torch.randn(T, N, C).double() if loss == "mse" else torch.randint(C, (T, N))
    case = Output(z, target, torch.rand(T, N).double() if weighted else None, torch.randn(T).double())
    how = {} if loss == "mse" else {"smoothing": 0.1 if loss == "smoothed" else 0.0}

    def run(passes: Any, a: Output) -> None:
        function = passes.mse if loss == "mse" else passes.cross_entropy
        function(a.z, a.target, a.weight, None if dual else a.loss, dual=dual, **how)

    check(run, case, lambda a: [a.z.t_grad] if dual else [a.z.grad, a.loss])


def test_a_label_out_of_range_gives_nan() -> None:
    z = types.Buffer(torch.randn(1, 3, 4, device=DEVICE), torch.zeros(1, 3, 4, device=DEVICE))
    loss = torch.zeros(1, device=DEVICE)
    kernels.cross_entropy(z, torch.tensor([[0, 4, 1]], device=DEVICE), None, loss, smoothing=0.0, dual=False)
    assert loss.isnan().all()
    assert z.grad[0, 1].isnan().all()
    assert not z.grad[0, 0].isnan().any()


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
@as_on_a_gpu()
def test_precision(precision: str) -> None:
    """The product of rounded operands, which is not that of the operands themselves"""
    truth = layer("linear", (2, 10, 40, 33), ACTIVATIONS[0], 0)
    results = {}
    for passes in (kernels, naive_passes):
        known: dict[int, Tensor] = {}
        a = replace(truth, **{n: copied(v, torch.float32, known) for n, v in vars(truth).items()})
        passes.linear_forward(a.x, a.w, a.b, a.y, None, dual=False, precision=precision)
        results[passes.__name__] = a.y.value.double().cpu()
    exact = truth.y.value.cpu()
    actual, same = results[kernels.__name__], results[naive_passes.__name__]
    off = lambda truth: float((actual - truth).abs().max() / truth.abs().max())  # noqa: E731
    assert off(same) < 2**-20
    assert UNIT[precision] / 8 < off(exact) < UNIT[precision]
