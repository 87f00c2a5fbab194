"""What a public function is given, checked once before any work, and put into the form that backends take."""

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from .backends import Problem, problem_for
from .forms import FactoredWeight
from .losses import IGNORED, MSE, CrossEntropy, built_in

Target = tuple[Tensor, Tensor | None]  # target, weight
PER_STEP = (list, tuple, nn.ParameterList)  # an lr of such a type has an entry for each step


def _kind(a: Any) -> str:
    if isinstance(a, type):
        return f"the class {a.__name__}"
    return type(a).__name__ + (f" of {len(a)}" if isinstance(a, (tuple, list)) else "")


def check_loss(loss: Any) -> None:
    """The gradient by the parameters of a loss, if it has any, is None afterwards: better said before."""
    if not isinstance(loss, nn.Module) or not torch.is_grad_enabled():
        return
    if learned := [name for name, p in loss.named_parameters() if p.requires_grad]:
        raise ValueError(
            f"the loss's parameters {learned} get no gradient here: freeze them, or use fastmaml.reference"
        )


def pair(name: str, data: Any) -> tuple[Any, Any]:
    """The x and y of a set."""
    if not isinstance(data, (tuple, list)) or len(data) != 2:
        raise TypeError(f"{name} must be a pair (x, y), got {_kind(data)}")
    return data[0], data[1]


def understood(loss: Any, model: nn.Module, x: Tensor, *ys: Any) -> Any:
    """The loss with kernels that a loss of torch's means for x and these targets; else `loss` as it is.

    torch's take more: targets that broadcast, class probabilities, labels of more axes, labels to ignore.
    Such targets, and models without kernels, leave it the callable that it is. So do labels whose reading
    would stop a graph being compiled, or a GPU.
    """
    meant = built_in(loss)
    if meant is None or torch.compiler.is_compiling():
        return loss
    ys = tuple(_bare(y) for y in ys)
    if not all(isinstance(y, Tensor) and y.dim() > 1 for y in ys):
        return loss
    examples = x.shape[1], *(y.shape[1] for y in ys)
    program = problem_for(model, tuple(x.shape[2:]), None, examples).program
    if program is None:
        return loss
    out = program.buffers[program.output]
    if isinstance(meant, MSE):
        fits = all(y.dtype is x.dtype and y.shape[2:] == out for y in ys)
    else:
        fits = (
            x.device.type == "cpu"
            and len(out) == 1
            and all(are_labels(y) and not (y == IGNORED).any() for y in ys)
        )
    return meant if fits else loss


def _bare(y: Any) -> Any:
    """y for (y, None)."""
    return y[0] if isinstance(y, (tuple, list)) and len(y) == 2 and y[1] is None else y


def are_labels(y: Tensor) -> bool:
    """One class for each example."""
    return y.dtype is torch.int64 and y.dim() == 2


def check_count(name: str, value: int | None, least: int) -> None:
    if value is None and least > 0:
        return
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def check_x(name: str, x: Tensor) -> Tensor:  # [T, N, *example]
    """x, contiguous."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.dim() < 3 or 0 in x.shape[:2]:
        raise ValueError(f"{name} must have shape [T, N, ...] with T, N >= 1, got {list(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {x.dtype}")
    return x.contiguous()


def check_query_x(x_q: Tensor, x_s: Tensor) -> Tensor:
    """x of the query sets, contiguous: of the tasks and the kind of x_s, that of the support sets."""
    x_q = check_x("query x", x_q)
    check_shape("query x", x_q, (x_s.shape[0], x_q.shape[1], *x_s.shape[2:]))
    if x_q.dtype is not x_s.dtype or x_q.device != x_s.device:
        raise TypeError(
            f"query x must be {x_s.dtype} on {x_s.device}, as support x, got {x_q.dtype} on {x_q.device}"
        )
    return x_q


def _check_like(name: str, tensor: Tensor, x: Tensor) -> None:
    if tensor.dtype is not x.dtype:
        raise TypeError(f"{name} must have dtype {x.dtype}, as x, got {tensor.dtype}")
    if tensor.device != x.device:
        raise ValueError(f"{name} must be on {x.device}, as x, got {tensor.device}")


def check_shape(name: str, tensor: Tensor, shape: Any) -> None:
    if tensor.shape != torch.Size(shape):
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(tensor.shape)}")


def parameters(
    problem: Problem, params: Mapping[str, Tensor], x: Tensor, what: str = "params"
) -> list[Tensor]:
    """`params` in the order of problem.names, contiguous: each [*shape], or [T, *shape]."""
    if not isinstance(params, Mapping):
        raise TypeError(f"{what} must be a dict name -> tensor, got {type(params).__name__}")
    if len(params) != len(problem.names) or any(n not in params for n in problem.names):
        missing, extra = set(problem.names) - set(params), set(params) - set(problem.names)
        raise ValueError(
            f"{what} must name every parameter: missing {sorted(missing)}, unexpected {sorted(extra)}"
        )
    T, ordered = x.shape[0], []
    for name, shape in zip(problem.names, problem.shapes, strict=True):
        p = params[name]
        if not isinstance(p, (Tensor, FactoredWeight)):
            raise TypeError(f"{what}[{name!r}] must be a tensor, got {_kind(p)}")
        if p.shape != shape and p.shape != (T, *shape):
            each = f"{list(shape)} or {[T, *shape]}"
            raise ValueError(f"{what}[{name!r}] must have shape {each}, got {list(p.shape)}")
        _check_like(f"{what}[{name!r}]", p, x)
        ordered.append(p.contiguous())
    return ordered


def target(problem: Problem, y: Tensor | tuple[Tensor, Tensor], x: Tensor, name: str) -> Target:
    """(target, weight | None), contiguous, fit for the problem's loss."""
    y, weight = _parts(y, name)
    T, N = x.shape[:2]
    out = problem.program.buffers[problem.program.output] if problem.program else None
    if isinstance(problem.loss, CrossEntropy):
        check_shape(name, y, (T, N))
        if y.dtype is not torch.int64:
            raise TypeError(f"{name} must hold class indices of dtype torch.int64, got {y.dtype}")
        if out:
            check_labels(name, y, out[-1])
    elif isinstance(problem.loss, MSE):
        if out is not None:
            check_shape(name, y, (T, N, *out))
        _check_like(name, y, x)
    if y.shape[:2] != (T, N):
        raise ValueError(f"{name} must have shape [{T}, {N}, ...], got {list(y.shape)}")
    if y.device != x.device:
        raise ValueError(f"{name} must be on {x.device}, as x, got {y.device}")
    if weight is not None:
        if built_in(problem.loss):
            raise ValueError(
                f"torch's losses take no weight per example, as that of {name}: give "
                '"mse" or "cross_entropy"'
            )
        check_shape(f"the weight of {name}", weight, (T, N))
        _check_like(f"the weight of {name}", weight, x)
        weight = weight.contiguous()
    if y.requires_grad or (weight is not None and weight.requires_grad):
        raise ValueError(
            f"{name} and its weight have no derivative here: detach them, or use fastmaml.reference"
        )
    return y.contiguous(), weight


def _parts(y: Any, name: str) -> tuple[Tensor, Tensor | None]:
    """y, or (target, weight), as (target, weight | None)."""
    parts = tuple(y) if isinstance(y, (tuple, list)) else (y, None)
    if len(parts) != 2 or not isinstance(parts[0], Tensor):
        raise TypeError(f"{name} must be a tensor or a pair (target, weight), got {_kind(y)}")
    if not isinstance(parts[1], (Tensor, type(None))):
        raise TypeError(f"the weight of {name} must be a tensor or None, got {_kind(parts[1])}")
    return parts


def check_labels(name: str, y: Tensor, classes: int) -> None:
    # reading them would stop a graph being compiled, and a GPU
    if y.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = (int(label) for label in torch.aminmax(y))
        if low < 0 or high >= classes:
            raise ValueError(f"{name} must hold labels from 0 to {classes - 1}, got {low} to {high}")


def signature(params: Mapping[str, Tensor], *data: Any) -> list[Any] | None:
    """All that the checks of plain contiguous tensors look at; None for anything that they must see again.

    A call like the last one is checked by comparing this: the checks one by one take as long as a small
    network's inner loop.
    """
    x = data[0]
    if not isinstance(params, Mapping) or not isinstance(x, Tensor):
        return None
    if x.dim() < 3 or not x.is_floating_point():
        return None
    seen: list[Any] = [type(x), *params]
    for a in (*data, *params.values()):
        if not isinstance(a, Tensor) or not a.is_contiguous():
            return None
        seen += a.shape, a.dtype, a.device
    for y in data[1::2]:
        if y.requires_grad:
            return None
    return seen


def step_sizes(problem: Problem, lr: Any, steps: int, x: Tensor) -> Tensor:
    """lr as [K, S], differentiably: S is 1 (one number), n (one per parameter) or P (one per element).

    Frozen parameters need no entry in a dict, and have 0.
    """
    if type(lr) is float:  # the usual one, sooner
        return _constant(problem, lr, steps, x)
    each = _each_step(lr, steps)
    if not any(isinstance(a, Mapping) for a in each):
        if len(each) == 1 and not isinstance(each[0], Tensor):
            return _constant(problem, _number(each[0]), steps, x)
        rows = [_scalar(a, x) for a in each]
        return torch.stack(rows).view(-1, 1).expand(steps, 1) if rows else x.new_empty(0, 1)
    rows = [_by_name(problem, a, x) for a in each]
    if all(a.dim() == 0 for row in rows for a in row):
        table = torch.stack([torch.stack(row) for row in rows])
    else:
        offsets, size = problem.layouts[x.element_size()]
        ends = (*offsets[1:], size)
        pieces = []
        for row in rows:
            for a, shape, start, end in zip(row, problem.shapes, offsets, ends, strict=True):
                flat = a.expand(shape).reshape(-1)
                pieces.append(torch.cat([flat, flat.new_zeros(end - start - flat.numel())]))
        table = torch.cat(pieces).view(len(rows), size)
    return table.expand(steps, -1).contiguous()


def check_lr(lr: Any, steps: int) -> None:
    """What can be said of it without a model or data: its length, and the kinds of things in it."""
    for a in _each_step(lr, steps):
        if isinstance(a, Tensor):
            _check_0d(a)
        for size in a.values() if isinstance(a, Mapping) else [a]:
            if not isinstance(size, Tensor):
                _number(size)


def _each_step(lr: Any, steps: int) -> Sequence[Any]:
    """The entries of lr, one for each step, or the one for all."""
    if not isinstance(lr, PER_STEP):
        return [lr]
    if len(lr) != steps:
        raise ValueError(f"lr must be one, or a list of steps = {steps}, got a list of {len(lr)}")
    return list(lr)


def _constant(problem: Problem, value: float, steps: int, x: Tensor) -> Tensor:
    """[K, 1] of one number, kept for the next call: making it costs as much as all other checks."""
    if torch.compiler.is_compiling():
        return x.new_full((steps, 1), value)
    key = value, steps, x.dtype, x.device, type(x)
    known, rates = problem.memo.get("lr", (None, None))  # in one, for the sake of other threads
    if known != key:
        with torch.inference_mode(False):  # a later call may want to differentiate what this one makes
            rates = torch.full((steps, 1), value, dtype=x.dtype, device=x.device)
        problem.memo["lr"] = key, rates
    return rates


def _by_name(problem: Problem, lr: Any, x: Tensor) -> list[Tensor]:
    """One step's lr: a tensor per parameter, 0-d or broadcastable to it."""
    if not isinstance(lr, Mapping):
        return [_scalar(lr, x)] * len(problem.names)
    wanted = {n for n, adapt in zip(problem.names, problem.adapt, strict=True) if adapt}
    if not wanted <= lr.keys() <= set(problem.names):
        missing, extra = wanted - lr.keys(), lr.keys() - set(problem.names)
        raise ValueError(
            f"lr must name every parameter: missing {sorted(missing)}, unexpected {sorted(extra)}"
        )
    row = []
    for name, shape in zip(problem.names, problem.shapes, strict=True):
        a = lr[name] if name in wanted else 0.0
        if isinstance(a, Tensor) and a.dim() > 0:
            _check_like(f"lr[{name!r}]", a, x)
            if a.dim() > len(shape) or any(
                s not in (1, full) for s, full in zip(a.shape[::-1], shape[::-1], strict=False)
            ):
                raise ValueError(f"lr[{name!r}] must broadcast to {list(shape)}, got {list(a.shape)}")
            row.append(a)
        else:
            row.append(_scalar(a, x))
    return row


def _scalar(a: Any, x: Tensor) -> Tensor:
    if not isinstance(a, Tensor):
        return x.new_full((), _number(a))
    _check_0d(a)
    return a.to(x)


def _check_0d(lr: Tensor) -> None:
    if lr.dim():
        raise ValueError(
            f"lr must have shape [], got {list(lr.shape)}: "
            "step sizes for the steps come as a list of numbers or 0-d tensors"
        )


def _number(a: Any) -> float:
    if isinstance(a, Real) and not isinstance(a, bool):
        return float(a)
    raise TypeError(
        f"lr must be a number, a tensor, a dict of them, or a list of such, got {type(a).__name__}"
    )
