"""Shows that grad(vmap(task)) gives wrong meta-gradients through LayerNorm and BatchNorm: python docs/why.py

For each model, two gradients that contain second derivatives, in float64, by four routes:

    meta-gradient   d/dW mean_t L_q,t(W - lr dL_s,t/dW)
    HVP             d/dW mean_t <dL_s,t/dW, v>

    truth   central finite differences of the scalar being differentiated
    loop    torch.func.grad of a Python loop over the tasks
    vmap    torch.func.grad of torch.func.vmap over the tasks, the usual way to do all at once
    fast    fastmaml.functional

The differences are evaluated by the loop, and use first derivatives alone.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from fastmaml import functional

TASKS, EXAMPLES, LR = 2, 5, 0.1
Params = dict[str, Tensor]

MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "LayerNorm": (lambda: _mlp(nn.LayerNorm(4)), (3,)),
    "BatchNorm1d": (lambda: _mlp(nn.BatchNorm1d(4, track_running_stats=False)), (3,)),
    "conv + BatchNorm2d": (lambda: _conv(nn.BatchNorm2d(2, track_running_stats=False)), (1, 3, 3)),
    "conv + GroupNorm": (lambda: _conv(nn.GroupNorm(1, 2)), (1, 3, 3)),
}


def _mlp(norm: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), norm, nn.Tanh(), nn.Linear(4, 2))


def _conv(norm: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 2), norm, nn.Tanh(), nn.Flatten(), nn.Linear(8, 2))


class Problem:
    """One of MODELS with weights, a direction v and a support and a query set for every task."""

    def __init__(self, name: str) -> None:
        torch.manual_seed(0)
        build, example = MODELS[name]
        self.has_kernels = not name.startswith("conv")
        self.model = build().double()
        self.params = {n: p.detach() for n, p in self.model.named_parameters()}
        self.v = {n: torch.randn_like(p) for n, p in self.params.items()}
        x = torch.randn(2, TASKS, EXAMPLES, *example, dtype=torch.float64)
        y = torch.randn(2, TASKS, EXAMPLES, 2, dtype=torch.float64)
        self.support, self.query = (x[0], y[0]), (x[1], y[1])

    def loss(self, params: Params, x: Tensor, y: Tensor) -> Tensor:
        """Of one task."""
        return nn.functional.mse_loss(functional_call(self.model, params, (x,)), y)

    def meta_loss(self, params: Params, x_s: Tensor, y_s: Tensor, x_q: Tensor, y_q: Tensor) -> Tensor:
        """Of one task: the query loss after one step on the support set."""
        g = grad(self.loss)(params, x_s, y_s)
        return self.loss({n: p - LR * g[n] for n, p in params.items()}, x_q, y_q)

    def slope(self, params: Params, x: Tensor, y: Tensor) -> Tensor:
        """<g, v> of one task, whose gradient is H v."""
        g = grad(self.loss)(params, x, y)
        return torch.stack([(g[n] * self.v[n]).sum() for n in g]).sum()

    def gradients(self, what: str) -> dict[str, Tensor]:
        """The "meta-gradient" or the "HVP" by each route, flat: {route: [P]}."""
        meta = what == "meta-gradient"
        task = self.meta_loss if meta else self.slope
        data = (*self.support, *self.query) if meta else self.support

        def loop(params: Params) -> Tensor:
            return torch.stack([task(params, *(d[t] for d in data)) for t in range(TASKS)]).mean()

        def at_once(params: Params) -> Tensor:
            return vmap(partial(task, params))(*data).mean()

        return {
            "truth": finite_differences(loop, self.params),
            "loop": _flat(grad(loop)(self.params)),
            "vmap": _flat(grad(at_once)(self.params)),
            "fast": self._fast(meta),
        }

    def _fast(self, meta: bool) -> Tensor:
        backend = None if self.has_kernels else "torch"
        if not meta:
            products = functional.hvp(
                self.model, self.params, self.v, *self.support, loss="mse", backend=backend
            )
            return _flat({n: h.mean(0) for n, h in products.items()})
        params = {n: p.clone().requires_grad_() for n, p in self.params.items()}
        functional.meta_loss(
            self.model, params, self.support, self.query, loss="mse", lr=LR, steps=1, backend=backend
        ).backward()
        return _flat({n: p.grad for n, p in params.items() if p.grad is not None})


def finite_differences(f: Callable[[Params], Tensor], params: Params, step: float = 1e-5) -> Tensor:
    """df/dW [P] by central differences, one element after another."""
    slopes = []
    for name, p in params.items():
        for i in range(p.numel()):
            bump = torch.zeros_like(p).view(-1)
            bump[i] = step
            up, down = (f(params | {name: p + s * bump.view_as(p)}) for s in (1, -1))
            slopes.append((up - down) / (2 * step))
    return torch.stack(slopes)


def relative_error(value: Tensor, truth: Tensor) -> float:
    return ((value - truth).norm() / truth.norm()).item()


def _flat(tensors: Params) -> Tensor:
    return torch.cat([t.detach().reshape(-1) for t in tensors.values()])


def main() -> None:
    torch.set_num_threads(1)  # the tensors are tiny
    print(
        f"torch {torch.__version__}, float64: the element that vmap misses most, and the error of the whole"
    )
    for name in MODELS:
        for what in ("meta-gradient", "HVP"):
            routes = Problem(name).gradients(what)
            truth = routes["truth"]
            worst = (routes["vmap"] - truth).abs().argmax()
            print(f"\n{name}: {what}")
            for route, value in routes.items():
                error = "" if route == "truth" else f"{relative_error(value, truth):12.1e}"
                print(f"  {route:6}{value[worst]:14.9f}{error}")


if __name__ == "__main__":
    main()
