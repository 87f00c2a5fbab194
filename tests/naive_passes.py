"""The passes of fastmaml.kernels in plain torch: what they mean, and a second namespace for the sweep.

`backend()` is a backend of them: the sweep and the recursion of the `triton` backend without its kernels.
"""

import importlib
import math
import sys
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from rounding import rounded
from torch import Tensor

from fastmaml.backends.engine import Engine
from fastmaml.backends.request import Functions, Request, Result

types = importlib.import_module("fastmaml.kernels.types")


def activate(z: Tensor, act) -> Tensor:
    return {
        "none": lambda: z,
        "leaky_relu": lambda: F.leaky_relu(z, act.attr),
        "tanh": lambda: torch.tanh(z),
        "sigmoid": lambda: torch.sigmoid(z),
        "silu": lambda: F.silu(z),
        "gelu": lambda: F.gelu(z, approximate="tanh" if act.attr else "none"),
    }[act.name]()


def slopes(x: Tensor, y: Tensor, act) -> tuple[Tensor, Tensor]:
    """(f', f''), from the values that a kernel may read"""
    if act.name == "none":
        return torch.ones_like(y), torch.zeros_like(y)
    if act.name == "leaky_relu":
        at = x if act.reads_input else y
        return torch.where(at > 0, torch.ones_like(y), torch.full_like(y, act.attr)), torch.zeros_like(y)
    if act.name == "tanh":
        return 1 - y * y, -2 * y * (1 - y * y)
    if act.name == "sigmoid":
        return y * (1 - y), y * (1 - y) * (1 - 2 * y)
    if act.name == "silu":
        s = torch.sigmoid(x)
        return s + x * s * (1 - s), s * (1 - s) * (2 + x * (1 - 2 * s))
    if act.attr:
        c = math.sqrt(2 / math.pi)
        r = torch.tanh(c * (x + 0.044715 * x**3))
        u1, u2 = c * (1 + 3 * 0.044715 * x**2), 6 * c * 0.044715 * x
        r1, r2 = (1 - r * r) * u1, (1 - r * r) * (u2 - 2 * r * u1 * u1)
        return (1 + r) / 2 + x * r1 / 2, r1 + x * r2 / 2
    density = torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)
    return (1 + torch.erf(x / math.sqrt(2))) / 2 + x * density, density * (2 - x * x)


def _tangent(p) -> Tensor | None:
    return None if p is None or p.tangent is None else p.tangent if p.lr is None else p.tangent * p.lr


def _finish(y, z, out: Tensor, act, dual: bool) -> None:
    """What a producer's kernel does with f: value of z -> y, or tangent of z -> tangent of y"""
    kept: Any = None if z is None else z.t_value if dual else z.value
    if kept is not None:
        kept.copy_(out)
    if dual:
        at = y.value if z is None or z.value is None else z.value
        y.t_value.copy_(slopes(at, y.value, act)[0] * out)
    else:
        y.value.copy_(activate(out, act))


def _before_f(y, z, act, dual: bool) -> tuple[Tensor, Any]:
    """The gradient by z and its tangent"""
    if act.name == "none":
        return y.grad, y.t_grad
    first, second = slopes(y.value if z is None or z.value is None else z.value, y.value, act)
    t_g = first * y.t_grad if dual else None
    if t_g is not None and act.curved and z is not None:
        t_g = t_g + second * z.t_value * y.grad
    return first * y.grad, t_g


def _put(to: Tensor, value: Tensor, add: bool) -> None:
    to.copy_(to + value if add else value)


def _update(u, grad: Tensor) -> None:
    if u is None:
        return
    out = u.sign * grad * (1 if u.lr is None else u.lr)
    if u.scale is not None:
        out = out * u.scale.view(-1, *[1] * (grad.dim() - 1))
    u.dst.copy_(out if u.base is None else u.base + out)


def product(a: Tensor, b: Tensor, precision: str) -> Tensor:
    """a b with operands rounded as the kernels have them rounded"""
    if a.dtype is torch.float32:
        a, b = rounded(a, precision), rounded(b, precision)
    return a @ b


def linear_forward(x, w, b, y, z, act=types.NO_ACTIVATION, norm=None, *, dual, precision="ieee") -> None:
    _product_forward(x, w, b, y, z, act, dual, precision)
    if norm is not None:
        norm_forward(y, *norm[:6], eps=norm.eps, axis=norm.axis, dual=dual)


def _product_forward(x, w, b, y, z, act, dual, precision) -> None:
    if not dual:
        out = product(x.value, w.value.mT, precision)
        return _finish(y, z, out if b is None else out + b.value[:, None], act, dual)
    out = torch.zeros_like(y.value)
    if x.t_value is not None:
        out += product(x.t_value, w.value.mT, precision)
    if (t_w := _tangent(w)) is not None:
        out += product(x.value, t_w.mT, precision)
    if (t_b := _tangent(b)) is not None:
        out += t_b[:, None]
    _finish(y, z, out, act, dual)


def linear_backward_input(x, w, y, z, act=types.NO_ACTIVATION, *, add, dual, precision="ieee") -> None:
    g, t_g = _before_f(y, z, act, dual)
    if not dual:
        return _put(x.grad, product(g, w.value, precision), add)
    out, t_w = product(t_g, w.value, precision), _tangent(w)
    _put(x.t_grad, out if t_w is None else out + product(g, t_w, precision), add)


def linear_backward_weight(
    x, y, z, update_w, update_b, act=types.NO_ACTIVATION, *, dual, precision="ieee"
) -> None:
    g, t_g = _before_f(y, z, act, dual)
    grad_w = product((t_g if dual else g).mT, x.value, precision)
    if dual and x.t_value is not None:
        grad_w = grad_w + product(g.mT, x.t_value, precision)
    _update(update_w, grad_w)
    _update(update_b, (t_g if dual else g).sum(1))


def _normed(x, statistics: Tensor, axis: int) -> tuple[Tensor, ...]:
    """h, s, mean t_x and mean h t_x, from what the forward passes left"""
    m, s, t_m, along = (a.unsqueeze(1 if axis == 0 else 2) for a in statistics.unbind(2))
    return (x.value - m) * s, s, t_m, along


def norm_forward(x, w, b, y, z, statistics, act=types.NO_ACTIVATION, *, eps, axis, dual) -> None:
    dim = 1 + axis
    row = lambda p: p[:, None]  # noqa: E731
    if not dual:
        m = x.value.mean(dim)
        d = x.value - m.unsqueeze(dim)
        statistics[..., 0], statistics[..., 1] = m, 1 / (d.square().mean(dim) + eps).sqrt()
        out = _normed(x, statistics, axis)[0]
        out = out if w is None else out * row(w.value)
        return _finish(y, z, out if b is None else out + row(b.value), act, dual)
    h, s, _, _ = _normed(x, statistics, axis)
    out = torch.zeros_like(y.value)
    if x.t_value is not None:
        statistics[..., 2], statistics[..., 3] = x.t_value.mean(dim), (h * x.t_value).mean(dim)
        _, _, t_m, along = _normed(x, statistics, axis)
        out = s * (x.t_value - t_m - h * along)
        out = out if w is None else out * row(w.value)
    if (t_w := _tangent(w)) is not None:
        out = out + h * row(t_w)
    if (t_b := _tangent(b)) is not None:
        out = out + row(t_b)
    _finish(y, z, out, act, dual)


def norm_backward(
    x, w, y, z, statistics, update_w, update_b, act=types.NO_ACTIVATION, *, axis, wants_x, add, dual
) -> None:
    def mean(a: Tensor) -> Tensor:
        return a.mean(1 + axis, keepdim=True)

    g, t_g = _before_f(y, z, act, dual)
    h, s, t_m, along = _normed(x, statistics, axis)
    q = g if w is None else g * w.value[:, None]
    grad_x = s * (q - mean(q) - h * mean(q * h))
    if not dual:
        _update(update_w, (g * h).sum(1))
        _update(update_b, g.sum(1))
        if wants_x:
            _put(x.grad, grad_x, add)
        return
    moves = x.t_value is not None
    t_h = s * (x.t_value - t_m - h * along) if moves else torch.zeros_like(h)
    t_q = t_g if w is None else t_g * w.value[:, None]
    if (t_w := _tangent(w)) is not None:
        t_q = t_q + g * t_w[:, None]
    _update(update_w, (t_g * h + g * t_h).sum(1))
    _update(update_b, t_g.sum(1))
    if wants_x:
        out = s * (t_q - mean(t_q) - t_h * mean(q * h) - h * mean(t_q * h + q * t_h))
        _put(x.t_grad, out - s * along * grad_x if moves else out, add)


batch_norm_forward, batch_norm_backward = partial(norm_forward, axis=0), partial(norm_backward, axis=0)
layer_norm_forward, layer_norm_backward = partial(norm_forward, axis=1), partial(norm_backward, axis=1)


def rows_update(rows, update) -> None:
    _update(update, rows)


def elementwise_forward(x, y, act, *, dual) -> None:
    if dual:
        y.t_value.copy_(slopes(x.value, y.value, act)[0] * x.t_value)
    else:
        y.value.copy_(activate(x.value, act))


def elementwise_backward(x, y, act, *, add, dual) -> None:
    first, second = slopes(x.value, y.value, act)
    if not dual:
        return _put(x.grad, first * y.grad, add)
    out = first * y.t_grad
    _put(x.t_grad, out if x.t_value is None else out + second * x.t_value * y.grad, add)


def add_forward(a, b, y, *, dual) -> None:
    field = "t_value" if dual else "value"
    terms = [getattr(x, field) for x in (a, b) if x is not None and getattr(x, field) is not None]
    getattr(y, field).copy_(sum(t.view(getattr(y, field).shape) for t in terms))


def add_backward(x, y, *, add, dual) -> None:
    field = "t_grad" if dual else "grad"
    _put(getattr(x, field), getattr(y, field).view(getattr(x, field).shape), add)


def _shares(weight: Tensor | None, like: Tensor, N: int) -> Tensor:
    return like.new_full((len(like), N), 1 / N) if weight is None else weight / weight.sum(1, keepdim=True)


def mse(z, target, weight, loss, *, dual) -> None:
    T, N = target.shape[:2]
    s = (_shares(weight, z.value, N) / (z.value.numel() // (T * N))).unsqueeze(2)
    if dual:
        z.t_grad.copy_((2 * s * z.t_value.view(T, N, -1)).view(z.value.shape))
        return
    d = (z.value.view(target.shape) - target).view(T, N, -1)
    loss.copy_((s * d * d).sum((1, 2)))
    z.grad.copy_((2 * s * d).view(z.value.shape))


def cross_entropy(z, target, weight, loss, *, smoothing, dual) -> None:
    s = _shares(weight, z.value, target.shape[1]).unsqueeze(2)
    log_p = torch.log_softmax(z.value, 2)
    p, C = log_p.exp(), z.value.shape[2]
    if dual:
        z.t_grad.copy_(s * p * (z.t_value - (p * z.t_value).sum(2, keepdim=True)))
        return
    q = (1 - smoothing) * F.one_hot(target, C).to(p.dtype) + smoothing / C
    loss.copy_(-(s * q * log_p).sum((1, 2)))
    z.grad.copy_(s * (p - q))


def mlp(
    support,
    query,
    w,
    lr,
    scale,
    kept,
    v,
    loss,
    widths,
    places,
    act,
    *,
    classes,
    smoothing,
    steps,
    first_order,
) -> None:
    """By autograd, one task after another"""
    I, H, G, O = widths
    shapes = (H, I), (H,), (G, H), (G,), (O, G), (O,)
    parts = list(zip(shapes, places, strict=True))

    def split(flat: Tensor) -> list[Tensor]:
        return [flat[at : at + math.prod(shape)].view(shape) for shape, at in parts]

    def loss_of(p: list[Tensor], x: Tensor, y: Tensor, weight: Tensor | None) -> Tensor:
        h = activate(x @ p[0].mT + p[1], act)
        z = activate(h @ p[2].mT + p[3], act) @ p[4].mT + p[5]
        if classes:
            each = F.cross_entropy(z, y, reduction="none", label_smoothing=smoothing)
        else:
            each = (z - y).square().mean(1)
        return each.mean() if weight is None else (each * weight).sum() / weight.sum()

    def examples(of: tuple[Tensor | None, ...], t: int) -> list[Any]:
        return [None if a is None else a[t] for a in of]

    for t in range(len(loss)):
        first = [p.clone().requires_grad_() for p in split(w[t % len(w)])]
        params = first
        for k in range(steps):
            if v is not None and not first_order:
                for to, p in zip(split(kept[k, t]), params, strict=True):
                    to.copy_(p.detach())
            grads = torch.autograd.grad(
                loss_of(params, *examples(support, t)), params, create_graph=not first_order
            )
            rates = lr[k].expand(6)
            params = [p - a * g for p, a, g in zip(params, rates, grads, strict=True)]
        result = loss_of(params, *examples(query, t))
        loss[t] = result.detach()
        if v is not None:
            grads = torch.autograd.grad(result, params if first_order else first)
            for to, g in zip(split(v[t]), grads, strict=True):
                to.copy_(scale * g)


def backend(precision: str = "ieee", passes: Any = None) -> Any:
    def run(request: Request) -> Result:
        engine = Engine(passes or sys.modules[__name__], request, precision)
        for _ in range(2):  # the second time its buffers are used ones
            engine.load(request)
            engine.run()
        return engine.result()

    functions = Functions(run)
    names = [n for n in dir(functions) if not n.startswith("_")]
    offered = {name: getattr(functions, name) for name in names}
    return SimpleNamespace(**offered, supports=lambda *_: None, EMULATED=True, DEVICE="cpu")
