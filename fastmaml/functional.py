"""The public functions: fast weights, their losses and meta-gradients, all tasks at once on a backend.

    params   dict name -> tensor, as from dict(model.named_parameters()); [*shape], or [T, *shape] per task
    x, y     [T, N, ...]: T tasks, N examples each; y may be (target, weight) with a weight [T, N] per example
    loss     "mse", "cross_entropy", a fastmaml.losses object, or a callable (output, target) -> scalar; those
             of torch that mean the same run on the same kernels
    lr       float, 0-d tensor, or dict name -> tensor broadcastable to that parameter; or a list (or
             nn.ParameterList) of `steps`
    precision  what float32 operands of products may be rounded to on a GPU, by the backends cuda and triton:
             "ieee" (nothing), "tf32" or "bf16"; sums are float32. None: as torch.set_float32_matmul_precision
             says. The cpu backend always computes in float32, the torch backend does as torch's setting says.

Differentiable once by ordinary autograd with respect to params, lr and x. `fastmaml.reference` has the same
functions in a form to read, differentiable any number of times.
"""

import operator
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from . import factors
from .arguments import (
    check_count,
    check_labels,
    check_loss,
    check_query_x,
    check_x,
    pair,
    parameters,
    signature,
    step_sizes,
    target,
    understood,
)
from .autograd import (
    Apply,
    FactoredInnerLoop,
    InnerLoop,
    MetaLoss,
    ValueAndGrad,
    flat_of,
    once,
    over_tasks,
    own_of,
    parameter_grads,
    run_meta,
    views_of,
)
from .backends import (
    BACKENDS,
    Problem,
    at,
    factored_weights,
    factored_weights_of,
    prepare,
    problem_for,
    torch_factored,
)
from .backends.cuda import Sizes
from .backends.precision import check_precision
from .forms import query_losses
from .losses import CrossEntropy, resolve
from .optimizers import counted_weights, update_rule

Params = Mapping[str, Tensor]


def apply(
    model: nn.Module,
    params: Params,
    x: Tensor,  # [T, N, *example]
    *,
    backend: str | None = None,
    chunk_tasks: int | None = None,
    precision: str | None = None,
) -> Tensor:
    """The model's output [T, N, *out], task t with its own parameters; some may be FactoredWeights."""
    problem, name, x, ws = _enter(
        model, params, x, None, backend, chunk_tasks, precision, may_be_factored=True
    )
    if factors.places(ws):
        return factors.apply(problem, ws, x, chunk_tasks)
    return Apply.apply((problem, (name, precision), chunk_tasks, _needs(params=ws, x=x)), x, *ws)


def value_and_grad(
    model, params, x, y, *, loss, backend=None, chunk_tasks=None, precision=None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Every task's loss [T] and its gradient {name: [T, *shape]}; the derivative of the latter is the HVP."""
    problem, name, x, ws = _enter(model, params, x, loss, backend, chunk_tasks, precision, ys=(y,))
    y = target(problem, y, x, "y")
    how = problem, (name, precision), chunk_tasks, _needs(params=ws, x=x)
    value, *grads = ValueAndGrad.apply(how, x, *y, *ws)
    return value, dict(zip(problem.names, grads, strict=True))


def hvp(model, params, v, x, y, *, loss, backend=None, chunk_tasks=None, precision=None) -> dict[str, Tensor]:
    """The Hessian of every task's loss times v {name: [*shape] or [T, *shape]}: {name: [T, *shape]}."""
    problem, name, x, ws = _enter(model, params, x, loss, backend, chunk_tasks, precision, ys=(y,))
    y = target(problem, y, x, "y")
    vs = parameters(problem, v, x, "v")
    needs = _needs(params=[*ws, *vs], x=x)

    def run(ws, x, t, w, v):
        return at(name, precision).value_and_grad_backward(
            problem, ws, x, (t, w), None, v, needs=frozenset({"params"}), per_task=True
        )

    with torch.no_grad():
        v = flat_of(problem, vs, x)
        product, _ = over_tasks(problem, chunk_tasks, run, ws, (x, *y, v), (False, False))
        products = views_of(problem, product, x.shape[0])
    return dict(zip(problem.names, once(products) if needs else products, strict=True))


def inner_loop(
    model, params, x, y, *, loss, lr, steps, first_order=False, optimizer=None,
    backend=None, chunk_tasks=None, checkpoint_every=None, fast_weights=None, precision=None,
) -> dict[str, Any]:  # fmt: skip
    """Fast weights {name: [T, *shape]}: W_{k+1} = W_k - lr_k g_k, `steps` times.

    optimizer: a fastmaml.SGD with momentum, weight decay or a largest norm of the gradient
    checkpoint_every: store every n-th W_k for the backward pass and compute the others again
    fast_weights: "factored", or a dict weight name -> form, returns FactoredWeights where asked, and does not
        form the weights; the torch backend makes them, and their derivative. Those in params stay so.
    """
    check_count("steps", steps, 0)
    check_count("checkpoint_every", checkpoint_every, 1)
    problem, name, x, ws = _enter(
        model, params, x, loss, backend, chunk_tasks, precision, may_be_factored=True, queries=1, ys=(y,)
    )
    y = target(problem, y, x, "y")
    rates, rule = step_sizes(problem, lr, steps, x), update_rule(optimizer)
    needs = _needs(params=ws, lr=rates, x=x)
    kept = factors.places(ws)
    if factored := factors.chosen(problem, ws, x, rates, rule, fast_weights):
        if needs and not first_order:
            factors.check_differentiable(problem, ws, x, y)
        how = problem, chunk_tasks, needs, first_order, rule, factored, kept
        found = FactoredInnerLoop.apply(how, rates, x, *y, *factors.parts_of(ws))
        fast = torch_factored.weights(
            BACKENDS["torch"], problem, ws, rates, rule=rule, factored=factored, found=found
        )
        return dict(zip(problem.names, fast, strict=True))
    how = problem, (name, precision), chunk_tasks, needs, steps, first_order, rule, checkpoint_every
    return dict(zip(problem.names, InnerLoop.apply(how, rates, x, *y, *ws), strict=True))


def meta_loss(
    model, params, support, query, *, loss, lr, steps, first_order=False, optimizer=None, step_weights=None,
    reduction="mean", backend=None, chunk_tasks=None, checkpoint_every=None, fast_weights=None,
    precision=None,
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
    problem, name, rates, data, ws, loop, factored = _enter_meta(
        model, params, support, query, loss, lr, steps, first_order, optimizer, step_weights,
        backend, chunk_tasks, checkpoint_every, fast_weights, precision,
    )  # fmt: skip
    needs = _needs(params=ws, lr=rates, x_s=data[0], x_q=data[3])
    how = problem, (name, precision), chunk_tasks, needs, loop, reduction, factored
    return MetaLoss.apply(how, rates, *data, *ws)


def meta_value_and_grad(
    model, params, support, query, *, loss, lr, steps, first_order=False, optimizer=None, step_weights=None,
    reduction="mean", backend=None, chunk_tasks=None, checkpoint_every=None, fast_weights=None,
    precision=None,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """The meta-loss, mean or sum over tasks, and the meta-gradient {name: as params}, without a graph.

    What `meta_loss(..).backward()` gives, for every parameter, frozen ones too, without the quarter of a
    millisecond that the graph costs. Neither result can be differentiated.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f'reduction must be "mean" or "sum", got {reduction!r}')
    with torch.no_grad():
        problem, name, rates, data, ws, loop, factored = _enter_meta(
            model, params, support, query, loss, lr, steps, first_order, optimizer, step_weights,
            backend, chunk_tasks, checkpoint_every, fast_weights, precision,
        )  # fmt: skip
        how = problem, (name, precision), chunk_tasks, _PARAMS, loop, reduction, factored
        value, grads, *_ = run_meta(how, rates, data, ws)
        own = own_of(problem, ws) if len(grads) == len(data[0]) else ()  # else they were summed
        views = parameter_grads(problem.strided[grads.element_size()], grads, own)
    return value, dict(zip(problem.names, views, strict=True))


_PARAMS = frozenset({"params"})


def _enter_meta(
    model, params, support, query, loss, lr, steps, first_order, optimizer, step_weights,
    backend, chunk_tasks, checkpoint_every, fast_weights, precision,
):  # fmt: skip
    """Problem, backend, step sizes [K, S], (x, target, weight) of both sets, parameters in order, what the
    loop does besides, and the places of the weights that stay factored."""
    check_count("steps", steps, 0)
    check_count("checkpoint_every", checkpoint_every, 1)
    check_count("chunk_tasks", chunk_tasks, 1)
    weights = counted_weights(step_weights, steps)
    loop = steps, bool(first_order), update_rule(optimizer), weights, checkpoint_every
    (x_s, y_s), (x_q, y_q) = pair("support", support), pair("query", query)
    seen = how = None
    if not torch.compiler.is_compiling():
        seen = signature(params, x_s, y_s, x_q, y_q)
        told = tuple(fast_weights.items()) if isinstance(fast_weights, Mapping) else fast_weights
        how = loop, backend or os.environ.get("FASTMAML_BACKEND"), told, precision
    if seen and (known := _known_call(model, loss, lr, x_s, y_s, x_q, y_q, seen, how)):
        problem, rates, (name, factored) = known
        return problem, name, rates, (x_s, y_s, None, x_q, y_q, None), list(params.values()), loop, factored
    problem, name, x_s, ws = _enter(
        model,
        params,
        x_s,
        loss,
        backend,
        chunk_tasks,
        precision,
        "support x",
        queries=_examples(x_q),
        ys=(y_s, y_q),
    )
    x_q = check_query_x(x_q, x_s)
    _check_norms(problem, x_q)
    data = x_s, *target(problem, y_s, x_s, "support y"), x_q, *target(problem, y_q, x_q, "query y")
    rates = step_sizes(problem, lr, steps, x_s)
    factored = _factored(model, problem, name, loss, rates, x_s, x_q, ws, loop, fast_weights)
    if seen and tuple(params) == problem.names:
        _remember_call(problem, seen, (rates.shape, how), (name, factored))
    return problem, name, rates, data, ws, loop, factored


def _known_call(model, loss, lr, x_s, y_s, x_q, y_q, seen, how) -> tuple[Problem, Tensor, Any] | None:
    """Problem, lr, and what `_remember_call` was given for a call like this. Its checks need not run again:
    one by one they take as long as a small network's inner loop."""
    check_loss(loss)
    meant = resolve(understood(loss, model, x_s, y_s, y_q))
    problem = problem_for(model, tuple(x_s.shape[2:]), meant, (x_s.shape[1], _examples(x_q)))
    its_seen, calls = problem.memo.get("calls", (None, None))  # in one, for the sake of other threads
    if its_seen != seen:
        return None
    rates = step_sizes(problem, lr, how[0][0], x_s)
    try:
        known = calls.get((rates.shape, how))
    except TypeError:  # the checks say what is wrong
        return None
    if known is None:
        return None
    if problem.program and isinstance(problem.loss, CrossEntropy):
        classes = problem.program.buffers[problem.program.output][-1]
        check_labels("support y", y_s, classes)
        check_labels("query y", y_q, classes)
    return problem, rates, known


def _remember_call(problem: Problem, seen, key, call) -> None:
    its_seen, calls = problem.memo.get("calls", (None, {}))
    if its_seen != seen or len(calls) >= 64:  # a schedule of momenta must not fill the memory
        calls = {}
        problem.memo["calls"] = seen, calls
    with suppress(TypeError):
        calls[key] = call


def _factored(model, problem, name, loss, rates, x_s, x_q, ws, loop, fast_weights) -> tuple[int, ...]:
    own = tuple([p.dim() > len(s) for p, s in zip(ws, problem.shapes, strict=True)])
    sizes = x_s.shape[0], x_s.shape[1], x_q.shape[1], rates.shape[0], query_losses(loop[3]), bool(loop[2])
    S = rates.shape[1]
    if torch.compiler.is_compiling():  # for each of the sizes anew
        sizes = tuple([operator.index(n) for n in sizes])
        return factored_weights_of(model, tuple(x_s.shape[2:]), loss, name, sizes, own, S, fast_weights)
    return factored_weights(problem, name, sizes, own, S, fast_weights)


def _enter(
    model: nn.Module,
    params: Params,
    x: Tensor,
    loss: Any,
    backend: str | None,
    chunk: int | None,
    precision: str | None,
    name: str = "x",
    *,
    may_be_factored: bool = False,
    queries: int = 0,  # query examples, where there are support examples, x
    ys: Sequence[Any] = (),
) -> tuple[Problem, str, Tensor, list[Any]]:
    """Problem, backend, and the checked x and parameters in order."""
    x = check_x(name, x)
    check_count("chunk_tasks", chunk, 1)
    check_precision(precision)
    check_loss(loss)
    loss = understood(loss, model, x, *ys)
    sizes = Sizes(x.shape[1], queries) if queries else Sizes(0, x.shape[1])
    known = None if torch.compiler.is_compiling() else sizes
    problem, runs = prepare(model, tuple(x.shape[2:]), loss, x.device, x.dtype, backend, known)
    _check_norms(problem, x)
    ws = parameters(problem, params, x)
    if not may_be_factored and (where := factors.places(ws)):
        names = [problem.names[i] for i in where]
        raise TypeError(
            f"apply and inner_loop take factored weights, this does not: give {names} as .dense()"
        )
    return problem, runs, x, ws


def _examples(x: Any) -> int:
    """Of each task, of an x that is not checked yet."""
    return x.shape[1] if isinstance(x, Tensor) and x.dim() > 1 else 1


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
