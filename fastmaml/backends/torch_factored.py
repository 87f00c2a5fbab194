"""Factored fast weights on the `torch` backend: those of csrc/cpu/factored.h, by torch.func.

Every F.linear whose weight stays factored is caught on its way into torch and computed as

    y = x theta^T + b - (x X^T) D + (x B^T) A + probe

X [R, I] and D [R, O] hold the rows x_j and a_j d_j of the steps before. The gradient by `probe`, which is
zero, is d. A is zero with a tangent, so that B and A are the direction u of the dual sweep. theta is the one
that all tasks share: vmap makes its products those of the rows of all tasks.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad_and_value, jvp
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from ..forms import FactoredWeight, LinearLayer

Rows = tuple[Tensor, Tensor]  # d [T, R, O], x [T, R, I]: a sum of outer products d^T x


@dataclass
class _Layer:
    weight: int  # its place in problem.names
    theta: Tensor
    forward: Rows  # what W_k has less than theta
    v: list[Rows] = field(default_factory=list)  # the adjoint


class _Linear(TorchFunctionMode):
    """Catches the linear layers of these weights, and keeps their inputs."""

    def __init__(self, layers: list[_Layer], parts: Sequence[tuple[Any, ...] | None]) -> None:
        super().__init__()
        self.parts = {id(layer.theta): part for layer, part in zip(layers, parts, strict=True)}
        self.x: dict[int, Tensor] = {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if (
            func is not F.linear
            or id(weight := args[1] if len(args) > 1 else kwargs["weight"]) not in self.parts
        ):
            return func(*args, **kwargs)
        key = id(weight)
        if key in self.x:
            raise RuntimeError(
                "a weight that several layers use cannot be factored: pass fast_weights='dense'"
            )
        x = args[0] if args else kwargs["input"]
        y = func(*args, **kwargs)
        rows = self.x[key] = x.reshape(-1, x.shape[-1])
        part = self.parts[key]
        if part is None:
            return y
        d_j, x_j, a, b, probe = part
        more = -(rows @ x_j.mT) @ d_j
        if probe is not None:
            more = more + probe
        if a is not None:
            more = more + (rows @ b.mT) @ a
        return y + more.reshape(y.shape)


class _Uses(TorchFunctionMode):
    """Listens to what a model does with its weights."""

    def __init__(self, weights: list[Tensor]) -> None:
        super().__init__()
        self.place = {id(w): i for i, w in enumerate(weights)}
        self.linear: dict[int, int] = {}  # rows that a weight is multiplied with as a linear layer's
        self.uses: Counter[int] = Counter()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for a in tree_leaves((args, kwargs)):
            if id(a) in self.place:
                self.uses[self.place[id(a)]] += 1
        if func is F.linear:
            x, weight = (args[i] if len(args) > i else kwargs[n] for i, n in enumerate(("input", "weight")))
            if id(weight) in self.place and weight.dim() == 2:
                self.linear[self.place[id(weight)]] = x.numel() // x.shape[-1]
        return func(*args, **kwargs)


def linear_layers(
    output: Callable[[list[Tensor]], Any], weights: list[Tensor], examples: int
) -> list[LinearLayer]:
    """Those that a model without a Program calls by F.linear; output(weights) runs it on `examples` examples.

    A weight that anything else reads, too, counts as tied.
    """
    with _Uses(weights) as seen, torch.no_grad():
        output(weights)
    return [
        LinearLayer(i, weights[i].shape[1], weights[i].shape[0], rows // examples, False, seen.uses[i] > 1)
        for i, rows in sorted(seen.linear.items())
        if rows % examples == 0
    ]


class FactoredLoop:
    """The inner loop of all tasks, and its adjoint, with some weights factored; backend: torch.py"""

    def __init__(self, backend, problem, params, factored, x: Tensor) -> None:
        self.backend, self.problem = backend, problem
        self.layers = [_layer(i, params[i], len(x)) for i in factored]
        self.w = {i: w.detach().contiguous() for i, w in _dense(problem, params, factored, len(x)).items()}
        self.dense = list(self.w)
        self.v: dict[int, Tensor] = {}
        self.rows: dict[int, list[int]] = {}  # by the examples of a task, see _output_rows
        self.trajectory: list[Any] = []  # W_0, .., W_{K-1}

    def _output_rows(self, x: Tensor) -> list[int]:
        """Rows of a task that each layer has for x, found once by a forward of one task."""
        if x.shape[1] in self.rows:
            return self.rows[x.shape[1]]
        with _Linear(self.layers, [None] * len(self.layers)) as caught, torch.no_grad():
            self.backend._output(self.problem, self._weights({i: w[0] for i, w in self.w.items()}), x[0])
        return self.rows.setdefault(x.shape[1], [len(caught.x[id(layer.theta)]) for layer in self.layers])

    def _weights(self, dense: dict[int, Tensor]) -> list[Tensor]:
        thetas = {layer.weight: layer.theta for layer in self.layers}
        return [thetas[i] if i in thetas else dense[i] for i in range(len(self.problem.names))]

    def gradient(self, x: Tensor, y, scale: float = 1.0, directions=None, with_x: bool = False):
        """(loss [T], dense gradients, d, gradient of x or None, inputs x of the layers), and their tangents
        along `directions` = (dense, [(a, b)]) if given."""
        probes = [
            x.new_zeros(len(x), n, len(layer.theta))
            for n, layer in zip(self._output_rows(x), self.layers, strict=True)
        ]
        dense = list(self.w.values())
        target, weight = y

        def of_task(w, probe, x, d_j, x_j, a, b, target, weight):
            parts = list(zip(d_j, x_j, a or [None] * len(d_j), b or [None] * len(d_j), probe, strict=True))
            with _Linear(self.layers, parts) as caught:
                all_weights = self._weights(dict(zip(self.dense, w, strict=True)))
                loss = scale * self.backend._loss(self.problem)(all_weights, x, target, weight)
            inputs = [caught.x.get(id(layer.theta)) for layer in self.layers]
            if any(rows is None for rows in inputs):
                raise RuntimeError("a factored weight is not used by any F.linear: pass fast_weights='dense'")
            return loss, inputs

        gradient = grad_and_value(of_task, argnums=(0, 1, 2) if with_x else (0, 1), has_aux=True)

        def flat(w, a, *rest):
            probe, x, d_j, x_j, b, target, weight = rest
            (g, d, *g_x), (loss, inputs) = gradient(w, probe, x, d_j, x_j, a, b, target, weight)
            return loss, g, d, g_x, inputs

        d_j, x_j = ([layer.forward[i] for layer in self.layers] for i in (0, 1))
        rest = (probes, x, d_j, x_j)
        if directions is None:
            return self.backend._map(
                lambda w, *r: flat(w, [], *r[:4], [], *r[4:]), dense, *rest, target, weight
            )
        t_w, rows = directions
        t_a, b = [r[0] for r in rows], [r[1] for r in rows]

        def dual(w, t_w, a, t_a, *rest):
            return jvp(lambda w, a: flat(w, a, *rest), (w, a), (t_w, t_a))

        zeros = [torch.zeros_like(a) for a in t_a]
        return self.backend._map(dual, dense, t_w, zeros, t_a, *rest, b, target, weight)

    def step(self, sizes: list, x: Tensor, y) -> None:
        """W_{k+1} = W_k - a_k g_k; sizes: of each parameter, 0.0 for what is frozen"""
        self.trajectory.append((dict(self.w), [layer.forward for layer in self.layers]))
        _, g, d, _, inputs = self.gradient(x, y)
        for (i, w), g_i in zip(self.w.items(), g, strict=True):
            self.w[i] = w - sizes[i] * g_i if self.problem.adapt[i] else w
        for layer, d_k, x_k in zip(self.layers, d, inputs, strict=True):
            if self.problem.adapt[layer.weight]:
                old_d, old_x = layer.forward
                layer.forward = torch.cat([old_d, sizes[layer.weight] * d_k], 1), torch.cat([old_x, x_k], 1)

    def start_adjoint(self, x: Tensor, y, scale: float, *, with_x: bool) -> tuple[Tensor, Tensor | None]:
        """v_K on the query set; its loss [T] and gradient by x."""
        loss, g, d, g_x, inputs = self.gradient(x, y, scale, with_x=with_x)
        self.v = dict(zip(self.dense, g, strict=True))
        for layer, d_q, x_q in zip(self.layers, d, inputs, strict=True):
            layer.v = [(d_q, x_q)]
        return loss, g_x[0] if g_x else None

    def lr_gradient(self, g: dict[int, Tensor], d: list[Tensor], inputs: list[Tensor]) -> Tensor:
        """-<v_{k+1}, g_k> of each parameter, [T, parameters]; <a^T b, d^T x> = <a d^T, b x^T>"""
        found = {i: (self.v[i] * g_i).flatten(1).sum(1) for i, g_i in g.items()}
        for layer, d_k, x_k in zip(self.layers, d, inputs, strict=True):
            a, b = _joined(layer.v)
            found[layer.weight] = ((a @ d_k.mT) * (b @ x_k.mT)).sum((1, 2))
        adapt = self.problem.adapt
        return torch.stack(
            [-found[i] if adapt[i] else torch.zeros_like(found[i]) for i in range(len(adapt))], 1
        )

    def step_back(self, sizes: list, x: Tensor, y, *, first_order: bool, with_lr: bool, with_x: bool):
        """v_k = v_{k+1} - H_k (a_k v_{k+1}).

        Returns dL/da_k [T, parameters], or None, and what is to be taken from dL/dx, or None.
        """
        self.w, forward = self.trajectory.pop()
        for layer, rows in zip(self.layers, forward, strict=True):
            layer.forward = rows
        if first_order:
            if not with_lr:
                return None, None
            _, g, d, _, inputs = self.gradient(x, y)
            return self.lr_gradient(dict(zip(self.dense, g, strict=True)), d, inputs), None
        u = [sizes[i] * self.v[i] for i in self.dense]
        rows = []
        for layer in self.layers:
            a, b = _joined(layer.v)
            rows.append((sizes[layer.weight] * a, b))
        primal, tangent = self.gradient(x, y, directions=(u, rows), with_x=with_x)
        (_, g, d, _, inputs), (_, t_g, t_d, t_x, t_inputs) = primal, tangent
        grad_lr = self.lr_gradient(dict(zip(self.dense, g, strict=True)), d, inputs) if with_lr else None
        self.v = {i: v - t for (i, v), t in zip(self.v.items(), t_g, strict=True)}
        for layer, d_k, x_k, t_d_k, t_x_k in zip(self.layers, d, inputs, t_d, t_inputs, strict=True):
            layer.v += [(-t_d_k, x_k), (-d_k, t_x_k)]
        return grad_lr, t_x[0] if t_x else None

    def gradients(self, per_task: bool) -> Tensor:
        """v_0: [T or 1, P]"""
        T, (offsets, size) = (
            len(self.layers[0].v[0][0]),
            self.problem.layout(self.layers[0].theta.element_size()),
        )
        flat = self.layers[0].theta.new_zeros(T if per_task else 1, size)
        for i, v in self.v.items():
            part = v.reshape(T, -1) if per_task else v.sum(0, keepdim=True).reshape(1, -1)
            flat[:, offsets[i] : offsets[i] + part.shape[1]] = part
        for layer in self.layers:
            a, b = _joined(layer.v)
            g = a.mT @ b if per_task else a.flatten(0, 1).T @ b.flatten(0, 1)
            at = offsets[layer.weight]
            flat[:, at : at + layer.theta.numel()] = g.reshape(len(flat), -1)
        return flat


def _layer(i: int, weight: Tensor | FactoredWeight, T: int) -> _Layer:
    if isinstance(weight, FactoredWeight):
        return _Layer(i, weight.theta, (weight.d, weight.x))
    O, I = weight.shape
    return _Layer(i, weight.detach(), (weight.new_zeros(T, 0, O), weight.new_zeros(T, 0, I)))


def _dense(problem, params, factored, T: int) -> dict[int, Tensor]:
    """The other parameters, [T, *shape] each."""
    return {
        i: params[i] if params[i].dim() > len(shape) else params[i].expand(T, *shape)
        for i, shape in enumerate(problem.shapes)
        if i not in factored
    }


def apply(backend, problem, params: list[Tensor | FactoredWeight], x: Tensor) -> Tensor:
    """The model's output; differentiable by ordinary autograd."""
    factored = [i for i, p in enumerate(params) if isinstance(p, FactoredWeight)]
    layers = [_layer(i, params[i], len(x)) for i in factored]
    dense = _dense(problem, params, factored, len(x))

    def of_task(w, x, rows):
        with _Linear(layers, [(d, x_j, None, None, None) for d, x_j in rows]):
            thetas = {layer.weight: layer.theta for layer in layers}
            weights = dict(zip(dense, w, strict=True)) | thetas
            return backend._output(problem, [weights[i] for i in range(len(params))], x)

    return backend._map(of_task, list(dense.values()), x, [layer.forward for layer in layers])


def inner_loop(backend, problem, params, lr, x, y, *, steps, factored) -> list[Tensor | FactoredWeight]:
    """Fast weights, those of `factored` as factors."""
    loop = FactoredLoop(backend, problem, params, factored, x)
    for k in range(steps):
        loop.step(backend._step_sizes(problem, lr[k]), x, y)
        loop.trajectory.clear()
    found: dict[int, Tensor | FactoredWeight] = dict(loop.w)
    for layer in loop.layers:
        found[layer.weight] = FactoredWeight(layer.theta, *layer.forward)
    return [found[i] for i in range(len(params))]


def _joined(v: list[Rows]) -> Rows:
    """Sums of outer products as one."""
    if len(v) > 1:
        v[:] = [(torch.cat([a for a, _ in v], 1), torch.cat([b for _, b in v], 1))]
    return v[0]


def meta_loss(
    backend, problem, params, lr, support, query, *, steps, first_order, per_task, scale, needs, factored
):
    """As `backend.meta_loss`."""
    x, y = support
    loop = FactoredLoop(backend, problem, params, factored, x)
    sizes = [backend._step_sizes(problem, lr[k]) for k in range(steps)]
    for k in range(steps):
        loop.step(sizes[k], x, y)
    x_q, y_q = query
    loss, g_xq = loop.start_adjoint(x_q, y_q, scale, with_x="x_q" in needs)
    loss = loss if per_task else loss.sum()
    if not needs & {"params", "lr", "x_s"}:
        return loss, None, None, None, g_xq
    S = lr.shape[1] if steps else 1
    g_lr, g_x = [], torch.zeros_like(x) if "x_s" in needs else None
    for k in reversed(range(steps)):
        how = {"first_order": first_order, "with_lr": "lr" in needs, "with_x": "x_s" in needs}
        row, t_x = loop.step_back(sizes[k], x, y, **how)
        g_x = g_x - t_x if t_x is not None else g_x
        if row is not None:
            row = row.sum(1, keepdim=True) if S == 1 else row
            g_lr.append(row if per_task else row.sum(0, keepdim=True))
    per_task |= any(p.dim() > len(s) for p, s in zip(params, problem.shapes, strict=True))
    return loss, loop.gradients(per_task), torch.stack(g_lr[::-1], 1) if g_lr else None, g_x, g_xq
