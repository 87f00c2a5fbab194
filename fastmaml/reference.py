"""What is correct: the public functions in torch.func, task after task, steps unrolled, ordinary autodiff.

Slow on purpose. Arguments are those of `fastmaml.functional`; backend, chunk_tasks, checkpoint_every,
fast_weights and precision change nothing here. Everything is differentiable any number of times.
"""

import math

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, grad_and_value
from torch.nn.modules.batchnorm import _NormBase

from fastmaml.losses import resolve
from fastmaml.optimizers import SGD, check_optimizer, check_step_weights


def apply(model, params, x, *, backend=None, chunk_tasks=None, precision=None):
    """The model's output [T, N, *out], task t with its own parameters."""
    return torch.stack([_call(model, p, x_t) for p, (x_t,) in _tasks(model, params, x)])


def value_and_grad(model, params, x, y, *, loss, backend=None, chunk_tasks=None, precision=None):
    """Every task's loss [T] and its gradient {name: [T, *shape]}."""
    results = [grad_and_value(_loss(model, loss, s))(p) for p, s in _tasks(model, params, x, y)]
    return torch.stack([value for _, value in results]), _stack([g for g, _ in results])


def hvp(model, params, v, x, y, *, loss, backend=None, chunk_tasks=None, precision=None):
    """H v = d<g, v>/dW, the Hessian of every task's loss times v: {name: [T, *shape]}."""
    products = []
    for (p, s), (v_t, _) in zip(_tasks(model, params, x, y), _tasks(model, v, x), strict=True):
        g = grad(_loss(model, loss, s))
        products.append(grad(lambda w, g=g, v_t=v_t: sum((a * v_t[n]).sum() for n, a in g(w).items()))(p))
    return _stack(products)


def inner_loop(
    model, params, x, y, *, loss, lr, steps, first_order=False, optimizer=None,
    backend=None, chunk_tasks=None, checkpoint_every=None, fast_weights=None, precision=None,
):  # fmt: skip
    """Fast weights {name: [T, *shape]} after `steps` steps of gradient descent on every task's loss."""
    how = loss, lr, steps, first_order, optimizer
    return _stack([_adapt(model, p, s, *how)[-1] for p, s in _tasks(model, params, x, y)])


def meta_loss(
    model, params, support, query, *, loss, lr, steps, first_order=False, optimizer=None, step_weights=None,
    reduction="mean", backend=None, chunk_tasks=None, checkpoint_every=None, fast_weights=None,
    precision=None,
):  # fmt: skip
    """The query loss of the weights adapted on the support set: mean or sum over tasks, or [T] for "none".

    step_weights: of the query losses after steps 1, .., `steps`, which are added up; None: the last one alone
    """
    check_step_weights(step_weights, steps)
    values = []
    for (p, s), (_, q) in zip(_tasks(model, params, *support), _tasks(model, params, *query), strict=True):
        w = _adapt(model, p, s, loss, lr, steps, first_order, optimizer)
        each, of_query = [1.0] if step_weights is None else step_weights, _loss(model, loss, q)
        values.append(sum(a * of_query(w_k) for a, w_k in zip(each, w[-len(each) :], strict=True)))
    value = torch.stack(values)
    return {"mean": value.mean, "sum": value.sum, "none": value.clone}[reduction]()


def meta_value_and_grad(
    model, params, support, query, *, loss, lr, steps, first_order=False, optimizer=None, step_weights=None,
    reduction="mean", backend=None, chunk_tasks=None, checkpoint_every=None, fast_weights=None,
    precision=None,
):  # fmt: skip
    """The meta-loss (mean or sum over tasks) and the meta-gradient {name: as params}."""
    how = {"loss": loss, "lr": lr, "steps": steps, "first_order": first_order, "optimizer": optimizer}
    how |= {"step_weights": step_weights, "reduction": reduction}
    g, value = grad_and_value(lambda p: meta_loss(model, p, support, query, **how))(dict(params))
    return value.detach(), {n: a.detach() for n, a in g.items()}


def _adapt(model, params, data, loss, lr, steps, first_order, optimizer):
    """[W_0, .., W_K] of one task by `fastmaml.SGD`. Parameters that the model has frozen stay as they are."""
    check_optimizer(optimizer)
    frozen = {n: params[n] for n, p in model.named_parameters() if not p.requires_grad}
    w = {n: p for n, p in params.items() if n not in frozen}
    m = dict.fromkeys(w, 0.0)
    sgd, trajectory = optimizer or SGD(), [params]
    for k in range(steps):
        g = grad(lambda w: _loss(model, loss, data)(w | frozen))(w)
        if sgd.max_grad_norm not in (None, math.inf) and g:
            norm = torch.linalg.vector_norm(torch.cat([a.flatten() for a in g.values()]))
            g = {n: a * (sgd.max_grad_norm / (norm + 1e-6)).clamp(max=1.0) for n, a in g.items()}
        if first_order:
            g = {n: a.detach() for n, a in g.items()}
        m = {n: sgd.momentum * m[n] + g[n] + sgd.weight_decay * p for n, p in w.items()}
        lr_k = lr[k] if isinstance(lr, (list, tuple, nn.ParameterList)) else lr
        w = {n: p - (lr_k[n] if isinstance(lr_k, dict) else lr_k) * m[n] for n, p in w.items()}
        trajectory.append({n: (w | frozen)[n] for n in params})
    return trajectory


def _loss(model, loss, data):
    """Parameters of one task -> loss of one task on data = (x, target) or (x, target, weight)."""
    x, *target = data
    return lambda params: resolve(loss)(_call(model, params, x), *target)


def _call(model, params, x):
    """The model with these parameters. BatchNorm takes x's statistics, training or not, and keeps none.

    Tied parameters are given under each module's name: functional_call's own tying leaves a module that is
    used twice with the given parameters for good.
    """
    first = {id(p): name for name, p in model.named_parameters()}
    state = {}
    for prefix, module in model.named_modules(prefix="model"):
        for name, p in module._parameters.items():
            if p is not None:
                state[f"{prefix}.{name}"[6:]] = params[first[id(p)]]
        if isinstance(module, _NormBase) and module.running_mean is not None:
            for name in ("running_mean", "running_var", "num_batches_tracked"):
                state[f"{prefix}.{name}"[6:]] = None
    output = functional_call(model, state, (x,), tie_weights=False)
    if not isinstance(output, Tensor):
        raise TypeError(f"the model must return one tensor, returned {type(output).__name__}")
    return output


def _tasks(model: nn.Module, params, x: Tensor, y=()):
    """Yields (params, (x, *y)) of task 0, 1, ..; parameters [*shape] are shared by all."""
    dims = {n: p.dim() for n, p in model.named_parameters()}
    data = (x, y) if isinstance(y, Tensor) else (x, *(part for part in y if part is not None))
    for t in range(len(x)):
        own = {n: p[t] if p.dim() > dims[n] else p for n, p in params.items()}
        yield own, tuple(part[t] for part in data)


def _stack(tasks):
    """[{name: [*shape]} of every task] -> {name: [T, *shape]}."""
    return {n: torch.stack([task[n] for task in tasks]) for n in tasks[0]}
