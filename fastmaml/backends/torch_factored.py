"""Factored fast weights on the `torch` backend: those of csrc/cpu/factored.h, by torch.func.

Every F.linear whose weight stays factored is caught on its way into torch and computed as

    y = omega x theta^T + b - (x X^T) D + (x B^T) A + probe

X [R, I] and D [R, O] hold the rows x_j and alpha_j d_j of the steps before. The gradient by `probe`, which is
zero, is d. A is zero with a tangent, so that B and A are the direction u of the dual sweep. theta is the one
that all tasks share: vmap makes its products those of the rows of all tasks.

Where the rows themselves leave the loop (`inner_loop`), their gradients join the dual sweep of their step:
that of d as a tangent of the probe, and that of x as a tangent of `pull`, which is zero and has <x, pull> in
the loss. For d and x are the gradients of that loss by probe and pull, and second derivatives are symmetric.

Momentum, weight decay and clipping (torch.py has the recursion) make sums of the same outer products, which
only change their coefficients:

    W = omega theta - sum_j alpha_j d_j^T x_j      M = rho theta + sum_j beta_j d_j^T x_j
    v = sum_r gamma_r a_r^T b_r                    n = sum_r delta_r a_r^T b_r

Norms and inner products are those of Grams: <a^T b, d^T x> = <a d^T, b x^T>.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import grad_and_value, jvp

from ..forms import FactoredWeight
from .torch_descent import clipping, next_momentum, wide
from .torch_linear import Caught

Rows = tuple[Tensor, Tensor]  # d [T, R, O], x [T, R, I]: a sum of outer products d^T x


@dataclass(frozen=True)
class _Sums:
    """Two sums of the same outer products d^T x: W's and M's, or those of the adjoints v and n."""

    d: Tensor  # [T, R, O]
    x: Tensor  # [T, R, I]
    first: Tensor  # [T, R]
    second: Tensor  # [T, R]

    def grown(self, d: Tensor, x: Tensor, first: Tensor | float, second: Tensor | float) -> "_Sums":
        """With more rows; first, second: their coefficients, one number or [T, 1]"""
        rows = d.shape[:2]
        each = [
            torch.cat([old, torch.as_tensor(new).to(old).expand(rows)], 1)
            for old, new in ((self.first, first), (self.second, second))
        ]
        return _Sums(torch.cat([self.d, d], 1), torch.cat([self.x, x], 1), *each)

    def products(self, d: Tensor, x: Tensor) -> Tensor:
        """<each of the outer products, sum of the d^T x>: [T, R]"""
        return ((self.d @ d.mT) * (self.x @ x.mT)).sum(2)


_UNUSED = "a factored weight is not used by any F.linear: pass fast_weights='dense', or its .dense() on"
Coefficients = tuple[Tensor, Tensor, Any, Any]  # alpha and beta [T, R]; omega and rho


def _next(rule: tuple[float, ...], a: Any, c: Any, rows: int, old: Coefficients) -> Coefficients:
    """Those after a step of size a whose gradient, `rows` more rows, was clipped by c, a number or [T]"""
    momentum, decay, _ = rule or (0.0, 0.0, math.inf)
    alpha, beta, omega, rho = old
    if rule:
        beta = momentum * beta - decay * alpha
        rho = momentum * rho + decay * omega
        omega = omega - a * rho if decay else omega
        alpha = alpha + a * beta
    c = torch.as_tensor(c).to(alpha).reshape(-1, 1).expand(len(alpha), rows)
    return torch.cat([alpha, a * c], 1), torch.cat([beta, c], 1), omega, rho


@dataclass
class _Layer:
    weight: int  # its place in problem.names
    theta: Tensor
    forward: _Sums  # of alpha and beta
    omega: Any = 1.0
    rho: Any = 0.0
    v: Any = None  # _Sums of gamma and delta

    @property
    def rows(self) -> Rows:
        """What W_k has less than omega theta."""
        return self.forward.first[..., None] * self.forward.d, self.forward.x


class FactoredLoop:
    """The inner loop of all tasks, and its adjoint, with some weights factored; backend: torch.py"""

    def __init__(self, backend, problem, params, factored, x: Tensor, rule=()) -> None:
        self.backend, self.problem, self.rule = backend, problem, rule
        self.layers = [_layer(i, params[i], len(x)) for i in factored]
        self.w = {  # of its own memory: what no step changes is a result, too
            i: w.detach().clone(memory_format=torch.contiguous_format)
            for i, w in _dense(problem, params, factored, len(x)).items()
        }
        self.m = {i: torch.zeros_like(w) for i, w in self.w.items()} if rule else {}
        self.dense = list(self.w)
        self.v: dict[int, Tensor] = {}
        self.n: dict[int, Tensor] = {}
        self.rows: dict[int, list[int]] = {}  # by the examples of a task, see _output_rows
        self.trajectory: list[Any] = []  # of step 0, 1, ..: what the step began with
        self.c: list[Any] = []  # what clipping took of the gradient of step 0, 1, ..

    def _output_rows(self, x: Tensor) -> list[int]:
        """Rows of a task that each layer has for x, found once by a forward of one task."""
        if x.shape[1] in self.rows:
            return self.rows[x.shape[1]]
        thetas = [layer.theta for layer in self.layers]
        with Caught(thetas, [None] * len(thetas)) as caught, torch.no_grad():
            self.backend._output(self.problem, self._weights({i: w[0] for i, w in self.w.items()}), x[0])
        return self.rows.setdefault(x.shape[1], [len(caught.x[id(layer.theta)]) for layer in self.layers])

    def _weights(self, dense: dict[int, Tensor]) -> list[Tensor]:
        thetas = {layer.weight: layer.theta for layer in self.layers}
        return [thetas[i] if i in thetas else dense[i] for i in range(len(self.problem.names))]

    def gradient(self, x: Tensor, y, scale: float = 1.0, directions=None, with_x: bool = False, pushes=None):
        """(loss [T], dense gradients, d, gradient of x or None, inputs x of the layers), and their tangents
        along `directions` = (dense, [(a, b)]) if given, and along `pushes` = [(of probe, of pull)]."""
        probes = [
            x.new_zeros(len(x), n, len(layer.theta))
            for n, layer in zip(self._output_rows(x), self.layers, strict=True)
        ]
        dense = list(self.w.values())
        omegas = [None if isinstance(layer.omega, float) else layer.omega for layer in self.layers]

        def of_task(w, probe, x, d_j, x_j, a, b, pull, target, weight):
            none = [None] * len(d_j)
            parts = list(zip(d_j, x_j, a or none, b or none, probe, omegas, strict=True))
            with Caught([layer.theta for layer in self.layers], parts) as caught:
                all_weights = self._weights(dict(zip(self.dense, w, strict=True)))
                loss = scale * self.backend._loss(self.problem)(all_weights, x, target, weight)
            inputs = [caught.x.get(id(layer.theta)) for layer in self.layers]
            if any(rows is None for rows in inputs):
                raise RuntimeError(_UNUSED)
            for rows, p in zip(inputs, pull, strict=False):
                loss = loss + (rows * p).sum()
            return loss, inputs

        gradient = grad_and_value(of_task, argnums=(0, 1, 2) if with_x else (0, 1), has_aux=True)

        def flat(w, a, probe, pull, x, d_j, x_j, b, target, weight):
            (g, d, *g_x), (loss, inputs) = gradient(w, probe, x, d_j, x_j, a, b, pull, target, weight)
            return loss, g, d, g_x, inputs

        d_j, x_j = ([layer.rows[i] for layer in self.layers] for i in (0, 1))
        rest = x, d_j, x_j
        if directions is None:

            def primal(w, probe, x, d_j, x_j, target, weight):
                return flat(w, [], probe, [], x, d_j, x_j, [], target, weight)

            return self.backend._map(primal, dense, probes, *rest, *y)
        t_w, rows = directions
        t_a, b = [r[0] for r in rows], [r[1] for r in rows]
        along = [t_w, t_a]
        at = [dense, [torch.zeros_like(a) for a in t_a]]
        if pushes is not None:
            along += [p[0] for p in pushes], [p[1] for p in pushes]
            at += [probes, [torch.zeros_like(p[1]) for p in pushes]]

        def dual(at, along, probe, *rest):
            run = lambda w, a, probe=probe, pull=(): flat(w, a, probe, list(pull), *rest)  # noqa: E731
            return jvp(run, tuple(at), tuple(along))

        return self.backend._map(dual, at, along, probes, *rest, b, *y)

    def clip(self, g: dict[int, Tensor], d: list[Tensor], x: list[Tensor]) -> tuple[Any, Any]:
        """c, and dc / d(|g|^2 / 2), [T] each, of the gradient g with d^T x of the layers; numbers if there is
        none"""
        if not self.rule or self.rule[2] == math.inf:
            return 1.0, 0.0
        adapt = self.problem.adapt
        if not any(adapt):
            return 1.0, 0.0
        squares = [wide(a).flatten(1).square().sum(1) for i, a in g.items() if adapt[i]]
        squares += [  # wide, for the terms of a Gram's sum cancel
            ((d_k @ d_k.mT) * (x_k @ x_k.mT)).sum((1, 2))
            for layer, d_k, x_k in zip(self.layers, map(wide, d), map(wide, x), strict=True)
            if adapt[layer.weight]
        ]
        # rounding can make it slightly less than 0
        norm = torch.stack(squares).sum(0).clamp(min=0).sqrt()
        return clipping(norm, self.rule[2], x[0].dtype)

    def step(self, sizes: list, x: Tensor, y) -> None:
        """W_{k+1} = W_k - a_k M_{k+1}; sizes: of each parameter, 0.0 for what is frozen"""
        state = [(layer.forward, layer.omega, layer.rho) for layer in self.layers]
        self.trajectory.append((dict(self.w), dict(self.m), state))
        _, g, d, _, inputs = self.gradient(x, y)
        g = dict(zip(self.dense, g, strict=True))
        c, _ = self.clip(g, d, inputs)
        self.c.append(c)
        for i, w in self.w.items():
            if self.problem.adapt[i]:
                m = _times(c, g[i])
                if self.rule:
                    m = self.m[i] = next_momentum(self.rule, self.m[i], m, w)
                self.w[i] = w - sizes[i] * m
        for layer, d_k, x_k in zip(self.layers, d, inputs, strict=True):
            if not self.problem.adapt[layer.weight]:
                continue
            old = layer.forward
            alpha, beta, layer.omega, layer.rho = _next(
                self.rule,
                sizes[layer.weight],
                c,
                d_k.shape[1],
                (old.first, old.second, layer.omega, layer.rho),
            )
            layer.forward = _Sums(torch.cat([old.d, d_k], 1), torch.cat([old.x, x_k], 1), alpha, beta)

    def add_query(self, x: Tensor, y, scale: float, *, with_x: bool) -> tuple[Tensor, Tensor | None]:
        """Adds the gradient on the query set to v; its loss [T] and gradient by x."""
        loss, g, d, g_x, inputs = self.gradient(x, y, scale, with_x=with_x)
        self.v = {i: self.v[i] + a if self.v else a for i, a in zip(self.dense, g, strict=True)}
        for layer, d_q, x_q in zip(self.layers, d, inputs, strict=True):
            layer.v = (layer.v or _no_rows(d_q, x_q)).grown(d_q, x_q, 1.0, 0.0)
        return loss, g_x[0] if g_x else None

    def lr_gradient(self, v: tuple[dict[int, Tensor], list[_Sums]], g, d, inputs) -> Tensor:
        """-<v_{k+1}, M_{k+1}> of each parameter, [T, parameters]"""
        momentum, decay, _ = self.rule or (0.0, 0.0, math.inf)
        c, _ = self.clip(g, d, inputs)
        found = {}
        for i, g_i in g.items():
            m = _times(c, g_i)
            m = next_momentum(self.rule, self.m[i], m, self.w[i]) if self.rule else m
            found[i] = (v[0][i] * m).flatten(1).sum(1)
        for layer, v_k, d_k, x_k in zip(self.layers, v[1], d, inputs, strict=True):
            along = c * (v_k.first * v_k.products(d_k, x_k)).sum(1)
            if self.rule:
                old = layer.forward
                beta = momentum * old.second - decay * old.first
                along = along + (v_k.first * v_k.products(beta[..., None] * old.d, old.x)).sum(1)
                if decay:  # M has a part of theta
                    rho = momentum * layer.rho + decay * layer.omega
                    of_theta = (v_k.d * (v_k.x @ layer.theta.mT)).sum(2)
                    along = along + rho * (v_k.first * of_theta).sum(1)
            found[layer.weight] = along
        adapt = self.problem.adapt
        return torch.stack(
            [-found[i] if adapt[i] else torch.zeros_like(found[i]) for i in range(len(adapt))], 1
        )

    def step_back(
        self, sizes: list, x: Tensor, y, *, first_order: bool, with_lr: bool, with_x: bool, outer=None
    ):
        """v_k from v_{k+1}, see torch.py.

        outer: gradients of what the step itself gave: [(d, x)] of the layers, c [T] or None.

        Returns dL/da_k [T, parameters], or None, and what is to be added to dL/dx, or None.
        """
        most = self.rule[2] if self.rule else math.inf
        self.w, self.m, state = self.trajectory.pop()
        for layer, (rows, omega, rho) in zip(self.layers, state, strict=True):
            layer.forward, layer.omega, layer.rho = rows, omega, rho
        v = dict(self.v), [layer.v for layer in self.layers]
        self.descend_back(sizes)
        clips = most < math.inf and not first_order
        g, d, inputs = {}, [], []
        if clips or (first_order and with_lr):
            _, g, d, _, inputs = self.gradient(x, y)
            g = dict(zip(self.dense, g, strict=True))
        if first_order:
            return self.lr_gradient(v, g, d, inputs) if with_lr else None, None
        rows, of_c = outer or (None, None)
        pushes = [(-of_d, -of_x) for of_d, of_x in rows] if rows else None
        u = self.through_clip(g, d, inputs, of_c) if clips else self.minus_n()
        primal, tangent = self.gradient(x, y, directions=u, with_x=with_x, pushes=pushes)
        (_, g, d, _, inputs), (_, t_g, t_d, t_x, t_inputs) = primal, tangent
        grad_lr = self.lr_gradient(v, dict(zip(self.dense, g, strict=True)), d, inputs) if with_lr else None
        self.v = {i: a - t for (i, a), t in zip(self.v.items(), t_g, strict=True)}
        for layer, d_k, x_k, t_d_k, t_x_k in zip(self.layers, d, inputs, t_d, t_inputs, strict=True):
            layer.v = layer.v.grown(-t_d_k, x_k, 1.0, 0.0).grown(-d_k, t_x_k, 1.0, 0.0)
        return grad_lr, -t_x[0] if t_x else None

    def back(
        self, sizes: list[list], x: Tensor, y, *, first_order: bool, with_lr: bool, with_x: bool, S: int,
        outer=None, then=None,
    ):  # fmt: skip
        """v_0 from v_K; outer: see step_back, by step; then(k) is called when v is v_k.

        Returns dL/da [T, K, S], or None, and dL/dx, or None.
        """
        g_lr, g_x = [], torch.zeros_like(x) if with_x else None
        for k in reversed(range(len(sizes))):
            row, t_x = self.step_back(
                sizes[k], x, y, first_order=first_order, with_lr=with_lr, with_x=with_x,
                outer=outer[k] if outer else None,
            )  # fmt: skip
            g_x = g_x + t_x if t_x is not None else g_x
            if row is not None:
                g_lr.append(row.sum(1, keepdim=True) if S == 1 else row)
            if then:
                then(k)
        return torch.stack(g_lr[::-1], 1) if g_lr else None, g_x

    def descend_back(self, sizes: list) -> None:
        """n <- momentum n - a_k v, then v <- v + weight_decay n"""
        momentum, decay, _ = self.rule or (0.0, 0.0, math.inf)
        for i, v in self.v.items():
            n = -sizes[i] * v
            self.n[i] = n + momentum * self.n[i] if momentum and i in self.n else n
            self.v[i] = v + decay * self.n[i] if decay else v
        for layer in self.layers:
            old = layer.v
            delta = momentum * old.second - sizes[layer.weight] * old.first
            layer.v = _Sums(old.d, old.x, old.first + decay * delta, delta)

    def minus_n(self) -> tuple[list[Tensor], list[Rows]]:
        sums = [layer.v for layer in self.layers]
        return [-n for n in self.n.values()], [(-a.second[..., None] * a.d, a.x) for a in sums]

    def through_clip(self, g: dict[int, Tensor], d: list[Tensor], x: list[Tensor], of_c: Tensor | None):
        """-(c n + c' <g, n> g); of_c: what the gradient by c has besides <g, n>"""
        (c, slope), adapt = self.clip(g, d, x), self.problem.adapt
        sums = [layer.v for layer in self.layers]
        along = sum((g[i] * n).flatten(1).sum(1) for i, n in self.n.items() if adapt[i])
        for a, d_k, x_k in zip(sums, d, x, strict=True):
            along = along + (a.second * a.products(d_k, x_k)).sum(1)  # 0 for what is frozen
        along = along if of_c is None else along + of_c
        more = -slope * along
        dense, rows = self.minus_n()
        dense = [
            _times(c, u) + (_times(more, g[i]) if adapt[i] else 0.0)
            for i, u in zip(self.dense, dense, strict=True)
        ]
        for j, (layer, d_k, x_k) in enumerate(zip(self.layers, d, x, strict=True)):
            a, b = _times(c, rows[j][0]), rows[j][1]
            if adapt[layer.weight]:
                a, b = torch.cat([a, _times(more, d_k)], 1), torch.cat([b, x_k], 1)
            rows[j] = a, b
        return dense, rows

    def of_theta(self, layer: _Layer, per_task: bool) -> Tensor:
        """v_0 of the layer: [T or 1, O, I]"""
        a, b = layer.v.first[..., None] * layer.v.d, layer.v.x
        return a.mT @ b if per_task else (a.flatten(0, 1).T @ b.flatten(0, 1))[None]

    def gradients(self, per_task: bool) -> Tensor:
        """v_0: [T or 1, P]"""
        T = len(self.layers[0].v.d)
        offsets, size = self.problem.layout(self.layers[0].theta.element_size())
        flat = self.layers[0].theta.new_zeros(T if per_task else 1, size)
        for i, v in self.v.items():
            part = v.reshape(T, -1) if per_task else v.sum(0, keepdim=True).reshape(1, -1)
            flat[:, offsets[i] : offsets[i] + part.shape[1]] = part
        for layer in self.layers:
            at = offsets[layer.weight]
            flat[:, at : at + layer.theta.numel()] = self.of_theta(layer, per_task).reshape(len(flat), -1)
        return flat


def _times(c: Any, g: Tensor) -> Tensor:
    """A number, or one for each task [T], times [T, *shape]"""
    return c * g if isinstance(c, float) else c.view(-1, *[1] * (g.dim() - 1)) * g


def _no_rows(d: Tensor, x: Tensor) -> _Sums:
    return _Sums(d[:, :0], x[:, :0], d.new_zeros(len(d), 0), d.new_zeros(len(d), 0))


def _layer(i: int, weight: Tensor | FactoredWeight, T: int) -> _Layer:
    if isinstance(weight, FactoredWeight):
        ones = weight.d.new_ones(weight.d.shape[:2])
        return _Layer(i, weight.theta, _Sums(weight.d, weight.x, ones, torch.zeros_like(ones)))
    O, I = weight.shape
    return _Layer(i, weight.detach(), _no_rows(weight.new_empty(T, 0, O), weight.new_empty(T, 0, I)))


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
        thetas = {layer.weight: layer.theta for layer in layers}
        parts = [(d, x_j, None, None, None, None) for d, x_j in rows]
        with Caught(list(thetas.values()), parts) as caught:
            weights = dict(zip(dense, w, strict=True)) | thetas
            out = backend._output(problem, [weights[i] for i in range(len(params))], x)
        if len(caught.x) < len(thetas):
            raise RuntimeError(_UNUSED)
        return out

    return backend._map(of_task, list(dense.values()), x, [layer.rows for layer in layers])


def inner_loop(backend, problem, params, lr, x, y, *, steps, rule, factored) -> list[Tensor]:
    """The dense fast weights [T, *shape], then of each layer that stays factored the rows d and x that the
    steps left, [T, R, O] and [T, R, I], then c [T, steps] if gradients are clipped: see `weights`."""
    loop = FactoredLoop(backend, problem, params, factored, x, rule)
    for k in range(steps):
        loop.step(backend._step_sizes(problem, lr[k]), x, y)
        loop.trajectory.clear()
    rows = [a for i, layer in zip(factored, loop.layers, strict=True) for a in _new_rows(params[i], layer)]
    c = [torch.stack([x.new_ones(len(x)) * c for c in loop.c], 1)] if clips(rule, steps) else []
    return [*loop.w.values(), *rows, *c]


def clips(rule, steps: int) -> bool:
    return bool(rule) and rule[2] < math.inf and steps > 0


def _new_rows(weight: Tensor | FactoredWeight, layer: _Layer) -> Rows:
    before = weight.d.shape[1] if isinstance(weight, FactoredWeight) else 0
    return layer.forward.d[:, before:], layer.forward.x[:, before:]


def weights(
    backend, problem, params, lr, *, rule, factored, found: Sequence[Tensor]
) -> list[Tensor | FactoredWeight]:
    """The fast weights of what `inner_loop` found, differentiably."""
    dense = [i for i in range(len(params)) if i not in factored]
    by_place: dict[int, Tensor | FactoredWeight] = dict(zip(dense, found, strict=False))
    rows = found[len(dense) : len(dense) + 2 * len(factored)]
    c = found[len(dense) + len(rows) :]
    sizes = [backend._step_sizes(problem, lr_k) for lr_k in lr]
    for i, d, x in zip(factored, rows[::2], rows[1::2], strict=True):
        layer = _layer(i, params[i], len(d))
        old = layer.forward
        now = old.first, old.second, layer.omega, layer.rho
        for k in range(len(lr) if problem.adapt[i] else 0):
            each = d.shape[1] // len(lr)
            now = _next(rule, sizes[k][i], c[0][:, k] if c else 1.0, each, now)
        alpha, _, omega, _ = now
        theta = params[i].theta if isinstance(params[i], FactoredWeight) else params[i]
        before = old.d.shape[1]
        d = alpha[:, before:, None] * d
        if before:
            d, x = torch.cat([alpha[:, :before, None] * old.d, d], 1), torch.cat([old.x, x], 1)
        by_place[i] = FactoredWeight(theta if isinstance(omega, float) else omega * theta, d, x)
    return [by_place[i] for i in range(len(params))]


def inner_loop_backward(
    backend, problem, params, lr, x, y, outer, *, steps, first_order, rule, factored, needs
):  # fmt: skip
    """outer: gradients of what `inner_loop` gives, None for 0.

    Gradients of the parameters, theta, d and x in the place of one that was factors before ([T, ..] where
    they are of a task, else summed over tasks), of lr [K, S] and of x; None for these two where not needed.
    """
    try:
        return _inner_loop_backward(
            backend, problem, params, lr, x, y, outer,
            steps=steps, first_order=first_order, rule=rule, factored=factored, needs=needs,
        )  # fmt: skip
    except RuntimeError as error:
        backend._no_jvp(problem, error)
        raise RuntimeError(NO_JVP) from error


NO_JVP = (
    "torch has no forward derivative of the model or the loss, which the derivative of factors takes: "
    "call meta_loss, or inner_loop with fast_weights='dense'"
)


def _inner_loop_backward(
    backend, problem, params, lr, x, y, outer, *, steps, first_order, rule, factored, needs
):  # fmt: skip
    loop = FactoredLoop(backend, problem, params, factored, x, rule)
    sizes = [backend._step_sizes(problem, lr[k]) for k in range(steps)]
    for k in range(steps):
        loop.step(sizes[k], x, y)
    count = len(loop.dense)
    loop.v = {
        i: torch.zeros_like(w) if v is None else v
        for (i, w), v in zip(loop.w.items(), outer[:count], strict=True)
    }
    of_rows: list[list[Rows]] = [[] for _ in range(steps)]  # by step
    for j, (layer, n) in enumerate(zip(loop.layers, loop._output_rows(x), strict=True)):
        layer.v = _no_rows(layer.forward.d, layer.forward.x)
        given = zip(outer[count + 2 * j : count + 2 * j + 2], layer.theta.shape, strict=True)
        of_d, of_x = (  # what is frozen keeps no rows
            v if v is not None and v.shape[1] else x.new_zeros(len(x), steps * n, size) for v, size in given
        )
        for k in range(steps):
            of_rows[k].append((of_d[:, k * n : (k + 1) * n], of_x[:, k * n : (k + 1) * n]))
    of_c = outer[count + 2 * len(factored)] if len(outer) > count + 2 * len(factored) else None
    g_lr, g_x = loop.back(
        sizes, x, y, first_order=first_order, with_lr="lr" in needs, with_x="x" in needs, S=lr.shape[1],
        outer=[(rows, None if of_c is None else of_c[:, k]) for k, rows in enumerate(of_rows)],
    )  # fmt: skip
    grads: dict[int, list[Tensor]] = {
        i: [v if params[i].dim() > len(problem.shapes[i]) else v.sum(0)] for i, v in loop.v.items()
    }
    for layer in loop.layers:
        v, weight = layer.v, params[layer.weight]
        grads[layer.weight] = [loop.of_theta(layer, False)[0]]
        if isinstance(weight, FactoredWeight):  # it is theta - d^T x
            a = v.first[..., None] * v.d
            grads[layer.weight] += [-(weight.x @ v.x.mT) @ a, -(weight.d @ a.mT) @ v.x]
    parts = [g for i in range(len(params)) for g in grads[i]]
    return parts, None if g_lr is None else g_lr.sum(0), g_x


def meta_loss(
    backend, problem, params, lr, support, query,
    *, steps, first_order, rule, step_weights, per_task, scale, needs, factored,
):  # fmt: skip
    """As `backend.meta_loss`."""
    (x, y), (x_q, y_q) = support, query
    loop = FactoredLoop(backend, problem, params, factored, x, rule)
    sizes = [backend._step_sizes(problem, lr[k]) for k in range(steps)]
    weights = step_weights or (*[0.0] * (steps - 1), 1.0)
    back = needs & {"params", "lr", "x_s"}
    loss, g_xq = x.new_zeros(len(x)), None

    def add_query(k: int) -> None:
        nonlocal loss, g_xq
        weight = weights[max(k - 1, 0)]
        if weight or k == steps:
            more, g = loop.add_query(x_q, y_q, scale * weight, with_x="x_q" in needs)
            loss, g_xq = loss + more, g if g_xq is None or g is None else g_xq + g

    for k in range(steps):
        loop.step(sizes[k], x, y)
        if step_weights and not back and k + 1 < steps:
            add_query(k + 1)
    add_query(steps)
    if not back:
        return loss if per_task else loss.sum(), None, None, None, g_xq
    g_lr, g_x = loop.back(
        sizes, x, y, first_order=first_order, with_lr="lr" in needs, with_x="x_s" in needs, S=lr.shape[1],
        then=(lambda k: add_query(k) if k else None) if step_weights else None,
    )  # fmt: skip
    if g_lr is not None and not per_task:
        g_lr = g_lr.sum(0, keepdim=True)
    loss = loss if per_task else loss.sum()
    per_task |= any(p.dim() > len(s) for p, s in zip(params, problem.shapes, strict=True))
    return loss, loop.gradients(per_task), g_lr, g_x, g_xq
