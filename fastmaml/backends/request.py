"""One call of an engine that runs whole inner loops, and the six functions of a backend that has one.

The Python twin of csrc/cpu/request.h: K inner steps on the support set, then a tail, then the adjoint.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from torch import Tensor

if TYPE_CHECKING:
    from . import Problem


class Examples(NamedTuple):
    """A set of every task: x [T, N, ..]; target [T, N, ..], or [T, N] int64; weight [T, N] or None."""

    x: Tensor
    target: Tensor | None = None
    weight: Tensor | None = None

    def contiguous(self) -> "Examples":
        rest = (None if a is None else a.contiguous() for a in self[1:])
        return Examples(self.x.contiguous(), *rest)


@dataclass(frozen=True)
class Request:
    """What is to be computed. Tensors are detached, contiguous, of one dtype and device.

    tail: what follows the steps.
        weights: `out` = W_K [T, P]; with a seed [T, P]: its vector-Jacobian product, v_K = seed
        output: `out` = the program's output on the query set at W_K; with a seed of its shape: its
            vector-Jacobian product
        loss: `loss` = the query loss, `scale` times its gradient
        curvature: the gradient of <grad_loss, loss> + <seed, gradient of the loss> on the query set
    params: in the order of problem.names, [*shape] or [T, *shape]
    lr: [K, S], S is 1, the number of parameters, or P
    want: of "out", "loss", "params", "lr", "x_s", "x_q": what is to be computed
    per_task: is the loss [T] rather than a sum over tasks []; gradients of params and lr have a row for each
        task where it or `own` is set
    """

    problem: "Problem"
    tail: Literal["weights", "output", "loss", "curvature"]
    params: list[Tensor]
    want: frozenset[str]
    support: Examples | None = None
    query: Examples | None = None
    lr: Tensor | None = None
    steps: int = 0
    first_order: bool = False
    rule: tuple[float, ...] = ()  # of fastmaml.SGD; empty: plain descent
    step_weights: tuple[float, ...] = ()
    checkpoint_every: int = 0  # 0: keep every W_k
    seed: Tensor | None = None
    grad_loss: Tensor | None = None
    scale: float = 1.0
    per_task: bool = False
    factored: tuple[int, ...] = ()  # places of the weights that stay factors
    precision: str | None = None  # see precision.py

    @property
    def like(self) -> Tensor:
        """Of the dtype and device of the call, [T, n, ..]."""
        examples = self.support or self.query
        assert examples is not None
        return examples.x

    @property
    def own(self) -> tuple[bool, ...]:
        """Which parameters each task has one of."""
        pairs = zip(self.params, self.problem.shapes, strict=True)
        return tuple([p.dim() > len(shape) for p, shape in pairs])

    @property
    def rows(self) -> int:
        """Of the gradients by params and lr: T or 1."""
        return self.like.shape[0] if self.per_task or any(self.own) else 1


@dataclass(slots=True)
class Result:
    """What was wanted; None elsewhere.

    out [T, P] or [T, n, *output]; loss [T] or []; params [T or 1, P]; lr [T or 1, K, S]; x_s, x_q as x
    """

    out: Tensor | None = None
    loss: Tensor | None = None
    params: Tensor | None = None
    lr: Tensor | None = None
    x_s: Tensor | None = None
    x_q: Tensor | None = None


@dataclass(frozen=True)
class Functions:
    """The functions of a backend, as backends/cpu.py has them, over one `run`."""

    run: Callable[[Request], Result] = field(repr=False)
    precision: str | None = None

    def apply(self, problem, params, x):
        return self._run(problem, "output", params, {"out"}, query=Examples(x)).out

    def apply_backward(self, problem, params, x, grad_out, *, needs):
        want = {"params": "params", "x": "x_q"}
        r = self._run(problem, "output", params, _wanted(want, needs), query=Examples(x), seed=grad_out)
        return r.params, r.x_q

    def value_and_grad(self, problem, params, x, y):
        r = self._run(problem, "loss", params, {"loss", "params"}, query=Examples(x, *y), per_task=True)
        return r.loss, r.params

    def value_and_grad_backward(self, problem, params, x, y, grad_loss, v, *, needs, per_task=False):
        r = self._run(
            problem, "curvature", params, _wanted({"params": "params", "x": "x_q"}, needs),
            query=Examples(x, *y), seed=v, grad_loss=grad_loss, per_task=per_task,
        )  # fmt: skip
        return r.params, r.x_q

    def inner_loop(self, problem, params, lr, x, y, *, steps, rule=()):
        how = {"support": Examples(x, *y), "lr": lr, "steps": steps, "rule": rule}
        return self._run(problem, "weights", params, {"out"}, **how).out

    def inner_loop_backward(
        self, problem, params, lr, x, y, v, *, steps, first_order, checkpoint_every, needs, rule=()
    ):
        r = self._run(
            problem, "weights", params, _wanted({"params": "params", "lr": "lr", "x": "x_s"}, needs),
            support=Examples(x, *y), lr=lr, steps=steps, first_order=first_order, rule=rule,
            checkpoint_every=checkpoint_every or 0, seed=v,
        )  # fmt: skip
        return r.params, _summed(r.lr, False), r.x_s

    def meta_loss(
        self, problem, params, lr, support, query,
        *, steps, first_order, rule=(), step_weights=(), checkpoint_every, per_task, scale, needs,
        factored=(),
    ):  # fmt: skip
        (x_s, y_s), (x_q, y_q) = support, query
        want = {"params": "params", "lr": "lr", "x_s": "x_s", "x_q": "x_q"}
        r = self._run(
            problem, "loss", params, _wanted(want, needs) | {"loss"},
            support=Examples(x_s, *y_s), query=Examples(x_q, *y_q), lr=lr, steps=steps,
            first_order=first_order, rule=rule, step_weights=tuple(step_weights),
            checkpoint_every=checkpoint_every or 0, per_task=per_task, scale=scale, factored=tuple(factored),
        )  # fmt: skip
        return r.loss, r.params, _summed(r.lr, per_task), r.x_s, r.x_q

    def _run(self, problem, tail, params, want, **how) -> Result:
        want = frozenset(want if how.get("steps") else set(want) - {"lr"})
        params = [p.contiguous() for p in params]
        for name in ("seed", "grad_loss", "lr"):
            if (a := how.get(name)) is not None:
                how[name] = a.contiguous()
        for name in ("support", "query"):
            if name in how:
                how[name] = how[name].contiguous()
        return self.run(Request(problem, tail, params, want, precision=self.precision, **how))


def _wanted(names: dict[str, str], needs: frozenset[str]) -> set[str]:
    return {name for need, name in names.items() if need in needs}


def _summed(grad_lr: Tensor | None, per_task: bool) -> Tensor | None:
    """[1, K, S] unless a row per task is wanted."""
    return grad_lr if grad_lr is None or per_task or len(grad_lr) == 1 else grad_lr.sum(0, keepdim=True)


def flat_parameters(request: Request, places: Sequence[Any], flat: Tensor) -> None:
    """The parameters into `flat`, zeros [T, P], or [1, P] where tasks share all.

    places: (shape, stride, offset) of each, as in Problem.strided; None leaves one out
    """
    rows, P = flat.shape
    for p, place in zip(request.params, places, strict=True):
        if place is not None:
            shape, stride, at = place
            flat.as_strided((rows, *shape), (P, *stride), at).copy_(p)
