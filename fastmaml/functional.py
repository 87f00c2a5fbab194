"""The public functions: fast weights, their losses and meta-gradients, all tasks at once on a backend.

    params   dict name -> tensor, as from dict(model.named_parameters()); [*shape], or [T, *shape] per task
    x, y     [T, N, ...]: T tasks, N examples each; y may be (target, weight) with a weight [T, N] per example
    loss     "mse", "cross_entropy", a fastmaml.losses object, or a callable (output, target) -> scalar
    lr       float, 0-d tensor, or dict name -> tensor broadcastable to that parameter; or a list of `steps`

Differentiable once by ordinary autograd with respect to params, lr and x. `fastmaml.reference` has the same
functions in a form to read, differentiable any number of times.
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from . import factors
from .arguments import (
    check_count,
    check_labels,
    check_shape,
    check_x,
    loss_weights,
    parameters,
    signature,
    step_sizes,
    target,
    update_rule,
)
from .backends import BACKENDS, Problem, factored_weights, factored_weights_of, prepare
from .forms import FactoredWeight
from .losses import CrossEntropy

Params = Mapping[str, Tensor]


def apply(
    model: nn.Module,
    params: Params,
    x: Tensor,  # [T, N, *example]
    *,
    backend: str | None = None,
    chunk_tasks: int | None = None,
) -> Tensor:
    """The model's output [T, N, *out], task t with its own parameters; some may be FactoredWeights."""
    problem, name, x, ws = _enter(model, params, x, None, backend, chunk_tasks, may_be_factored=True)
    if factors.places(ws):
        return factors.apply(problem, ws, x, chunk_tasks)
    return _Apply.apply((problem, name, chunk_tasks, _needs(params=ws, x=x)), x, *ws)


def value_and_grad(
    model, params, x, y, *, loss, backend=None, chunk_tasks=None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Every task's loss [T] and its gradient {name: [T, *shape]}; the derivative of the latter is the HVP."""
    problem, name, x, ws = _enter(model, params, x, loss, backend, chunk_tasks)
    y = target(problem, y, x, "y")
    value, *grads = _ValueAndGrad.apply((problem, name, chunk_tasks, _needs(params=ws, x=x)), x, *y, *ws)
    return value, dict(zip(problem.names, grads, strict=True))


def hvp(model, params, v, x, y, *, loss, backend=None, chunk_tasks=None) -> dict[str, Tensor]:
    """The Hessian of every task's loss times v {name: [*shape] or [T, *shape]}: {name: [T, *shape]}."""
    problem, name, x, ws = _enter(model, params, x, loss, backend, chunk_tasks)
    y = target(problem, y, x, "y")
    vs = parameters(problem, v, x, "v")
    needs = _needs(params=[*ws, *vs], x=x)

    def run(ws, x, t, w, v):
        return BACKENDS[name].value_and_grad_backward(
            problem, ws, x, (t, w), None, v, needs=frozenset({"params"}), per_task=True
        )

    with torch.no_grad():
        v = _flat(problem, vs, x)
        product, _ = _over_tasks(problem, chunk_tasks, run, ws, (x, *y, v), (False, False))
        products = _views(problem, product, x.shape[0])
    return dict(zip(problem.names, _once(products) if needs else products, strict=True))


def inner_loop(
    model, params, x, y, *, loss, lr, steps, first_order=False, optimizer=None,
    backend=None, chunk_tasks=None, checkpoint_every=None, fast_weights=None,
) -> dict[str, Any]:  # fmt: skip
    """Fast weights {name: [T, *shape]}: W_{k+1} = W_k - lr_k g_k, `steps` times.

    optimizer: a fastmaml.SGD with momentum, weight decay or a largest norm of the gradient
    checkpoint_every: store every n-th W_k for the backward pass and compute the others again
    fast_weights: "factored", or a dict weight name -> form, returns FactoredWeights where asked, and does not
        form the weights; these have no derivative, and the torch backend makes them. Those in params stay so.
    """
    check_count("steps", steps, 0)
    check_count("checkpoint_every", checkpoint_every, 1)
    problem, name, x, ws = _enter(model, params, x, loss, backend, chunk_tasks, may_be_factored=True)
    y = target(problem, y, x, "y")
    rates, rule = step_sizes(problem, lr, steps, x), update_rule(optimizer)
    if fast_weights not in (None, "dense") or factors.places(ws):
        found = factors.inner_loop(problem, ws, x, y, rates, rule, chunk_tasks, fast_weights)
        needs = _needs(params=[w for w in ws if isinstance(w, Tensor)], lr=rates, x=x)
        return {n: _no_derivative(w) if needs else w for n, w in found.items()}
    needs = _needs(params=ws, lr=rates, x=x)
    how = problem, name, chunk_tasks, needs, steps, first_order, rule, checkpoint_every
    return dict(zip(problem.names, _InnerLoop.apply(how, rates, x, *y, *ws), strict=True))


def meta_loss(
    model, params, support, query, *, loss, lr, steps, first_order=False, optimizer=None, step_weights=None,
    reduction="mean", backend=None, chunk_tasks=None, checkpoint_every=None, fast_weights=None,
) -> Tensor:  # fmt: skip
    """The query loss of the weights adapted on the support set: mean or sum over tasks, or [T] for "none".

    The gradients are computed along with it, in memory that does not grow with the activations of the steps.

    optimizer: a fastmaml.SGD with momentum, weight decay or a largest norm of the gradient
    step_weights: of the query losses after steps 1, .., `steps`, which are added up (MAML++, Antoniou et al.
        2019, arXiv 1810.09502, section 4.1); None: the last one alone
    fast_weights: the form of the linear layers' fast weights, "dense" (a matrix for each task) or "factored"
        (the rows that make its updates, exact too); a dict weight name -> form; None takes the faster one
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'reduction must be "mean", "sum" or "none", got {reduction!r}')
    problem, name, rates, data, ws, factored = _enter_meta(
        model, params, support, query, loss, lr, steps, backend, chunk_tasks, checkpoint_every, fast_weights
    )
    needs = _needs(params=ws, lr=rates, x_s=data[0], x_q=data[3])
    loop = steps, first_order, update_rule(optimizer), loss_weights(step_weights, steps), checkpoint_every
    how = problem, name, chunk_tasks, needs, loop, reduction, factored
    return _MetaLoss.apply(how, rates, *data, *ws)


def meta_value_and_grad(
    model, params, support, query, *, loss, lr, steps, first_order=False, optimizer=None, step_weights=None,
    reduction="mean", backend=None, chunk_tasks=None, checkpoint_every=None, fast_weights=None,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """The meta-loss, mean or sum over tasks, and the meta-gradient {name: as params}, without a graph.

    What `meta_loss(..).backward()` gives, for every parameter, frozen ones too, without the quarter of a
    millisecond that the graph costs. Neither result can be differentiated.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f'reduction must be "mean" or "sum", got {reduction!r}')
    with torch.no_grad():
        problem, name, rates, data, ws, factored = _enter_meta(
            model,
            params,
            support,
            query,
            loss,
            lr,
            steps,
            backend,
            chunk_tasks,
            checkpoint_every,
            fast_weights,
        )
        loop = steps, first_order, update_rule(optimizer), loss_weights(step_weights, steps), checkpoint_every
        how = problem, name, chunk_tasks, _PARAMS, loop, reduction, factored
        value, grads, *_ = _run_meta(how, rates, data, ws)
        views = _parameter_grads(problem.strided[grads.element_size()], grads, ws)
    return value, dict(zip(problem.names, views, strict=True))


_PARAMS = frozenset({"params"})


def _enter_meta(
    model, params, support, query, loss, lr, steps, backend, chunk_tasks, checkpoint_every, fast_weights
):
    """Problem, backend, step sizes [K, S], (x, target, weight) of both sets, parameters in order, and the
    places of the weights that stay factored."""
    check_count("steps", steps, 0)
    check_count("checkpoint_every", checkpoint_every, 1)
    (x_s, y_s), (x_q, y_q) = support, query
    seen = None if torch.compiler.is_compiling() else signature(params, x_s, y_s, x_q, y_q)
    if seen:
        check_count("chunk_tasks", chunk_tasks, 1)
        problem, name = prepare(model, tuple(x_s.shape[2:]), loss, x_s.device, x_s.dtype, backend)
        if problem.memo.get("seen") == seen:
            if problem.program and isinstance(problem.loss, CrossEntropy):
                classes = problem.program.buffers[problem.program.output][-1]
                check_labels("support y", y_s, classes)
                check_labels("query y", y_q, classes)
            rates, ws = step_sizes(problem, lr, steps, x_s), list(params.values())
            known = problem.memo["forms"]  # with fast_weights=None, by the shape of lr
            factored = known.get(rates.shape) if fast_weights is None else None
            if factored is None:
                factored = _factored(model, problem, loss, rates, x_s, x_q, ws, fast_weights)
                if fast_weights is None:
                    known[rates.shape] = factored
            return problem, name, rates, (x_s, y_s, None, x_q, y_q, None), ws, factored
    problem, name, x_s, ws = _enter(model, params, x_s, loss, backend, chunk_tasks, "support x")
    x_q = check_x("query x", x_q)
    check_shape("query x", x_q, (x_s.shape[0], x_q.shape[1], *x_s.shape[2:]))
    if x_q.dtype is not x_s.dtype or x_q.device != x_s.device:
        raise TypeError(
            f"query x must be {x_s.dtype} on {x_s.device}, as support x, got {x_q.dtype} on {x_q.device}"
        )
    _check_norms(problem, x_q)
    data = x_s, *target(problem, y_s, x_s, "support y"), x_q, *target(problem, y_q, x_q, "query y")
    if seen and tuple(params) == problem.names:
        problem.memo["seen"], problem.memo["forms"] = seen, {}
    rates = step_sizes(problem, lr, steps, x_s)
    factored = _factored(model, problem, loss, rates, x_s, x_q, ws, fast_weights)
    return problem, name, rates, data, ws, factored


def _factored(model, problem, loss, rates, x_s, x_q, ws, fast_weights) -> tuple[int, ...]:
    own = tuple([p.dim() > len(s) for p, s in zip(ws, problem.shapes, strict=True)])
    sizes = x_s.shape[0], x_s.shape[1], x_q.shape[1], rates.shape[0]
    how = sizes, own, rates.shape[1], fast_weights
    if torch.compiler.is_compiling():
        return factored_weights_of(model, tuple(x_s.shape[2:]), loss, *how)
    return factored_weights(problem, *how)


def _enter(
    model: nn.Module,
    params: Params,
    x: Tensor,
    loss: Any,
    backend: str | None,
    chunk: int | None,
    name: str = "x",
    *,
    may_be_factored: bool = False,
) -> tuple[Problem, str, Tensor, list[Any]]:
    """Problem, backend, and the checked x and parameters in order."""
    x = check_x(name, x)
    check_count("chunk_tasks", chunk, 1)
    problem, runs = prepare(model, tuple(x.shape[2:]), loss, x.device, x.dtype, backend)
    _check_norms(problem, x)
    ws = parameters(problem, params, x)
    if not may_be_factored and (where := factors.places(ws)):
        names = [problem.names[i] for i in where]
        raise TypeError(
            f"apply and inner_loop take factored weights, this does not: give {names} as .dense()"
        )
    return problem, runs, x, ws


def _check_norms(problem: Problem, x: Tensor) -> None:
    if x.shape[1] == 1 and problem.program and any(op.name == "batch_norm" for op in problem.program.ops):
        raise ValueError("BatchNorm needs more than 1 value per channel: give every task at least 2 examples")


def _needs(**inputs: Tensor | Sequence[Tensor]) -> frozenset[str]:
    """The inputs that want a gradient."""
    if not torch.is_grad_enabled():
        return frozenset()
    return frozenset([n for n, a in inputs.items() if _wants(a)])


def _wants(a: Tensor | Sequence[Tensor]) -> bool:
    return a.requires_grad if isinstance(a, Tensor) else any(p.requires_grad for p in a)


class _Apply(Function):
    @staticmethod
    def forward(ctx, how, x, *ws):
        problem, name, chunk, _ = ctx.how = how
        ctx.save_for_backward(x, *ws)
        run = lambda ws, x: (BACKENDS[name].apply(problem, ws, x),)  # noqa: E731
        return _over_tasks(problem, chunk, run, ws, (x,), (False,))[0]

    @staticmethod
    def backward(ctx, grad_out):
        problem, name, chunk, needs = ctx.how
        x, *ws = ctx.saved_tensors

        def run(ws, x, d):
            return BACKENDS[name].apply_backward(problem, ws, x, d, needs=needs)

        summed = (not _any_own(problem, ws), False)
        with torch.no_grad():
            grads, grad_x = _over_tasks(problem, chunk, run, ws, (x, grad_out.contiguous()), summed)
            out = grad_x, *_parameter_grads(problem.strided[x.element_size()], grads, ws)
        return None, *_once(out)


class _ValueAndGrad(Function):
    @staticmethod
    def forward(ctx, how, x, t, w, *ws):
        problem, name, chunk, _ = ctx.how = how
        ctx.save_for_backward(x, t, w, *ws)
        ctx.set_materialize_grads(False)
        run = lambda ws, x, t, w: BACKENDS[name].value_and_grad(problem, ws, x, (t, w))  # noqa: E731
        value, grads = _over_tasks(problem, chunk, run, ws, (x, t, w), (False, False))
        return value, *_views(problem, grads, x.shape[0])

    @staticmethod
    def backward(ctx, grad_value, *vs):
        problem, name, chunk, needs = ctx.how
        x, t, w, *ws = ctx.saved_tensors

        def run(ws, x, t, w, d, v):
            return BACKENDS[name].value_and_grad_backward(problem, ws, x, (t, w), d, v, needs=needs)

        summed = (not _any_own(problem, ws), False)
        with torch.no_grad():
            v = _flat(problem, vs, x)
            d = None if grad_value is None else grad_value.contiguous()
            grads, grad_x = _over_tasks(problem, chunk, run, ws, (x, t, w, d, v), summed)
            out = grad_x, None, None, *_parameter_grads(problem.strided[x.element_size()], grads, ws)
        return None, *_once(out)


class _InnerLoop(Function):
    @staticmethod
    def forward(ctx, how, lr, x, t, w, *ws):
        problem, name, chunk, _, steps, _, rule, _ = ctx.how = how
        ctx.save_for_backward(lr, x, t, w, *ws)
        ctx.set_materialize_grads(False)
        run = lambda ws, x, t, w: (BACKENDS[name].inner_loop(problem, ws, lr, x, (t, w), steps=steps, rule=rule),)  # noqa: E731
        (fast,) = _over_tasks(problem, chunk, run, ws, (x, t, w), (False,))
        return tuple(_views(problem, fast, x.shape[0]))

    @staticmethod
    def backward(ctx, *vs):
        problem, name, chunk, needs, steps, first_order, rule, every = ctx.how
        lr, x, t, w, *ws = ctx.saved_tensors

        def run(ws, x, t, w, v):
            return BACKENDS[name].inner_loop_backward(
                problem, ws, lr, x, (t, w), v,
                steps=steps, first_order=first_order, rule=rule, checkpoint_every=every, needs=needs,
            )  # fmt: skip

        summed = (not _any_own(problem, ws), True, False)
        with torch.no_grad():
            v = _flat(problem, vs, x)
            grads, grad_lr, grad_x = _over_tasks(problem, chunk, run, ws, (x, t, w, v), summed)
            grad_lr = None if grad_lr is None else grad_lr[0]
            out = grad_lr, grad_x, None, None, *_parameter_grads(problem.strided[x.element_size()], grads, ws)
        return None, *_once(out)


def _run_meta(how, lr, data, ws) -> Sequence[Any]:
    """The loss, [T] or reduced, and the gradients that are needed: params [1 or T, P], lr, x of both sets."""
    problem, name, chunk, needs, (steps, first_order, rule, step_weights, every), reduction, factored = how
    per_task = reduction == "none"
    scale = 1 / data[0].shape[0] if reduction == "mean" else 1.0

    def run(ws, x_s, t_s, w_s, x_q, t_q, w_q):
        return BACKENDS[name].meta_loss(
            problem, ws, lr, (x_s, (t_s, w_s)), (x_q, (t_q, w_q)),
            steps=steps, first_order=first_order, rule=rule, step_weights=step_weights, checkpoint_every=every,
            per_task=per_task, scale=scale, needs=needs, factored=factored,
        )  # fmt: skip

    summed = (not per_task, not per_task and not _any_own(problem, ws), not per_task, False, False)
    return _over_tasks(problem, chunk, run, ws, data, summed)


class _MetaLoss(Function):
    @staticmethod
    def forward(ctx, how, lr, x_s, t_s, w_s, x_q, t_q, w_q, *ws):
        problem = how[0]
        value, *grads = _run_meta(how, lr, (x_s, t_s, w_s, x_q, t_q, w_q), ws)
        # the gradients are all that backward reads: nothing else stays in memory
        ctx.save_for_backward(*grads)
        ctx.own = [p.dim() > len(s) for p, s in zip(ws, problem.shapes, strict=True)]
        ctx.where = problem.strided[x_s.element_size()]
        return value

    @staticmethod
    def backward(ctx, grad_out):
        grads, grad_lr, grad_s, grad_q = (_scaled(g, grad_out) for g in ctx.saved_tensors)
        grad_lr = None if grad_lr is None else grad_lr.sum(0)
        params = _parameter_grads(ctx.where, grads, ctx.own)
        return None, *_once((grad_lr, grad_s, None, None, grad_q, None, None, *params))


def _scaled(g: Tensor | None, scale: Tensor) -> Tensor | None:
    if g is None:
        return None
    return g * (scale.view(-1, *[1] * (g.dim() - 1)) if scale.dim() else scale)


def _over_tasks(
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


def _any_own(problem: Problem, ws: Sequence[Tensor]) -> bool:
    return any(p.dim() > len(s) for p, s in zip(ws, problem.shapes, strict=True))


def _views(problem: Problem, flat: Tensor, T: int) -> list[Tensor]:
    """[T, P] -> [T, *shape] per parameter, without copies."""
    P = flat.shape[1]
    where = problem.strided[flat.element_size()]
    return [flat.as_strided((T, *shape), (P, *stride), at) for shape, stride, at in where]


def _flat(problem: Problem, vs: Sequence[Tensor | None], x: Tensor) -> Tensor:
    """[T, *shape] or [*shape] or None (zero) per parameter -> [T, P]"""
    flat = x.new_zeros(x.shape[0], problem.layouts[x.element_size()][1])
    for view, v in zip(_views(problem, flat, x.shape[0]), vs, strict=True):
        if v is not None:
            view.copy_(v)
    return flat


def _parameter_grads(where: Sequence[Any], flat: Tensor | None, ws: Sequence[Any]) -> list[Any]:
    """[1 or T, P] -> each parameter's gradient: [T, *shape] where it has one per task, else summed.

    where: Problem.strided; ws: the parameters, or of each whether it has one per task
    """
    if flat is None:
        return [None] * len(ws)
    rows, P = flat.shape
    own = [w if isinstance(w, bool) else w.dim() > len(s) for w, (s, _, _) in zip(ws, where, strict=True)]
    if rows == 1 and True not in own:
        return [flat.as_strided(shape, stride, at) for shape, stride, at in where]
    views = [flat.as_strided((rows, *shape), (P, *stride), at) for shape, stride, at in where]
    return [v if mine else v.sum(0) for v, mine in zip(views, own, strict=True)]


_HIGHER = (
    "fastmaml.functional has no derivative of this order; "
    "fastmaml.reference is differentiable any number of times"
)
_OF_FACTORS = "factors have no derivative: call meta_loss, or inner_loop with fast_weights='dense'"


def _once(tensors: Sequence[Any], why: str = _HIGHER) -> Sequence[Any]:
    """The tensors, which under create_graph=True say what to do when they are differentiated again."""
    if not torch.is_grad_enabled():
        return tensors
    return _NoDerivative.apply(why, torch.zeros((), requires_grad=True), *tensors)


def _no_derivative(w: Tensor | FactoredWeight) -> Tensor | FactoredWeight:
    if isinstance(w, FactoredWeight):
        return FactoredWeight(w.theta, *_once((w.d, w.x), _OF_FACTORS))
    return _once((w,), _OF_FACTORS)[0]


class _NoDerivative(Function):
    @staticmethod
    def forward(ctx, why, anchor, *tensors):
        ctx.why = why
        return tuple(None if a is None else a.clone() for a in tensors)

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(ctx.why)
