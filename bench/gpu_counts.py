"""Launches, operations and bytes of a meta-step on a GPU, found without one: `python -m bench.gpu_counts`.

For each network: what the `triton` backend would launch, with the layers factored that it would keep so, and
`cuda`, in its emulation; what eager grad(vmap) dispatches counted alike, the operations of the products, the
bytes that launches move against those that must be moved, and two floors by datasheets: operations over the
peak, and bytes over the bandwidth. No time is predicted: a floor is what no implementation of these counts
can beat.
"""

import argparse
import os
from pathlib import Path
from typing import Any

os.environ["FASTMAML_EMULATE"] = "1"  # read when fastmaml is imported

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastmaml.backends import cuda, why_not
from fastmaml.backends.request import Request, Result

from .cases import Case, select
from .gpu_launches import Launches, call, is_work, meta_step
from .gpu_static import MODELS, markdown
from .peers import grad_vmap

# float32 and TF32 [TFLOP/s, dense], memory [TB/s]: datasheets of the SXM parts (A100 80 GB, H100, HGX B200)
DEVICES = {"A100": (19.5, 156.0, 2.04), "H100": (67.0, 494.0, 3.35), "B200": (75.0, 1100.0, 7.7)}


class _Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.ops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops += is_work(func)
        return func(*args, **(kwargs or {}))


def eager_ops(case: Case) -> int:
    """What grad(vmap(..)) dispatches that would launch a kernel."""
    step = grad_vmap(case, torch.float32)
    step()
    with _Count() as count:
        step()
    return count.ops


def cuda_launches(case: Case) -> str:
    """By the `cuda` backend in its emulation: of its kernels, and what torch would launch besides."""
    if why := cuda.available():
        raise SystemExit(why)
    found = []

    def run(request: Request) -> Result:
        x, sizes = request.like, cuda.Sizes(case.support, case.query)
        if why_not("cuda", request.problem, x.device, x.dtype, sizes):
            found.append("does not fit")
            return Result()
        before = cuda._library().fastmaml_cuda_launches()
        with _Count() as count:
            result = cuda.run(request)
        found.append(f"{cuda._library().fastmaml_cuda_launches() - before} + {count.ops}")
        return result

    call(case, torch.float32, "cuda", run)
    return found[0]


def least_bytes(case: Case) -> int:
    """The parameters, the examples and the gradient, once each: what any implementation reads and writes."""
    parameters = sum(p.numel() for p in case.model().parameters())
    examples = sum(a.numel() * a.element_size() for pair in case.data() for a in pair)
    return 2 * 4 * parameters + examples


def launches_of_a_layer(case: Case, step: Launches) -> str:
    """Launches, torch's too, for each linear or norm layer and pass over the network, at most 2 being the
    aim."""
    if len(step.names) == 1:
        return "all in one"
    layers = sum(type(m).__name__ in ("Linear", "BatchNorm1d") for m in case.model().modules())
    passes = 2 * (
        2 * case.steps + 1
    )  # forward and backward, plain and dual in each step, plain for the query
    losses = 2 * case.steps + 1
    return f"{(len(step.names) + step.torch_ops - losses) / (layers * passes):.2f}"


def row(case: Case) -> list[str]:
    step = meta_step(case)
    least = least_bytes(case)
    floors = [
        f"{1e6 * step.flops / fp32 / 1e12:.1f} / {1e6 * step.flops / tf32 / 1e12:.2f} / "
        f"{1e6 * step.bytes / memory / 1e12:.1f}"
        for fp32, tf32, memory in DEVICES.values()
    ]
    return [
        case.name, str(step.factored), str(len(step.names)), str(step.torch_ops),
        launches_of_a_layer(case, step), cuda_launches(case), str(eager_ops(case)),
        f"{step.flops / 1e6:.1f}", f"{step.bytes / 2**20:.1f}", f"{least / 2**20:.2f}", *floors,
    ]  # fmt: skip


HEADER = [
    "case", "factored layers", "kernels", "torch ops besides", "launches a layer and pass", "`cuda`",
    "eager grad(vmap) ops", "MFLOP", "MiB moved", "MiB at least",
    *[f"{name} floors [us]" for name in DEVICES],
]  # fmt: skip


def table(cases: list[Case]) -> str:
    lines: list[Any] = [
        "# Counts of a second-order meta-step",
        "",
        "By `python -m bench.gpu_counts`. Kernels and torch ops: launches of the `triton` backend, all in",
        "one CUDA graph, with those layers' weights factored that it would keep so. `cuda`: launches of",
        "that backend where a network fits, counted in its emulation, and torch ops besides. MiB moved:",
        "every tensor of a launch once. Floors: float32 operations / TF32 operations / bytes moved.",
        "Nothing here was run on a GPU.",
        "",
        markdown(HEADER, [row(case) for case in cases]),
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_counts", description=__doc__)
    parser.add_argument("cases", nargs="*", default=list(MODELS))
    parser.add_argument("--out", type=Path, help="where to write the table")
    args = parser.parse_args()
    text = table(select(args.cases))
    print(text)
    if args.out:
        args.out.write_text(text)


if __name__ == "__main__":
    main()
