"""What is measured: networks, sizes and data of the meta-steps."""

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

Examples = tuple[Tensor, Tensor]  # x [T, N, ...], y [T, N, ...]


@dataclass(frozen=True)
class Case:
    """One meta-step: `steps` SGD steps on `support` examples of each task, then its `query` examples."""

    name: str
    group: str
    widths: tuple[int, ...]  # of the MLP, input first
    loss: str  # "mse" | "cross_entropy"
    tasks: int
    support: int
    query: int
    steps: int
    lr: float
    batch_norm: bool = False

    @cached_property
    def flops(self) -> int:
        """9 forwards per support example and step, 3 per query example; a forward is 2 flops a weight."""
        weights = sum(i * o for i, o in zip(self.widths, self.widths[1:], strict=False))
        return 2 * weights * self.tasks * (9 * self.support * self.steps + 3 * self.query)

    def model(self, dtype: torch.dtype = torch.float32) -> nn.Sequential:
        """The network with weights from a fixed seed; float64 holds the very numbers of float32."""
        layers: list[nn.Module] = []
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            for i, (n_in, n_out) in enumerate(zip(self.widths, self.widths[1:], strict=False)):
                layers.append(nn.Linear(n_in, n_out))
                if i < len(self.widths) - 2:
                    # without running statistics, as torch.func asks for under vmap
                    layers += [nn.BatchNorm1d(n_out, track_running_stats=False)] if self.batch_norm else []
                    layers.append(nn.ReLU())
        return nn.Sequential(*layers).to(dtype)

    def data(self, dtype: torch.dtype = torch.float32) -> tuple[Examples, Examples]:
        """Support and query examples from a fixed seed."""
        make = {"sine": _sine, "mlp": _regression, "omniglot-mlp": _images, "wide": _images}[
            self.name.split("/")[0]
        ]
        x, y = make(self, torch.Generator().manual_seed(1))
        x, y = x.to(dtype), y.to(dtype) if y.is_floating_point() else y
        n = self.support
        support = x[:, :n].contiguous(), y[:, :n].contiguous()
        return support, (x[:, n:].contiguous(), y[:, n:].contiguous())


def _sine(case: Case, rng: torch.Generator) -> Examples:
    """Sine waves of random amplitude and phase (MAML paper, section 5.1)."""
    shape = (case.tasks, case.support + case.query, 1)
    x = torch.rand(shape, generator=rng) * 10 - 5
    amplitude = torch.rand(case.tasks, 1, 1, generator=rng) * 4.9 + 0.1
    phase = torch.rand(case.tasks, 1, 1, generator=rng) * math.pi
    return x, amplitude * torch.sin(x - phase)


def _regression(case: Case, rng: torch.Generator) -> Examples:
    shape = (case.tasks, case.support + case.query)
    x = torch.randn(*shape, case.widths[0], generator=rng)
    slope = torch.randn(case.tasks, case.widths[0], case.widths[-1], generator=rng) / case.widths[0] ** 0.5
    return x, torch.tanh(x @ slope)


def _images(case: Case, rng: torch.Generator) -> Examples:
    """Sparse random images, a prototype per class with a tenth of the pixels redrawn; classes in turn."""
    ways, pixels = case.widths[-1], case.widths[0]
    y = torch.arange(case.support + case.query) % ways  # [N + Q]
    prototypes = torch.rand(case.tasks, ways, pixels, generator=rng)
    noise = torch.rand(case.tasks, y.numel(), pixels, generator=rng)
    redrawn = torch.rand(case.tasks, y.numel(), pixels, generator=rng) < 0.1
    x = (torch.where(redrawn, noise, prototypes[:, y]) < 0.15).float()
    return x, y.expand(case.tasks, -1).contiguous()


_SINE = Case("sine/5-steps", "sine", (1, 40, 40, 1), "mse", 25, 10, 10, 5, 0.01)
_WIDE = Case("mlp/4x256", "sine", (8, 256, 256, 256, 256, 4), "mse", 25, 10, 10, 5, 0.01)
_PIXELS = (784, 256, 128, 64, 64, 5)
_POLICY = Case("mlp/policy", "policy", (17, 100, 100, 6), "mse", 40, 20, 20, 5, 0.1)
_BROAD = Case("wide/1024", "wide", (1024, 1024, 1024, 5), "cross_entropy", 32, 5, 75, 5, 0.01)
_OMNIGLOT = Case("omniglot-mlp/1-step", "omniglot-mlp", _PIXELS, "cross_entropy", 32, 5, 75, 1, 0.1, True)

CASES = (
    _SINE,
    replace(_SINE, name="sine/1-step", steps=1),
    replace(_SINE, name="sine/small", group="small", widths=(1, 32, 32, 1)),
    replace(_SINE, name="sine/T1000", tasks=1000),
    _WIDE,
    _POLICY,
    _OMNIGLOT,
    replace(_OMNIGLOT, name="omniglot-mlp/5-steps", steps=5),
    replace(
        _OMNIGLOT, name="omniglot-mlp/20w5s", widths=(*_PIXELS[:-1], 20), support=100, query=300, steps=5
    ),
    _BROAD,
    replace(_BROAD, name="wide/4096", widths=(4096, 4096, 4096, 5)),
)


def select(names: list[str]) -> list[Case]:
    """Cases by their own name or their group's, in the order of the table; all of them if none is named."""
    known = {c.name for c in CASES} | {c.group for c in CASES}
    if unknown := [n for n in names if n not in known]:
        raise SystemExit(f"unknown case {unknown[0]!r}; known: {', '.join(sorted(known))}")
    return [c for c in CASES if not names or c.name in names or c.group in names]
