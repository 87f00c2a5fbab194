"""The form of each linear layer's fast weights: a matrix for each task, or factors.

Factored, a weight of a task is theta plus the outer products of the rows that the inner steps left, and is
never formed (docs/factored.md; csrc/cpu/factored.h). That is exact; the sizes decide which is faster.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Size, Tensor
from torch import device as Device
from torch import dtype as DType

if TYPE_CHECKING:
    from .backends import Problem

FORMS = ("dense", "factored")


@dataclass(frozen=True, eq=False)
class FactoredWeight:
    """The fast weights W_t = theta - d_t^T x_t of a linear layer for T tasks.

    `functional.inner_loop` returns them where asked for factors; it and `apply` take one in the place of a
    tensor [T, O, I].
    """

    theta: Tensor  # [O, I], that of all tasks
    d: Tensor  # [T, R, O]: the layer's output gradients in every step, times the step size
    x: Tensor  # [T, R, I]: its inputs

    def dense(self) -> Tensor:
        """The weights themselves [T, O, I]."""
        return self.theta - self.d.mT @ self.x

    @property
    def shape(self) -> Size:
        return Size((len(self.d), *self.theta.shape))

    @property
    def dtype(self) -> DType:
        return self.theta.dtype

    @property
    def device(self) -> Device:
        return self.theta.device

    @property
    def requires_grad(self) -> bool:
        return any(a.requires_grad for a in (self.theta, self.d, self.x))

    def dim(self) -> int:
        return 3

    def contiguous(self) -> "FactoredWeight":
        return self

    def detach(self) -> "FactoredWeight":
        return FactoredWeight(self.theta.detach(), self.d.detach(), self.x.detach())

    def __getitem__(self, tasks: slice) -> "FactoredWeight":
        return FactoredWeight(self.theta, self.d[tasks], self.x[tasks])


@dataclass(frozen=True)
class LinearLayer:
    """One linear op of a Program, as far as its fast weights go."""

    weight: int  # its place in problem.names
    I: int
    O: int
    rows: int  # of an example
    fixed_input: bool  # it reads x, which is the same in every step
    tied: bool


@dataclass(frozen=True)
class Sizes:
    """Of a meta-step: tasks, support and query examples of each, inner steps, query losses on these."""

    T: int
    N: int
    Q: int
    K: int
    losses: int = 1  # of the weights after how many of the steps
    optimizer: bool = False  # has SGD momentum, weight decay or clipping?
    gpu: bool = False


def query_losses(step_weights: tuple[float, ...]) -> int:
    """Sizes.losses of what backends are given"""
    return 1 + sum(w != 0 for w in step_weights[:-1])


def layers(problem: "Problem") -> list[LinearLayer]:
    """The linear layers of the model, as far as they are known."""
    program = problem.program
    if program is None:  # those that the torch backend has found
        return problem.memo.get("linear layers", [])
    index = {name: i for i, name in enumerate(problem.names)}
    used = [p for op in program.ops for p in op.params]
    found = []
    for op in program.ops:
        if op.name == "linear":
            w = op.params[0]
            assert w is not None
            *rows, I = program.buffers[op.inputs[0]]
            O = program.buffers[op.output][-1]
            tied = used.count(w) > 1
            found.append(LinearLayer(index[w], I, O, math.prod(rows), op.inputs[0] == 0, tied))
    return found


def check(fast_weights: Any) -> None:
    forms = fast_weights.values() if isinstance(fast_weights, Mapping) else [fast_weights]
    for form in forms:
        if form not in (None, *FORMS):
            raise ValueError(
                f'fast_weights must be None, "dense", "factored" or a dict of them, got {form!r}'
            )


def choose(
    problem: "Problem",
    sizes: Sizes,
    own: tuple[bool, ...],  # of each parameter: has every task its own?
    per_element: bool,  # has each element a step size of its own?
    fast_weights: Any,
) -> tuple[int, ...]:
    """The weights to keep factored, by their place in problem.names.

    fast_weights: None (the faster form of each layer), "dense", "factored" (wherever that can be), or a dict
    weight name -> one of them, where None is what names that are not in it have

    Raises ValueError for an unknown name or form, and where a layer, or all, cannot be factored as asked.
    """
    check(fast_weights)
    known = layers(problem)
    named = fast_weights if isinstance(fast_weights, Mapping) else {}
    names = {problem.names[layer.weight] for layer in known}
    if unknown := sorted(set(named) - names):
        raise ValueError(
            f"fast_weights names {unknown}, which are no weights of linear layers: {sorted(names)}"
        )
    chosen, reasons = [], []
    fast = fastest([layer for layer in known if why_dense(layer, own, per_element) is None], sizes)
    for layer in known:
        name = problem.names[layer.weight]
        form = named.get(name) if isinstance(fast_weights, Mapping) else fast_weights
        why = why_dense(layer, own, per_element)
        if why is not None:
            reasons.append(f"{name} {why}")
            if form == "factored" and name in named:
                raise ValueError(f"the fast weights of {name} cannot be factored: it {why}")
        elif form == "factored" or (form is None and layer.weight in fast):
            chosen.append(layer.weight)
    if fast_weights == "factored" and len(reasons) == len(known):
        why = "; ".join(reasons) or problem.why_no_program or "the model has no linear layer"
        raise ValueError(f"no fast weights can be factored ({why})")
    return tuple(chosen)


def why_dense(layer: LinearLayer, own: tuple[bool, ...], per_element: bool) -> str | None:
    """Why a layer cannot be factored; None if it can."""
    if per_element:
        return "has a step size for each element"
    if own[layer.weight]:
        return "starts from weights of each task's own"
    return "is used by several layers" if layer.tied else None


def cost(layer: LinearLayer, sizes: Sizes, form: str, side_by_side: bool = False) -> float:
    """Estimated nanoseconds of a layer's share of a task's meta-gradient, on one thread.

    side_by_side: do the tasks run so, for the sake of a factored layer inside the network? Dense weights then
    have those of other tasks beside them in the cache.

    Fitted to `python -m bench.forms` on an Intel Xeon (2 threads) and an AMD EPYC (1 thread), both AVX-512:
    by non-negative least squares, then so that the choice is near the best form on both. Another machine has
    other nanoseconds, but much the same ratios. Query examples, of which those runs had few, count nearly
    alike in both forms: a task has rows enough of them. What dense weights pay for an optimizer and for
    losses on more steps is read off a few runs of each; factored ones pay for the rows of the latter.
    """
    I, O, T, K = layer.I, layer.O, sizes.T, sizes.K
    N, Q, more = sizes.N * layer.rows, sizes.Q * layer.rows, sizes.losses - 1
    IO, together = I * O, max(1.0, min(T / 2, 80 // max(N, 1) + 1))  # tasks that share a product with theta
    if form == "dense":
        passes = IO * (K * (4 if layer.fixed_input else 9) + 6 * more)  # over the weights
        time = (
            0.0183 * IO * (4 * N * K + 2 * Q * sizes.losses)
            if layer.fixed_input
            else IO * (0.0161 * 9 * N * K + 0.0144 * 3 * Q * sizes.losses)
        )
        time += 0.0418 * passes + 3.6 * IO / T + (2.2 * IO * K if sizes.optimizer else 0.0)
        if 4 * IO * (K + 2) > 2**20:
            time += 0.0235 * passes
        if side_by_side and 4 * IO * (K + 2) * together > 2**19:
            time += 0.1 * IO * ((21 if sizes.optimizer else 9) * K + 6 * more)
        return time
    if layer.fixed_input:
        thin = (N + Q) * N * I + O * (K * N * N + sizes.losses * Q * N + K * N * (N + Q))
        rows = O * 2 * (N * K + Q * sizes.losses)
        return 0.0115 * IO * 2 * (N + Q) + 0.0132 * thin + 0.771 * rows + 3.44 * IO / together + 1000 / T
    before = sizes.losses * (K + 1) / 2 if more else K  # steps that the query sets have before them
    thin = 4 * N * (I + O) * (K * (K - 1) * N + before * Q)
    rows = (I + O) * (4 * N * K + 2 * Q * sizes.losses)
    return (
        IO * (0.011 * 6 * N * K + 0.00818 * 3 * Q * sizes.losses)
        + 0.02 * thin
        + 0.467 * rows
        + 82 * (K * K + 4 * K)
        + 3.34 * IO / T
        + 1500 / T
    )


def gpu_cost(layer: LinearLayer, sizes: Sizes, form: str) -> float:
    """The same on a GPU, by counts: products over the peak or the bytes of weights and rows over the
    bandwidth, whichever takes longer, and launches. The ceilings are an A100's by its datasheet; none of this
    was measured on a GPU.
    """
    flops_a_ns, bytes_a_ns, launch = 19.5e3, 2.04e3, 2000.0
    I, O, T, K, L = layer.I, layer.O, sizes.T, sizes.K, sizes.losses
    N, Q, IO = sizes.N * layer.rows, sizes.Q * layer.rows, I * O
    if form == "dense":
        products = IO * ((5 * N * K + 2 * Q * L) if layer.fixed_input else (9 * N * K + 3 * Q * L))
        passes = IO * ((6 * K + 2 * L) if layer.fixed_input else (10 * K + 3 * L))
        return max(2 * products / flops_a_ns, 4 * passes / bytes_a_ns) + launch * 5 * (2 * K + L) / T
    if layer.fixed_input:
        products = 2 * IO * (N + Q) + O * N * (2 * K * N + (K + L) * Q) + I * N * (2 * K * N + (K + L) * Q)
        rows = (I + O) * (2 * K * N + (K + L) * Q)
    else:
        past, later = (K - 1) / 2 * N, L * Q + (K - 1) * N  # rows of the sums, on average
        thin = (I + O) * (K * N * (4 * past + 2 * later) + 2 * Q * L * K * N)
        products = IO * (4 * N * K + 2 * Q * L + L * Q + 2 * N * K) + thin
        rows = (I + O) * (K * (4 * (past + N) + 2 * (later + N)) + 2 * L * (K * N + Q))
    return max(2 * products / flops_a_ns, 4 * rows / bytes_a_ns) + launch * 12 * (2 * K + L) / T


def fastest(layers: list[LinearLayer], sizes: Sizes) -> set[int]:
    """The weights of these layers that are best factored: with tasks one after another, where only layers
    that read x can be, or side by side. On a GPU they always are so."""
    if sizes.gpu:
        return {a.weight for a in layers if gpu_cost(a, sizes, "factored") < gpu_cost(a, sizes, "dense")}
    best, least = set[int](), float("inf")
    for side_by_side in (False, True):
        factored, total = set(), 0.0
        for layer in layers:
            dense = cost(layer, sizes, "dense", side_by_side)
            can = side_by_side or layer.fixed_input
            other = cost(layer, sizes, "factored", side_by_side) if can else float("inf")
            total += min(dense, other)
            if other < dense:
                factored.add(layer.weight)
        if total < least:
            best, least = factored, total
    return best
