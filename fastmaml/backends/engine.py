"""The recursion of one call for all tasks at once, by sweeps: csrc/cpu/worker.h, op by op.

    W_{k+1} = W_k - a_k g_k,    v_k = v_{k+1} - H_k (a_k v_{k+1}),    dL/da_k = - v_{k+1} g_k

An Engine is made once for a kind of call (shapes, what is wanted). It owns every buffer, so that `run`
allocates nothing (but for clipping, in descent.py), and can be recorded and run again on new data.
"""

import weakref
from collections.abc import Iterator
from dataclasses import replace
from math import prod
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..forms import query_losses
from .descent import Descent
from .request import Examples, Request, Result, flat_parameters
from .rows import Rows
from .sweep import Frame, Frames, Plan, Sweep, Updates, make_plan


class Engine:
    """passes: fastmaml.kernels or its like, with `types`; request: one of the kind, whose data it leaves"""

    def __init__(
        self, passes: ModuleType | SimpleNamespace, request: Request, precision: str = "ieee"
    ) -> None:
        self.types = passes.types
        problem, x = request.problem, request.like
        self.itemsize = x.element_size()
        self.T, self.K = x.shape[0], request.steps
        self.places, self.P = _places(request)
        self.plan: Plan = make_plan(problem, passes.types, request.factored)
        self.sweep = Sweep(self.plan, passes, problem.loss, precision)
        self.dense = [i for i in sorted(self.plan.used) if i not in request.factored]
        self.adapt = [a and i in self.plan.used for i, a in enumerate(problem.adapt)]

        want, K = request.want, self.K
        self.own, self.rows = request.own, request.rows
        self.adjoint = bool({"params", "lr", "x_s"} & want)
        second_order = not request.first_order and (
            bool({"params", "x_s"} & want) or ("lr" in want and K > 1)
        )
        decays = bool(request.rule) and request.rule[1] != 0
        self.keep = (
            self.adjoint and K > 0 and (second_order or "lr" in want or bool(request.step_weights) or decays)
        )
        # the activations of the steps are the fast weights where these are factored: all of them stay
        every = 0 if request.factored else request.checkpoint_every
        self.every = every if 0 < every < K else max(K, 1)
        self.kind = kind = (
            replace(  # with data of the engine's own; the Problem holds the engine, not it that
                request,
                problem=weakref.proxy(problem),
                params=[],
                support=_like(request.support),
                query=_like(request.query),
                lr=_zeros(request.lr),
                seed=_zeros(request.seed),
                grad_loss=_zeros(request.grad_loss),
            )
        )
        self.lr = x.new_zeros(0, 1) if kind.lr is None else kind.lr
        self.support, self.query, self.seed, self.grad_loss = (
            kind.support, kind.query, kind.seed, kind.grad_loss,
        )  # fmt: skip
        self._allocate(second_order)
        for n, node in enumerate(self.plan.nodes):
            if node.w is not None and node.w in request.factored:
                assert kind.query is not None
                fixed = node.inputs[0] == 0 and K > 0 and not {"x_s", "x_q"} & want
                sets = query_losses(request.step_weights)
                self.sweep.rows[n] = Rows(
                    passes, node, self.plan.sizes, kind.support, kind.query, K, sets, second_order,
                    self.adapt[node.w], fixed, precision,
                )  # fmt: skip

    def _allocate(self, second_order: bool) -> None:
        kind, x, P, T, K = self.kind, self.kind.like, self.P, self.T, self.K
        new = x.new_zeros
        self.w0 = new(T if any(self.own) else 1, P)
        self.scales = {w: x.new_full((1,), w * kind.scale) for w in {1.0, *kind.step_weights}}

        self.frames, self.query_frame = [], None
        if self.support is not None and K > 0:
            dual = self.keep and second_order
            frames = Frames(self.plan, self.types, self.support, dual, "x_s" in kind.want)
            self.frames = [frames.make() for _ in range(self.every if self.keep else 1)]
        if self.query is not None:
            dual = kind.tail == "curvature"
            self.query_frame = Frames(self.plan, self.types, self.query, dual, "x_q" in kind.want).make(
                on_query=True
            )
        self.stored = [new(T, P) for _ in range((K - 1) // self.every + 1 if self.keep else min(K, 2))]
        self.segment = [new(T, P) for _ in range(self.every - 1 if self.keep else 0)]
        self.v, self.v_next = (new(T, P) if self.adjoint else None for _ in range(2))
        self.g: Any = new(T, P) if "lr" in kind.want or kind.rule else None
        self.u: Any = None if self.g is None else new(T, P)
        self.descent = None
        if kind.rule and K > 0:
            mask = new(P)
            for i, adapt in enumerate(kind.problem.adapt):
                self._view(mask, i)[0].fill_(float(adapt))
            self.descent = Descent(kind.rule, mask)
            self.rates = new(K, P)
            self.momenta = [new(T, P) for _ in range(K + 1)] if self.keep else [new(T, P)] * (K + 1)
            self.n = new(T, P)

        self.loss, self.each_loss = new(T), new(T)
        self.out = None
        if "out" in kind.want:
            self.out = new(T, P)
            if kind.tail != "weights":
                assert self.query is not None
                program = kind.problem.program
                assert program is not None
                self.out = new(T, self.query.x.shape[1], *program.buffers[program.output])
        whole = kind.problem.layout(self.itemsize)[1]
        self.grads = new(self.rows, whole) if "params" in kind.want else None
        self.grad_lr = new(T, K, self.lr.shape[1]) if "lr" in kind.want else None
        self.x_s = None if "x_s" not in kind.want else new(x.shape)
        self.x_q = None if self.query is None or "x_q" not in kind.want else new(self.query.x.shape)

    def load(self, request: Request) -> None:
        """Copies a request's data into the engine's own buffers."""
        flat_parameters(request, self.places, self.w0)
        for n, rows in self.sweep.rows.items():
            rows.theta.copy_(request.params[self.plan.nodes[n].w or 0])
        for mine, theirs in (
            (self.lr, request.lr),
            (self.seed, request.seed),
            (self.grad_loss, request.grad_loss),
            *zip(self.support or (), request.support or (), strict=True),
            *zip(self.query or (), request.query or (), strict=True),
        ):
            if mine is not None and theirs is not None:
                mine.copy_(theirs)

    def run(self) -> None:
        kind, K = self.kind, self.K
        self.loss.zero_()
        for grad in (self.x_s, self.x_q):
            if grad is not None:
                grad.zero_()
        if self.descent is not None:
            self.momenta[0].zero_()
            self.n.zero_()
            for k in range(K):
                for i in range(len(self.places)):
                    self._view(self.rates[k], i)[0].copy_(self._lr(k, i))
        for rows in self.sweep.rows.values():
            rows.begin()
        at_steps = bool(kind.step_weights)
        for k in range(K):
            self._inner_step(k)
            if at_steps and not self.keep and k + 1 < K:
                self._query_tail(k + 1)
        self._tail()
        if self.adjoint:
            for k in reversed(range(K if self.keep else 0)):
                if (k + 1) % self.every == 0 and k + 1 < K:  # a segment whose activations were written over
                    for j in range(k + 1 - self.every, k + 1):
                        self._inner_step(j)
                self._adjoint_step(k)
                if at_steps and k > 0:
                    self._query_tail(k)
            if self.grads is not None:
                self._write_grads(self.grads)

    def _write_grads(self, grads: Tensor) -> None:
        assert self.v is not None
        summed = len(grads) < self.T
        if not self.sweep.rows:
            torch.sum(self.v, 0, keepdim=True, out=grads) if summed else grads.copy_(self.v)
            return
        parameter = {self.plan.nodes[n].w: rows for n, rows in self.sweep.rows.items()}
        for i, (shape, stride, at) in enumerate(self.kind.problem.strided[self.itemsize]):
            view = grads.as_strided((len(grads), *shape), (grads.shape[1], *stride), at)
            if i in parameter:
                parameter[i].weight_grad(view)
            else:
                v = self._view(self.v, i)
                torch.sum(v, 0, keepdim=True, out=view) if summed else view.copy_(v)

    def result(self) -> Result:
        """Copies of what `run` left: it is written over by the next one."""
        kind = self.kind
        r = Result()
        if "loss" in kind.want:
            r.loss = self.loss.clone() if kind.per_task else self.loss.sum()
        if self.out is not None:
            r.out = self.out.clone()
        if self.grad_lr is not None:
            r.lr = self.grad_lr.clone() if self.rows == self.T else self.grad_lr.sum(0, keepdim=True)
        r.params = None if self.grads is None else self.grads.clone()
        r.x_s = None if self.x_s is None else self.x_s.clone()
        r.x_q = None if self.x_q is None else self.x_q.clone()
        return r

    # Where W_k is: kept at every `every`-th step, in the current segment else. Without an adjoint two take
    # turns.

    def _weights(self, k: int) -> Tensor:
        if k == 0:
            return self.w0
        if not self.keep:
            return self.stored[k % len(self.stored)]
        if k % self.every == 0 or k == self.K:
            return self.stored[(k - 1) // self.every]
        return self.segment[k % self.every - 1]

    def _frame(self, k: int):
        return self.frames[k % len(self.frames)]

    def _view(self, flat: Tensor, i: int) -> Tensor:
        """Parameter i of every task, [T, *shape], in a flat [T, P]; stride 0 in a [1, P] or [P]"""
        shape, stride, at = self.places[i]
        rows = self.P if flat.dim() == 2 and len(flat) > 1 else 0
        return flat.as_strided((self.T, *shape), (rows, *stride), flat.storage_offset() + at)

    def _lr(self, k: int, i: int) -> Tensor:
        row = self.lr[k]
        if len(row) == 1:
            return row
        if len(row) == len(self.places):
            return row[i : i + 1]
        shape, stride, at = self.places[i]
        return self.lr.as_strided(shape, stride, k * self.P + at)

    def _params(self, k: int, tangent: Tensor | None = None, lr: int | None = None) -> dict[int, Any]:
        """W_k, with tangents; lr: the step by whose sizes these are scaled, where frozen ones have none"""
        params: dict[int, Any] = dict.fromkeys(self.kind.factored)
        for i in self.dense:
            value = self._view(self._weights(k) if self.adapt[i] else self.w0, i)
            if tangent is None or (lr is not None and not self.adapt[i]):
                params[i] = self.types.Param(value)
            else:
                rate = None if lr is None else self._lr(lr, i)
                params[i] = self.types.Param(value, self._view(tangent, i), rate)
        return params

    def _updates(self, dst: Tensor, base: Tensor | None = None, **how: Any) -> Updates:
        return Updates(
            {
                i: self.types.Update(self._view(dst, i), None if base is None else self._view(base, i), **how)
                for i in self.dense
            }
        )

    def _inner_step(self, k: int) -> None:
        frame, params = self._frame(k), self._params(k)
        self.sweep.forward(frame, params)
        self.sweep.loss(frame, self.each_loss)
        if self.descent is not None:
            self._gradients(k, only_params=False)
            w, m = self._weights(k), self.momenta[k + 1]
            self.descent.descend(w, self.momenta[k], self.g, m)
            self.descent.step(self.rates[k], w, m, self._weights(k + 1))
            return
        steps = {
            i: self.types.Update(
                self._view(self._weights(k + 1), i), self._view(self._weights(k), i), self._lr(k, i), sign=-1
            )
            for i in self.dense
            if self.adapt[i]
        }
        self.sweep.backward(frame, params, Updates(steps), x_grad=self.x_s is not None)
        for rows, x, y, place in self._layers(frame):
            rows.step(x, y, self._lr(k, place))

    def _layers(self, frame: Frame) -> Iterator[tuple[Rows, Any, Any, int]]:
        """The layers whose weights stay factors, their buffers in a frame, and the place of the weight."""
        for n, rows in self.sweep.rows.items():
            node = self.plan.nodes[n]
            assert node.w is not None
            yield rows, frame.buffers[node.inputs[0]], frame.buffers[node.out], node.w

    def _gradients(self, k: int, only_params: bool = True) -> None:
        """g_k; only_params: anew, from the kept activations"""
        adapted = {i: u for i, u in self._updates(self.g).updates.items() if self.adapt[i]}
        how = {"only_params": only_params, "x_grad": self.x_s is not None}
        self.sweep.backward(self._frame(k), self._params(k), Updates(adapted), **how)

    def _adjoint_step(self, k: int) -> None:
        kind, frame, descent = self.kind, self._frame(k), self.descent
        assert self.v is not None
        assert self.v_next is not None
        second_order = not kind.first_order and (k > 0 or self.grads is not None or self.x_s is not None)
        if self.grad_lr is not None or (second_order and descent is not None and descent.clips):
            self._gradients(k)
        if self.grad_lr is not None:
            self._add_lr_grad(k)
        for rows, _, y, place in self._layers(frame):
            rows.step_back(y, self._lr(k, place))
        if descent is not None:
            descent.step_back(self.rates[k], self.v, self.n)
        if not second_order or not self.plan.moves[self.plan.output]:
            return
        if descent is None:
            params = self._params(k, self.v, lr=k)
            updates = self._updates(self.v_next, self.v, sign=-1)
        else:
            descent.along(self.g, self.n, self.u)
            params = self._params(k, self.u)
            updates = self._updates(self.v_next, self.v)
            if len(self.plan.used) < len(self.places):  # what nothing writes may have decayed
                self.v_next.copy_(self.v)
        self.sweep.rates = {n: self._lr(k, self.plan.nodes[n].w or 0) for n in self.sweep.rows}
        self.sweep.forward(frame, params, dual=True)
        self.sweep.loss(frame, None, dual=True)
        self.sweep.backward(frame, params, updates, dual=True, x_grad=self.x_s is not None)
        for rows, x, y, _ in self._layers(frame):
            rows.adjoint_rows(x, y)
        if self.x_s is not None:
            sign = -1 if descent is None else 1
            self.x_s.add_(frame.buffers[0].t_grad.view(self.x_s.shape), alpha=sign)
        self.v, self.v_next = self.v_next, self.v

    def _add_lr_grad(self, k: int) -> None:
        """dL/da_k = - v_{k+1} M_{k+1}, reduced to the shape of a_k; plain descent has M_{k+1} = g_k"""
        assert self.v is not None
        assert self.grad_lr is not None
        product = self.u
        torch.mul(self.g if self.descent is None else self.momenta[k + 1], self.v, out=product).neg_()
        to, S = self.grad_lr[:, k], self.lr.shape[1]
        if S == 1:
            torch.sum(product, 1, keepdim=True, out=to)
        elif len(self.places) == S:
            for i, place in enumerate(self.places):  # what nothing uses may decay by its step size
                column = to[:, i]
                if place is None:
                    column.zero_()
                else:
                    torch.sum(self._view(product, i).reshape(self.T, -1), 1, out=column)
        else:
            to.copy_(product)
        for rows, x, y, place in self._layers(self._frame(k)):
            if self.adapt[place]:
                rows.add_lr_grad(x, y, to[:, 0 if S == 1 else place])

    def _tail(self) -> None:
        if self.kind.tail != "weights":
            return self._query_tail(self.K)
        if self.out is not None:
            self.out.copy_(self._weights(self.K) if self.K else self.w0)
            # plain descent leaves what nothing uses; that may decay
            moved = self.adapt if self.descent is None else self.kind.problem.adapt
            for i, has_moved in enumerate(moved):
                if not has_moved:
                    self._view(self.out, i).copy_(self._view(self.w0, i))
        if self.seed is not None and self.v is not None and self.v_next is not None:
            self.v.copy_(self.seed)
            self.v_next.copy_(self.seed)

    def _query_tail(self, k: int) -> None:
        """Of the weights after k steps: the last on the way there (v_K), the others on the way back."""
        kind, frame = self.kind, self.query_frame
        weight = kind.step_weights[k - 1] if kind.step_weights else 1.0
        if weight == 0 and k < self.K:
            return
        assert frame is not None
        params = self._params(k)
        self.sweep.forward(frame, params)
        output = frame.buffers[self.plan.output]
        scale = self.scales[weight]
        if kind.tail == "output":
            if self.out is not None:
                self.out.copy_(output.value.view(self.out.shape))
            if self.seed is not None:
                output.grad.copy_(self.seed.view(output.grad.shape))
        else:
            self.sweep.loss(frame, self.each_loss)
            self.loss.add_(self.each_loss, alpha=weight * kind.scale)
        if kind.tail == "curvature":
            scale = torch.zeros_like(scale) if self.grad_loss is None else self.grad_loss
        if not self.adjoint and self.x_q is None:
            return
        updates = Updates({})
        if self.v is not None:
            updates = self._updates(self.v, self.v if k < self.K else None, scale=scale)
        x_grad = self.x_q is not None
        self.sweep.backward(frame, params, updates, x_grad=x_grad)
        for rows, x, y, _ in self._layers(frame):
            rows.query_rows(x, y, scale)
        if self.x_q is not None:
            self.x_q.addcmul_(frame.buffers[0].grad.view(self.x_q.shape), _rows(scale, self.x_q))
        if kind.tail != "curvature" or not self.plan.moves[self.plan.output]:
            return
        params = self._params(k, self.seed)
        self.sweep.forward(frame, params, dual=True)
        self.sweep.loss(frame, None, dual=True)
        if self.v is not None:
            updates = self._updates(self.v, self.v)
        self.sweep.backward(frame, params, updates, dual=True, x_grad=x_grad)
        if self.x_q is not None:
            self.x_q.add_(frame.buffers[0].t_grad.view(self.x_q.shape))


def _places(request: Request) -> tuple[list[Any], int]:
    """(shape, stride, offset) of each parameter in the engine's vectors, None: factored; and their length"""
    problem, itemsize = request.problem, request.like.element_size()
    places: list[Any] = list(problem.strided[itemsize])
    if not request.factored:
        return places, problem.layout(itemsize)[1]
    unit, end = 64 // itemsize, 0
    for i, (shape, stride, _) in enumerate(places):
        places[i] = None if i in request.factored else (shape, stride, end)
        end += 0 if i in request.factored else -(-prod(shape) // unit) * unit
    return places, max(end, unit)


def _like(examples: Examples | None) -> Examples | None:
    return None if examples is None else Examples(torch.zeros_like(examples.x), *map(_zeros, examples[1:]))


def _zeros(a: Tensor | None) -> Tensor | None:
    return None if a is None else torch.zeros_like(a)


def _rows(scale: Tensor, like: Tensor) -> Tensor:
    return scale.view(-1, *[1] * (like.dim() - 1))
