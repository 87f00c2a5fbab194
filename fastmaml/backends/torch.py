"""The `torch` backend: any module, any loss, any device.

The recursion of the kernels, in torch.func: H u is the jvp of the gradient, vmapped over tasks, so nothing is
differentiated twice by reverse mode and memory is O(K * weights), not O(K * activations).
"""

import math
import sys
import warnings
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.func import grad, grad_and_value, jvp, vjp, vmap

from ..reference import _call
from ..running import innermost, turns_grad_off
from . import torch_factored, torch_linear
from .torch_descent import State, Weights, descent, through_clip

if TYPE_CHECKING:
    from . import Problem


DEVICE = None  # of the tensors that it takes by itself; None: any
EMULATED = False


def supports(problem: "Problem", device: torch.device, dtype: torch.dtype) -> str | None:
    """None, or the reason why this backend cannot run the problem."""
    if not dtype.is_floating_point:
        return f"it takes floating point, not {dtype}"
    # what has a Program runs under vmap and draws no random numbers
    return None if problem.program else _why_not_vmapped(problem, device, dtype)


_RANDOM = (
    "draws random numbers: every sweep over the data would draw others, and the gradients would be wrong; "
    "call model.eval() (or set p=0, for dropout), or use fastmaml.reference"
)


def _why_not_vmapped(problem, device, dtype) -> str | None:
    """What vmap refuses of the model, such as active dropout: found by one gradient on two examples."""
    model = problem.model
    w = [p.detach().to(device, dtype)[None] for p in model.parameters()]
    x = torch.ones(1, 2, *problem.example_shape, device=device, dtype=dtype)
    try:
        vmap(grad(lambda w, x: _output(problem, w, x).sum()), randomness="error")(w, x)
    except Exception as error:  # another error is left to the call itself
        if _drew(error) or str(error).startswith("vmap: "):
            names = {id(m): path for path, m in model.named_modules()}
            path, module = innermost(names, error) or ("", model)
            why = _RANDOM if _drew(error) else f"cannot run under {error}; use fastmaml.reference"
            return f"{f'{path!r}' if path else 'the model'} ({type(module).__name__}) {why}"
        return None
    run = lambda w: _output(problem, w, x[0])  # noqa: E731
    problem.memo["linear layers"] = torch_linear.linear_layers(run, [p[0] for p in w], 2)
    return None


def _drew(error: Exception) -> bool:
    """Whether this is how vmap refuses random numbers."""
    return isinstance(error, RuntimeError) and "randomness error mode" in str(error)


def _output(problem, w, x):
    return _call(problem.model, dict(zip(problem.names, w, strict=True)), x)


def _loss(problem):
    """(weights, x, target, weight | None) of one task -> its loss"""

    def loss(w, x, target, weight):
        out = _output(problem, w, x)
        return problem.loss(out, target) if weight is None else problem.loss(out, target, weight)

    return loss


def _map(f, *args):
    dims = tuple(None if a is None else 0 for a in args)
    try:
        return vmap(f, in_dims=dims, randomness="error")(*args)
    except RuntimeError as error:  # of a loss, or of a module that draws on some inputs only
        if _drew(error):
            raise RuntimeError(f"the model or the loss {_RANDOM}") from error
        raise


def _own(problem, params, T) -> Weights:
    """[T, *shape] each; of its own memory, since jvp refuses primals whose elements share any."""
    own = [p if p.dim() > len(s) else p.expand(T, *s) for p, s in zip(params, problem.shapes, strict=True)]
    return [p.detach().contiguous() for p in own]


def flatten(problem, w: Weights) -> Tensor:
    """[*lead, *shape] per parameter -> [*lead, P]"""
    offsets, size = problem.layout(w[0].element_size())
    lead = w[0].shape[: w[0].dim() - len(problem.shapes[0])]
    flat = w[0].new_zeros(*lead, size)
    for a, s, at in zip(w, problem.shapes, offsets, strict=True):
        flat[..., at : at + _numel(s)] = a.reshape(*lead, -1)
    return flat


def unflatten(problem, flat: Tensor) -> Weights:
    """[*lead, P] -> [*lead, *shape] per parameter"""
    offsets, _ = problem.layout(flat.element_size())
    lead = flat.shape[:-1]
    pairs = zip(problem.shapes, offsets, strict=True)
    return [flat[..., at : at + _numel(s)].reshape(*lead, *s) for s, at in pairs]


def _numel(shape) -> int:
    return torch.Size(shape).numel()


def _reduce(problem, params, flat: Tensor, per_task: bool) -> Tensor:
    """[T, P] -> summed over tasks [1, P], unless some parameter belongs to a task."""
    own = any(p.dim() > len(s) for p, s in zip(params, problem.shapes, strict=True))
    return flat if per_task or own else flat.sum(0, keepdim=True)


def apply(problem, params, x):
    return _map(lambda w, x: _output(problem, w, x), _own(problem, params, len(x)), x)


def apply_backward(problem, params, x, grad_out, *, needs):
    def pull(w, x, d):
        return vjp(lambda w, x: _output(problem, w, x), w, x)[1](d)

    g, g_x = _map(pull, _own(problem, params, len(x)), x, grad_out)
    return _reduce(problem, params, flatten(problem, g), False), g_x if "x" in needs else None


def value_and_grad(problem, params, x, y):
    g, loss = _map(grad_and_value(_loss(problem)), _own(problem, params, len(x)), x, *y)
    return loss, flatten(problem, g)


@cache
def _prepare_jvp() -> None:
    """The first jvp compiles torch's formulas by torch.jit.script, and warns of it: no doing of the user."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        jvp(torch.sin, (torch.zeros(()),), (torch.zeros(()),))


def _has_jvp(problem, w: Weights, x: Tensor, y) -> bool:
    """False where _no_jvp was, and where the model or the loss says torch.no_grad(), which jvp ignores."""
    if "jvp" not in problem.memo:
        _prepare_jvp()
        one = [None if a is None else a[0].detach() for a in (x, *y)]
        off = turns_grad_off(lambda: _loss(problem)([a[0].detach() for a in w], *one))
        problem.memo["jvp"] = not off
    return problem.memo["jvp"]


def _no_jvp(problem, error: RuntimeError) -> None:
    """Some of torch's operators have none, as the gradients of huber_loss and mse_loss: weights are dense,
    and the gradient is differentiated in reverse. Any other error is raised."""
    if not isinstance(error, NotImplementedError) and "ZeroTensor" not in str(error):
        raise error
    problem.memo["jvp"] = False


def _curvature(problem, w, u, x, y, with_x):
    """H u, and d<g, u>/dx if asked, per task."""
    argnums = (0, 1) if with_x else (0,)
    gradient = grad(_loss(problem), argnums=argnums)

    def forward_over_reverse(w, u, x, target, weight):
        return jvp(lambda w: gradient(w, x, target, weight), (w,), (u,))[1]

    def reverse_over_reverse(w, u, x, target, weight):
        def along(w, x):
            return sum((g * a).sum() for g, a in zip(gradient(w, x, target, weight)[0], u, strict=True))

        return grad(along, argnums=argnums)(w, x)

    if _has_jvp(problem, w, x, y):
        try:
            h, *h_x = _map(forward_over_reverse, w, u, x, *y)
            return h, h_x[0] if h_x else None
        except RuntimeError as error:
            _no_jvp(problem, error)
    h, *h_x = _map(reverse_over_reverse, w, u, x, *y)
    return h, h_x[0] if h_x else None


def value_and_grad_backward(problem, params, x, y, grad_loss, v, *, needs, per_task=False):
    w = _own(problem, params, len(x))
    h, h_x = _curvature(problem, w, unflatten(problem, v), x, y, "x" in needs)
    flat = flatten(problem, h)
    if grad_loss is not None:
        (g, g_x) = _map(grad(_loss(problem), argnums=(0, 1)), w, x, *y)
        flat = flat + grad_loss[:, None] * flatten(problem, g)
        if h_x is not None:
            h_x = h_x + grad_loss.view(-1, *[1] * (x.dim() - 1)) * g_x
    return _reduce(problem, params, flat, per_task), h_x


def _step_sizes(problem, lr_k: Tensor) -> list[Tensor | float]:
    """[S] of one step -> one factor per parameter, 0 for what is frozen"""
    n = len(problem.names)
    each = [lr_k[0]] * n if len(lr_k) == 1 else list(lr_k) if len(lr_k) == n else unflatten(problem, lr_k)
    return [a if adapt else 0.0 for a, adapt in zip(each, problem.adapt, strict=True)]


def _start(problem, params, T: int, rule) -> State:
    w = _own(problem, params, T)
    return w, [torch.zeros_like(p) for p in w] if rule else None


def _step(problem, state: State, lr_k: Tensor, rule, x, y) -> State:
    m = descent(problem, state, _map(grad(_loss(problem)), state[0], x, *y), rule)
    sizes = _step_sizes(problem, lr_k)
    w = [p - s * d if a else p for p, s, d, a in zip(state[0], sizes, m, problem.adapt, strict=True)]
    return w, m if rule else None


def inner_loop(problem, params, lr, x, y, *, steps, rule=()):
    state = _start(problem, params, len(x), rule)
    for k in range(steps):
        state = _step(problem, state, lr[k], rule, x, y)
    return flatten(problem, state[0])


def _trajectory(problem, params, lr, x, y, steps, rule, every) -> tuple[dict[int, State], Weights]:
    """W_k and M_k at every `every`-th k, and W_K"""
    state = _start(problem, params, len(x), rule)
    stored = {}
    for k in range(steps):
        if k % every == 0:
            stored[k] = state
        state = _step(problem, state, lr[k], rule, x, y)
    return stored, state[0]


def _adjoint(
    problem, stored, v, lr, x, y, *, steps, first_order, rule, every, per_task, needs, query_gradient=None
):  # fmt: skip
    """v_0, dL/da [T or 1, K, S] and dL/dx, with n = dL/dM_{k+1} from

        n <- momentum n - a_k v_{k+1},    v_k = v_{k+1} + H_k (c n)' + weight_decay n

    where (c n)' is n through the clipping; v_k = v_{k+1} - H_k (a_k v_{k+1}) for plain descent.

    query_gradient(k, W_k): that of the query loss after step k, to be added to v_k; None where it has none
    """
    count, S = len(problem.names), lr.shape[1] if steps else 1
    g_lr, g_x = [], torch.zeros_like(x) if "x" in needs else None
    momentum, decay, most = rule or (0.0, 0.0, math.inf)
    n: Weights | None = None
    for start in reversed(range(0, steps, every)):
        end = min(start + every, steps)
        segment = [stored.pop(start)]
        for k in range(start, end - 1):
            segment.append(_step(problem, segment[-1], lr[k], rule, x, y))
        for k in reversed(range(start, end)):
            w, _ = state = segment.pop()
            step = [-s * a for s, a in zip(_step_sizes(problem, lr[k]), v, strict=True)]
            n = [a + momentum * b for a, b in zip(step, n, strict=True)] if n and momentum else step
            clips = most < math.inf and not first_order
            g = _map(grad(_loss(problem)), w, x, *y) if "lr" in needs or clips else []
            if "lr" in needs:
                each = [
                    -(a * b) if ok else torch.zeros_like(a)
                    for a, b, ok in zip(v, descent(problem, state, g, rule), problem.adapt, strict=True)
                ]
                if S not in (1, count):
                    row = flatten(problem, each)
                else:
                    row = torch.stack([e.flatten(1).sum(1) for e in each], 1)
                    row = row.sum(1, keepdim=True) if S == 1 else row
                g_lr.append(row if per_task else row.sum(0, keepdim=True))
            if not first_order:
                h, h_x = _curvature(problem, w, through_clip(problem, n, g, rule), x, y, "x" in needs)
                v = [a + b for a, b in zip(v, h, strict=True)]
                g_x = g_x + h_x if h_x is not None else g_x
            if decay:
                v = [a + decay * b for a, b in zip(v, n, strict=True)]
            if query_gradient and (more := query_gradient(k, w)):
                v = [a + b for a, b in zip(v, more, strict=True)]
    return v, torch.stack(g_lr[::-1], 1) if g_lr else None, g_x


def inner_loop_backward(
    problem, params, lr, x, y, v, *, steps, first_order, checkpoint_every, needs, rule=()
):
    every = checkpoint_every or max(steps, 1)
    stored, _ = _trajectory(problem, params, lr, x, y, steps, rule, every)
    v, g_lr, g_x = _adjoint(
        problem, stored, unflatten(problem, v), lr, x, y,
        steps=steps, first_order=first_order, rule=rule, every=every, per_task=False, needs=needs,
    )  # fmt: skip
    return _reduce(problem, params, flatten(problem, v), False), g_lr, g_x


def meta_loss(
    problem, params, lr, support, query,
    *, steps, first_order, rule=(), step_weights=(), checkpoint_every, per_task, scale, needs, factored=(),
):  # fmt: skip
    if factored and _has_jvp(problem, _own(problem, params, 1), *support):
        try:
            return torch_factored.meta_loss(
                sys.modules[__name__], problem, params, lr, support, query,
                steps=steps, first_order=first_order, rule=rule, step_weights=step_weights,
                per_task=per_task, scale=scale, needs=needs, factored=factored,
            )  # fmt: skip
        except RuntimeError as error:
            _no_jvp(problem, error)
    (x, y), (x_q, y_q) = support, query
    every = checkpoint_every or max(steps, 1)
    back = needs & {"params", "lr", "x_s"}
    of_task = _loss(problem)
    argnums = (0, 1) if "x_q" in needs else (0,)
    weights = step_weights or (*[0.0] * (steps - 1), 1.0)  # after steps 1, .., or after none
    loss, g_xq = x.new_zeros(len(x)), torch.zeros_like(x_q) if "x_q" in needs else None

    def query_gradient(k: int, w: Weights) -> Weights | None:
        """That of W_k, k > 0; the loss and the gradient by x_q are added up."""
        nonlocal loss, g_xq
        weight = weights[k - 1] if k else 0.0 if steps else weights[0]
        if k == 0 < steps or (not weight and k < steps):
            return None
        run = lambda *args: scale * weight * of_task(*args)  # noqa: E731
        if not back and "x_q" not in needs:
            loss = loss + _map(run, w, x_q, *y_q)
            return None
        (g, *g_x), value = _map(grad_and_value(run, argnums=argnums), w, x_q, *y_q)
        loss = loss + value
        g_xq = g_xq + g_x[0] if g_x else None
        return g

    if not back:
        state = _start(problem, params, len(x), rule)
        for k in range(steps):
            state = _step(problem, state, lr[k], rule, x, y)
            if step_weights and k + 1 < steps:
                query_gradient(k + 1, state[0])
        query_gradient(steps, state[0])
        return loss if per_task else loss.sum(), None, None, None, g_xq
    stored, w = _trajectory(problem, params, lr, x, y, steps, rule, every)
    v = query_gradient(steps, w) or [torch.zeros_like(p) for p in w]
    v, g_lr, g_x = _adjoint(
        problem, stored, v, lr, x, y, steps=steps, first_order=first_order, rule=rule, every=every,
        per_task=per_task, needs={"x" if n == "x_s" else n for n in needs},
        query_gradient=query_gradient if step_weights else None,
    )  # fmt: skip
    grads = _reduce(problem, params, flatten(problem, v), per_task)
    return loss if per_task else loss.sum(), grads, g_lr, g_x, g_xq
