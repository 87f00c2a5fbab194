"""Second-order meta-gradients on a GPU against the peers, interleaved: `make gpu`, or `python -m bench.gpu`.

Writes bench/results/gpu-<device>.json and prints the table. Without a CUDA device it says so and fails.
"""

import argparse
import json
import re
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from . import machine, measure, peers
from .cases import CASES, Case, Examples, select
from .meta_step import FLOAT32_GROSS, RIGHT

METHODS: dict[str, Callable[[Case, torch.dtype], peers.Step]] = {
    "fastmaml cuda": peers.fastmaml_on("cuda"),
    "fastmaml triton": peers.fastmaml_on("triton"),
    "fastmaml torch": peers.fastmaml_on("torch"),
    **{name: peers.PEERS[name] for name in ("grad-vmap", "vmap-grad", "compile", "loop", "higher", "jax")},
}


class OnGpu(Case):
    """The same case with its model and data on the GPU."""

    def model(self, dtype: torch.dtype = torch.float32) -> nn.Sequential:
        return super().model(dtype).to("cuda")

    def data(self, dtype: torch.dtype = torch.float32) -> tuple[Examples, Examples]:
        (x_s, y_s), (x_q, y_q) = super().data(dtype)
        return (x_s.cuda(), y_s.cuda()), (x_q.cuda(), y_q.cuda())


def finished(step: peers.Step) -> peers.Step:
    """A step whose results are there when it returns."""

    def run() -> Any:
        result = step()
        torch.cuda.synchronize()
        return result

    return run


def on_cpu(gradients: Any) -> list[Any]:
    return [g.detach().cpu() if isinstance(g, Tensor) else g for g in gradients]


def peak_flops() -> float:
    """Operations a second of torch's float32 product of two 8192 x 8192 matrices, as the yardstick."""
    a, b = torch.randn(2, 8192, 8192, device="cuda").unbind()
    run = finished(lambda: [torch.mm(a, b)])
    run()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return 2 * 8192**3 / statistics.median(times)


def compare(case: Case, seconds: float) -> dict[str, Any]:
    there = OnGpu(**asdict(case))
    truth = peers.reference(case)
    rows: dict[str, dict[str, Any]] = {}
    steps: dict[str, peers.Step] = {}
    for name, build in METHODS.items():
        start = time.perf_counter()
        try:
            step = finished(build(there, torch.float32))
            step()
            rows[name] = {"first_call_s": time.perf_counter() - start}
            rows[name]["error_f64"] = measure.error(on_cpu(build(there, torch.float64)()), truth)
            rows[name]["error_f32"] = measure.error(on_cpu(step()), truth)
        except Exception as error:  # a peer that is absent or breaks must not take the others with it
            rows[name] = {"absent": peers.absence(name, error)}
            continue
        rows[name]["wrong"] = not rows[name]["error_f64"] <= RIGHT
        if name.startswith("fastmaml") and (
            rows[name]["wrong"] or not rows[name]["error_f32"] <= FLOAT32_GROSS
        ):
            raise SystemExit(f"{case.name}: {name} is off the reference, nothing is timed: {rows[name]}")
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        peak = (torch.cuda.max_memory_allocated() - before) / 2**20
        rows[name]["peak_MiB"] = None if name == "jax" else peak  # it has an allocator of its own
        steps[name] = step
    times = measure.interleave(steps, seconds)
    for name, taken in times.items():
        rows[name] |= taken.summary() | {"gflops": case.flops / taken.median / 1e9}
    return {"case": asdict(case), "flops": case.flops, "rows": rows}


def show(name: str, result: dict[str, Any]) -> None:
    rows = result["rows"]
    ours = [r["median_ms"] for n, r in rows.items() if n.startswith("fastmaml") and "median_ms" in r]
    print(
        f"\n{name}\n{'':17}{'median ms':>10}{'x best':>8}{'peak MiB':>10}{'f64':>10}{'f32':>10}{'first s':>9}"
    )
    for method, row in rows.items():
        if "absent" in row:
            print(f"{method:17} absent: {row['absent']}")
            continue
        ratio = f"{row['median_ms'] / min(ours):8.2f}" if ours else f"{'':8}"
        peak = f"{'':10}" if row["peak_MiB"] is None else f"{row['peak_MiB']:10.1f}"
        print(
            f"{method:17}{row['median_ms']:10.3f}{ratio}{peak}{row['error_f64']:10.1e}"
            f"{row['error_f32']:10.1e}{row['first_call_s']:9.2f}{'  WRONG' if row['wrong'] else ''}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("cases", nargs="*", help="cases or groups; default all")
    parser.add_argument(
        "--seconds", type=float, default=2.0, help="time for each method and case (default 2)"
    )
    parser.add_argument("--check", action="store_true", help="only say whether there is a CUDA device")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no CUDA device here: nothing was tested or measured on a GPU")
    device = torch.cuda.get_device_name()
    print(f"{device}, torch {torch.__version__}")
    if args.check:
        return
    chosen = select(args.cases) if args.cases else list(CASES)
    peers.import_libraries()  # else the first call of the first case would hold the import
    report = {"machine": machine.describe() | {"gpu": device}, "mm_flops": peak_flops(), "cases": {}}
    for case in chosen:
        report["cases"][case.name] = compare(case, args.seconds)
        show(case.name, report["cases"][case.name])
    path = machine.RESULTS / f"gpu-{re.sub('[^a-z0-9]+', '-', device.lower()).strip('-')}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(f"saved {path}")


if __name__ == "__main__":
    main()
