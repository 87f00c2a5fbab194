"""A linear layer whose fast weights stay factors, for all tasks at once: docs/factored.md, batched.

    W_k = theta + d^T x      the rows (x, d) = (X_j, -a_j D_j) of the steps j < k
    v_k = d_v^T x_v          (X_q, D_q) of the query set, (X_j, -t_D_j) and (t_X_j, -D_j) of the steps j >= k

X_j [T, N, I] are the layer's inputs in step j, D_j [T, N, O] the gradients of its outputs, t_ their tangents:

    x W_k^T = x theta^T + (x x_j^T) d_j      d W_k = d theta + (d d_j^T) x_j      and alike with a_k v

where the product with theta is one of the rows of all tasks. A layer that reads x itself has X_j = X in every
step: its rows are added up in the place of those of one step, and x theta^T is computed once.
"""

from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .request import Examples
from .sweep import Node


class _Stack:
    """Rows (x, d) of every task, and how many of them there are now."""

    def __init__(self, like: Tensor, T: int, most: int, I: int, O: int) -> None:
        self.x, self.d = like.new_zeros(T, most, I), like.new_zeros(T, most, O)
        self.count = 0

    def grow(self, rows: int) -> tuple[Tensor, Tensor]:
        """Where these rows more go."""
        new = slice(self.count, self.count + rows)
        self.count = new.stop
        return self.x[:, new], self.d[:, new]


class Rows:
    """passes: as of the sweep; query_sets: query losses; second_order: do the steps add to v?;
    x_fixed: the layer reads x, whose gradient is not wanted"""

    def __init__(
        self,
        passes: ModuleType | SimpleNamespace,
        node: Node,
        sizes: tuple[tuple[int, int], ...],
        support: Examples | None,
        query: Examples,
        steps: int,
        query_sets: int,
        second_order: bool,
        adapts: bool,
        x_fixed: bool,
        precision: str,
    ) -> None:
        self.passes, self.types, self.fixed, self.adapts = passes, passes.types, x_fixed, adapts
        self.precision = {"precision": precision}
        (R, self.I), (_, self.O) = sizes[node.inputs[0]], sizes[node.out]
        like, T = query.x, query.x.shape[0]
        self.N, self.Q = (0 if support is None else support.x.shape[1] * R), query.x.shape[1] * R
        self.support, self.query = support, query
        self.theta = like.new_zeros(self.O, self.I)
        steps_kept = min(steps, 1) if x_fixed else steps
        self.past = _Stack(like, T, steps_kept * self.N, self.I, self.O)
        sets = 1 if x_fixed else steps * (1 + node.moves_in[0]) if second_order else 0
        later = sets * self.N
        self.later = _Stack(like, T, (1 if x_fixed else query_sets) * self.Q + later, self.I, self.O)
        most = max(self.past.x.shape[1], self.later.x.shape[1], 1)
        self.scratch = like.new_zeros(2, T * max(self.N, self.Q) * most)
        self.along = like.new_zeros(T)
        if x_fixed:
            self.base_s, self.base_q = (like.new_zeros(T, n, self.O) for n in (self.N, self.Q))

    def begin(self) -> None:
        """Before the first step of a call."""
        self.past.count = self.later.count = 0
        if not self.fixed:
            return
        assert self.support is not None
        T = len(self.query.x)
        x_s, x_q = self.support.x.view(T, self.N, self.I), self.query.x.view(T, self.Q, self.I)
        self._times(self.theta.t(), x_s, self.base_s)
        self._times(self.theta.t(), x_q, self.base_q)
        for stack in (self.past, self.later):
            stack.d.zero_()
        self.past.x.copy_(x_s)
        self.later.x[:, : self.Q].copy_(x_q)
        self.later.x[:, self.Q :].copy_(x_s)
        self.past.count, self.later.count = self.N, self.Q + self.N

    def forward(self, x: Any, b: Any, y: Any, lr: Tensor | None, *, on_query: bool, dual: bool) -> None:
        """y, or its tangent; lr: that of the step, by which v is scaled"""
        out = y.t_value if dual else y.value
        if dual:
            if x.t_value is None:
                out.zero_()
            else:
                self._times(self.theta.t(), x.t_value, out)
                self._add(out, x.t_value, self.past.x, self.past.d, self.past.count)
            if self.adapts:
                self._add(out, x.value, self.later.x, self.later.d, self.later.count, lr)
            if b is not None and b.tangent is not None:
                tangent = b.tangent
                out.add_(tangent.unsqueeze(1)) if b.lr is None else out.addcmul_(tangent.unsqueeze(1), b.lr)
            return
        if self.fixed:
            out.copy_(self.base_q if on_query else self.base_s)
        else:
            self._times(self.theta.t(), x.value, out)
        self._add(out, x.value, self.past.x, self.past.d, self.past.count)
        if b is not None:
            out.add_(b.value.unsqueeze(1))

    def backward(self, x: Any, y: Any, lr: Tensor | None, *, add: bool, dual: bool) -> None:
        """The gradient by x from that by y, or its tangent."""
        out, d = (x.t_grad, y.t_grad) if dual else (x.grad, y.grad)
        self._times(self.theta, d, out, add)
        self._add(out, d, self.past.d, self.past.x, self.past.count)
        if dual and self.adapts:
            self._add(out, y.grad, self.later.d, self.later.x, self.later.count, lr)

    def step(self, x: Any, y: Any, lr: Tensor) -> None:
        """What a step leaves: W_{k+1} = W_k - a_k D_k^T X_k"""
        if not self.adapts:
            return
        if self.fixed:
            self._put(y.grad, self.past.d, self.past.d, lr=lr, sign=-1)
        else:
            self._append(self.past, x.value, y.grad, lr=lr, sign=-1)

    def step_back(self, y: Any, lr: Tensor) -> None:
        """From W_{k+1} to W_k"""
        if not self.adapts:
            return
        if self.fixed:
            self._put(y.grad, self.past.d, self.past.d, lr=lr)
        else:
            self.past.count -= self.N

    def query_rows(self, x: Any, y: Any, scale: Tensor) -> None:
        """v += scale D_q^T X_q"""
        if self.fixed:
            to = self.later.d[:, : self.Q]
            self._put(y.grad, to, to, scale=scale)
        else:
            self._append(self.later, x.value, y.grad, scale=scale)

    def adjoint_rows(self, x: Any, y: Any) -> None:
        """v -= t_D_k^T X_k + D_k^T t_X_k"""
        if self.fixed:
            to = self.later.d[:, self.Q :]
            self._put(y.t_grad, to, to, sign=-1)
            return
        self._append(self.later, x.value, y.t_grad, sign=-1)
        if x.t_value is not None:
            self._append(self.later, x.t_value, y.grad, sign=-1)

    def _put(self, rows: Tensor, to: Tensor, base: Tensor | None = None, **how: Any) -> None:
        self.passes.rows_update(rows, self.types.Update(to, base, **how))

    def _append(self, stack: _Stack, x: Tensor, d: Tensor, **how: Any) -> None:
        to_x, to_d = stack.grow(x.shape[1])
        self._put(x, to_x)
        self._put(d, to_d, **how)

    def add_lr_grad(self, x: Any, y: Any, to: Tensor) -> None:
        """to [T] -= <v_{k+1}, D_k^T X_k>, by <D^T X, d^T x> = <D d^T, X x^T>"""
        grams = [
            self._gram(rows, left, self.later.count, number, precision="ieee").value  # terms may cancel
            for number, (rows, left) in enumerate(((y.grad, self.later.d), (x.value, self.later.x)))
        ]
        to.sub_(torch.sum(grams[0].mul_(grams[1]), (1, 2), out=self.along))

    def weight_grad(self, out: Tensor) -> None:
        """v_0, of every task [T, O, I] or summed over them [1, O, I]"""
        n = self.later.count
        d, x = self.later.d[:, :n], self.later.x[:, :n]
        if len(out) == 1:
            torch.mm(d.reshape(-1, self.O).t(), x.reshape(-1, self.I), out=out[0])
        else:
            torch.bmm(d.mT, x, out=out)

    def _times(self, theta: Tensor, rows: Tensor, out: Tensor, add: bool = False) -> None:
        """The rows of all tasks with one matrix."""
        a, y = rows.reshape(-1, rows.shape[2]), out.view(-1, out.shape[2])
        if add:
            y.addmm_(a, theta)
        else:
            torch.mm(a, theta, out=y)

    def _add(
        self, out: Tensor, rows: Tensor, left: Tensor, right: Tensor, count: int, lr: Tensor | None = None
    ) -> None:
        """out += (rows left^T) right, of each task, times the number lr"""
        if count == 0:
            return
        y = self._gram(rows, left, count, 0, lr, **self.precision)
        x, w = self.types.Buffer(out, out), self.types.Param(right[:, :count])
        self.passes.linear_backward_input(x, w, y, None, add=True, dual=False, **self.precision)

    def _gram(
        self, rows: Tensor, left: Tensor, count: int, number: int, lr: Tensor | None = None, **precision: str
    ) -> Any:
        """rows left^T [T, M, count], times the number lr, in that scratch"""
        T, M, _ = rows.shape
        gram = self.scratch[number, : T * M * count].view(T, M, count)
        Buffer, Param = self.types.Buffer, self.types.Param
        w = Param(left[:, :count]) if lr is None else Param(left[:, :count], left[:, :count], lr)
        y = Buffer(gram, gram, gram)
        self.passes.linear_forward(Buffer(rows), w, None, y, None, dual=lr is not None, **precision)
        return y
