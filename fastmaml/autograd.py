"""The public functions as autograd sees them: one torch.autograd.Function each, differentiable once.

They take what fastmaml.functional has checked, and run it in chunks of tasks: `runs` is the name of a backend
and the precision wanted.
"""

import operator
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from . import factors
from .backends import BACKENDS, Problem, at, keeps_factors, torch_factored


class Apply(Function):
    @staticmethod
    def forward(ctx, how, x, *ws):
        problem, runs, chunk, _ = ctx.how = how
        ctx.model = problem.model  # a Problem does not keep it alive
        ctx.save_for_backward(x, *ws)
        run = lambda ws, x: (at(*runs).apply(problem, ws, x),)  # noqa: E731
        return over_tasks(problem, chunk, run, ws, (x,), (False,))[0]

    @staticmethod
    def backward(ctx, grad_out):
        problem, runs, chunk, needs = ctx.how
        x, *ws = ctx.saved_tensors

        def run(ws, x, d):
            return at(*runs).apply_backward(problem, ws, x, d, needs=needs)

        summed = (not any_own(problem, ws), False)
        with torch.no_grad():
            grads, grad_x = over_tasks(problem, chunk, run, ws, (x, grad_out.contiguous()), summed)
            out = grad_x, *by_parameter(problem, grads, ws, x)
        return None, *once(out)


class ValueAndGrad(Function):
    @staticmethod
    def forward(ctx, how, x, t, w, *ws):
        problem, runs, chunk, _ = ctx.how = how
        ctx.model = problem.model
        ctx.save_for_backward(x, t, w, *ws)
        ctx.set_materialize_grads(False)
        run = lambda ws, x, t, w: at(*runs).value_and_grad(problem, ws, x, (t, w))  # noqa: E731
        value, grads = over_tasks(problem, chunk, run, ws, (x, t, w), (False, False))
        return value, *views_of(problem, grads, x.shape[0])

    @staticmethod
    def backward(ctx, grad_value, *vs):
        problem, runs, chunk, needs = ctx.how
        x, t, w, *ws = ctx.saved_tensors

        def run(ws, x, t, w, d, v):
            return at(*runs).value_and_grad_backward(problem, ws, x, (t, w), d, v, needs=needs)

        summed = (not any_own(problem, ws), False)
        with torch.no_grad():
            v = flat_of(problem, vs, x)
            d = None if grad_value is None else grad_value.contiguous()
            grads, grad_x = over_tasks(problem, chunk, run, ws, (x, t, w, d, v), summed)
            out = grad_x, None, None, *by_parameter(problem, grads, ws, x)
        return None, *once(out)


class InnerLoop(Function):
    @staticmethod
    def forward(ctx, how, lr, x, t, w, *ws):
        problem, runs, chunk, _, steps, _, rule, _ = ctx.how = how
        ctx.model = problem.model
        ctx.save_for_backward(lr, x, t, w, *ws)
        ctx.set_materialize_grads(False)

        def run(ws, x, t, w):
            return (at(*runs).inner_loop(problem, ws, lr, x, (t, w), steps=steps, rule=rule),)

        (fast,) = over_tasks(problem, chunk, run, ws, (x, t, w), (False,))
        return tuple(views_of(problem, fast, x.shape[0]))

    @staticmethod
    def backward(ctx, *vs):
        problem, runs, chunk, needs, steps, first_order, rule, every = ctx.how
        lr, x, t, w, *ws = ctx.saved_tensors

        def run(ws, x, t, w, v):
            return at(*runs).inner_loop_backward(
                problem, ws, lr, x, (t, w), v,
                steps=steps, first_order=first_order, rule=rule, checkpoint_every=every, needs=needs,
            )  # fmt: skip

        summed = (not any_own(problem, ws), True, False)
        with torch.no_grad():
            v = flat_of(problem, vs, x)
            grads, grad_lr, grad_x = over_tasks(problem, chunk, run, ws, (x, t, w, v), summed)
            grad_lr = None if grad_lr is None else grad_lr[0]
            out = grad_lr, grad_x, None, None, *by_parameter(problem, grads, ws, x)
        return None, *once(out)


class FactoredInnerLoop(Function):
    """What torch_factored.inner_loop gives, of which torch_factored.weights makes the fast weights."""

    @staticmethod
    def forward(ctx, how, lr, x, t, w, *parts):
        problem, chunk, _, _, rule, factored, kept = ctx.how = how
        ctx.model = problem.model
        ctx.save_for_backward(lr, x, t, w, *parts)
        ctx.set_materialize_grads(False)

        def run(ws, x, t, w):
            return torch_factored.inner_loop(
                BACKENDS["torch"], problem, ws, lr, x, (t, w), steps=len(lr), rule=rule, factored=factored
            )

        ws = factors.whole(parts, kept, len(problem.names))
        count = len(ws) + len(factored) + torch_factored.clips(rule, len(lr))
        return tuple(over_tasks(problem, chunk, run, ws, (x, t, w), [False] * count))

    @staticmethod
    def backward(ctx, *outer):
        problem, chunk, needs, first_order, rule, factored, kept = ctx.how
        lr, x, t, w, *parts = ctx.saved_tensors

        def run(ws, x, t, w, *outer):
            grads, grad_lr, grad_x = torch_factored.inner_loop_backward(
                BACKENDS["torch"], problem, ws, lr, x, (t, w), outer,
                steps=len(lr), first_order=first_order, rule=rule, factored=factored, needs=needs,
            )  # fmt: skip
            return *grads, grad_lr, grad_x

        ws = factors.whole(parts, kept, len(problem.names))
        summed = [*factors.shared(problem, ws), True, False]
        with torch.no_grad():
            *grads, grad_lr, grad_x = over_tasks(problem, chunk, run, ws, (x, t, w, *outer), summed)
        return None, *once((grad_lr, grad_x, None, None, *grads))


def run_meta(how, lr, data, ws) -> Sequence[Any]:
    """The loss, [T] or reduced, and the gradients that are needed: params [1 or T, P], lr, x of both sets."""
    problem, (name, precision), chunk, needs, loop, reduction, factored = how
    steps, first_order, rule, step_weights, every = loop
    backend = at(name if not factored or keeps_factors(name, bool(rule)) else "torch", precision)
    per_task = reduction == "none"
    scale = 1 / data[0].shape[0] if reduction == "mean" else 1.0

    def run(ws, x_s, t_s, w_s, x_q, t_q, w_q):
        return backend.meta_loss(
            problem, ws, lr, (x_s, (t_s, w_s)), (x_q, (t_q, w_q)),
            steps=steps, first_order=first_order, rule=rule, step_weights=step_weights,
            checkpoint_every=every, per_task=per_task, scale=scale, needs=needs, factored=factored,
        )  # fmt: skip

    summed = (
        (not per_task, not per_task and not any_own(problem, ws), not per_task, False, False) if chunk else ()
    )
    return over_tasks(problem, chunk, run, ws, data, summed)


class MetaLoss(Function):
    @staticmethod
    def forward(ctx, how, lr, x_s, t_s, w_s, x_q, t_q, w_q, *ws):
        problem = how[0]
        value, *grads = run_meta(how, lr, (x_s, t_s, w_s, x_q, t_q, w_q), ws)
        # the gradients are all that backward reads: nothing else stays in memory
        ctx.save_for_backward(*grads)
        ctx.own = own_of(problem, ws)
        ctx.where = problem.strided[x_s.element_size()]
        return value

    @staticmethod
    def backward(ctx, grad_out):
        grads, grad_lr, grad_s, grad_q = (_scaled(g, grad_out) for g in ctx.saved_tensors)
        grad_lr = None if grad_lr is None else grad_lr.sum(0)
        params = parameter_grads(ctx.where, grads, ctx.own)
        return None, *once((grad_lr, grad_s, None, None, grad_q, None, None, *params))


def _scaled(g: Tensor | None, scale: Tensor) -> Tensor | None:
    if g is None:
        return None
    return g * (scale.view(-1, *[1] * (g.dim() - 1)) if scale.dim() else scale)


def over_tasks(
    problem: Problem,
    chunk: int | None,
    run: Callable[..., Sequence[Tensor | None]],
    ws: Sequence[Tensor],
    data: Sequence[Tensor | None],  # [T, ..] each
    summed: Sequence[bool],
) -> Sequence[Any]:
    """run(ws, *data) on `chunk` tasks at a time; results are joined, or added up where `summed`."""
    assert data[0] is not None
    T = data[0].shape[0]
    if chunk is None or chunk >= T:
        return run(list(ws), *data)
    parts = []
    for start in range(0, T, chunk):
        some = slice(start, start + chunk)
        parts.append(
            run(factors.of_tasks(problem, ws, some), *[None if a is None else a[some] for a in data])
        )
    return [
        None if part[0] is None else reduce(operator.add, part) if add else torch.cat(part)
        for part, add in zip(zip(*parts, strict=True), summed, strict=True)
    ]


def own_of(problem: Problem, ws: Sequence[Tensor]) -> list[bool]:
    """Of each parameter, has it one per task?"""
    return [p.dim() > len(s) for p, s in zip(ws, problem.shapes, strict=True)]


def any_own(problem: Problem, ws: Sequence[Tensor]) -> bool:
    return True in own_of(problem, ws)


def views_of(problem: Problem, flat: Tensor, T: int) -> list[Tensor]:
    """[T, P] -> [T, *shape] per parameter, without copies."""
    P = flat.shape[1]
    where = problem.strided[flat.element_size()]
    return [flat.as_strided((T, *shape), (P, *stride), at) for shape, stride, at in where]


def flat_of(problem: Problem, vs: Sequence[Tensor | None], x: Tensor) -> Tensor:
    """[T, *shape] or [*shape] or None (zero) per parameter -> [T, P]"""
    flat = x.new_zeros(x.shape[0], problem.layouts[x.element_size()][1])
    for view, v in zip(views_of(problem, flat, x.shape[0]), vs, strict=True):
        if v is not None:
            view.copy_(v)
    return flat


def parameter_grads(where: Sequence[Any], flat: Tensor | None, own: Sequence[bool]) -> list[Any]:
    """[1 or T, P] -> each parameter's gradient: [T, *shape] where it has one per task, else summed.

    where: Problem.strided; own: own_of, or empty for none
    """
    if flat is None:
        return [None] * len(where)
    rows, P = flat.shape
    if rows == 1 and True not in own:
        return [flat.as_strided(shape, stride, at) for shape, stride, at in where]
    views = [flat.as_strided((rows, *shape), (P, *stride), at) for shape, stride, at in where]
    return [v if mine else v.sum(0) for v, mine in zip(views, own, strict=True)]


def by_parameter(problem: Problem, flat: Tensor | None, ws: Sequence[Tensor], x: Tensor) -> list[Any]:
    """parameter_grads for ws, on data like x."""
    return parameter_grads(problem.strided[x.element_size()], flat, own_of(problem, ws))


_HIGHER = (
    "fastmaml.functional has no derivative of this order; "
    "fastmaml.reference is differentiable any number of times"
)


def once(tensors: Sequence[Any]) -> Sequence[Any]:
    """The tensors, which under create_graph=True say what to do when they are differentiated again."""
    if not torch.is_grad_enabled():
        return tensors
    return _NoDerivative.apply(torch.zeros((), requires_grad=True), *tensors)


class _NoDerivative(Function):
    @staticmethod
    def forward(ctx, anchor, *tensors):
        return tuple(None if a is None else a.clone() for a in tensors)

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(_HIGHER)
