"""Peak memory of one meta-step by its number of inner steps: `python -m bench.memory [CASE ..]`.

Every figure is measured in a process of its own: after a small meta-step has loaded all code and started all
threads, how far resident memory rises above where it stood before the step.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from bench import machine
from bench.meta_step import RIGHT

ROOT = Path(__file__).parents[1]
MIB = 2**20
CASES = ["omniglot-mlp/5-steps", "mlp/4x256", "wide/1024"]
STEPS = [1, 5, 20, 50]
CHECKED_STEPS = 5  # of the check in float64, which has 2 tasks
# Every block over 64 KiB comes from the system and goes back to it: what is measured is memory in use, not
# what the allocator holds back from before. Threads that wait do so asleep: time is not measured, and
# spinning on a busy machine costs minutes.
SETTINGS = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_TOP_PAD_": "0",
    "MALLOC_MMAP_MAX_": "60000",
}


def _fastmaml(backend: str, checkpoint: bool = False) -> Callable[[Any, Any], Callable[[], list]]:
    def build(case: Any, dtype: Any) -> Callable[[], list]:
        from fastmaml import functional

        model, (support, query) = case.model(dtype), case.data(dtype)
        params = dict(model.named_parameters())
        every = round(case.steps**0.5) if checkpoint else None

        def step() -> list:
            _, grads = functional.meta_value_and_grad(
                model, params, support, query,
                loss=case.loss, lr=case.lr, steps=case.steps, backend=backend, checkpoint_every=every,
            )  # fmt: skip
            return list(grads.values())

        return step

    return build


def _peer(name: str) -> Callable[[Any, Any], Callable]:
    def build(case: Any, dtype: Any) -> Callable:
        from bench import peers

        return peers.PEERS[name](case, dtype)

    return build


# These compile in their first call: the peak of the second is measured, above what there was before the
# first. It holds what compiling left behind, and what they keep from call to call.
COMPILED = ("compile", "jax")
PEERS: dict[str, Callable[[Any, Any], Callable]] = {
    "fastmaml": _fastmaml("cpu"),
    "fastmaml-checkpoint": _fastmaml("cpu", checkpoint=True),  # checkpoint_every is the root of the steps
    "fastmaml-torch": _fastmaml("torch"),
    "fastmaml-torch-checkpoint": _fastmaml("torch", checkpoint=True),
    "grad-vmap": _peer("grad-vmap"),
    "vmap-grad": _peer("vmap-grad"),
    "loop": _peer("loop"),
    "compile": _peer("compile"),
    "jax": _peer("jax"),
}


def _status(key: str) -> int | None:
    """Bytes, from /proc/self/status; None where there is no such thing."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(key + ":")), None)


def _high_water() -> int:
    return _status("VmHWM") or 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _reset_high_water() -> str:
    """Lower the high-water mark to what is resident now, where the kernel can; says what is measured."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return "VmHWM, reset before the step"
    except OSError:
        return "ru_maxrss"


def _limit(limit: int) -> None:
    """Let an allocation that would exhaust the machine fail in this process."""
    most = (_status("VmSize") or 0) + limit
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def _available() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def measure_one(peer: str, name: str, steps: int, limit: int) -> dict[str, Any]:
    """In this process: peak growth in bytes of one meta-step."""
    import torch

    from bench import cases, peers

    case = replace(cases.select([name])[0], steps=steps)
    build = PEERS[peer]
    widths = tuple(min(w, 16) for w in case.widths)
    tiny = replace(case, widths=widths, tasks=2 * torch.get_num_threads(), steps=2, query=case.support)
    try:
        build(tiny, torch.float32)()
        torch.randn(256, 256).mm(torch.randn(256, 256))  # the work space of the product
        step = build(case, torch.float32)
        before = _status("VmRSS") or _high_water()
        if peer in COMPILED:
            step()
        _limit(limit)
        how = _reset_high_water()
        found = step()
        peak = _high_water()
    except peers.Absent as absent:
        return {"absent": str(absent)}
    except (RuntimeError, MemoryError) as error:
        return {"absent": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"}
    return {"bytes": peak - before, "before": before, "gradients": len(found), "how": how}


def _child(seconds: float, *args: Any) -> dict[str, Any]:
    command = [sys.executable, "-m", "bench.memory", "--child", *map(str, args)]
    how: dict[str, Any] = {"cwd": ROOT, "env": os.environ | SETTINGS, "timeout": seconds}
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, **how)
    except subprocess.TimeoutExpired:
        return {"absent": f"not done after {seconds:.0f} s"}
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return {"absent": f"exit status {done.returncode}: {last}"}
    return json.loads(done.stdout.splitlines()[-1])


def floor(case: Any, threads: int) -> dict[str, int]:
    """Bytes of what a step adds where all of it is kept: its weights, and activations of the support set.

    The cpu backend keeps these for each thread, one task at a time; what runs all tasks at once keeps them
    for each task. Activations: x and each layer's output, and the gradient of each.
    """
    outputs = [case.widths[0]]
    for width in case.widths[1:-1]:
        outputs += [width] * (3 if case.batch_norm else 2)  # linear, BatchNorm, relu
    activations = 2 * case.support * (sum(outputs) + case.widths[-1])
    weights = sum(p.numel() for p in case.model().parameters())
    return {
        "weights": 4 * weights,
        "activations": 4 * activations,
        "per_thread": 4 * (weights + activations),
        "all_threads": 4 * threads * (weights + activations),
        "all_tasks": 4 * case.tasks * (weights + activations),
    }


def _error(peer: str, case: Any) -> float:
    """Of the meta-gradient in float64, on few tasks and steps."""
    import torch

    from bench import measure, peers

    few = replace(case, tasks=2, steps=CHECKED_STEPS)
    return measure.error(PEERS[peer](few, torch.float64)(), peers.reference(few))


def _print_head(case: Any, steps: list[int]) -> None:
    print(
        f"\n{case.name}: {'-'.join(map(str, case.widths))}{' BatchNorm' if case.batch_norm else ''},"
        f" T={case.tasks} N={case.support} Q={case.query}\n"
        f"peak MiB of one meta-step, by inner steps K\n{'':26}"
        + "".join(f"{f'K={k}':>10}" for k in steps)
        + f"{'MiB per added step':>22}"
    )


def _print_row(name: str, row: dict[str, Any], steps: list[int]) -> None:
    cells = [row["steps"][str(k)] for k in steps]
    text = "".join(f"{c['bytes'] / MIB:10.1f}" if "bytes" in c else f"{'absent':>10}" for c in cells)
    slope = f"{row['bytes_per_step'] / MIB:22.3f}" if "bytes_per_step" in row else f"{'':22}"
    print(f"{name:26}{text}{slope}{'  WRONG' if row['wrong'] else ''}", flush=True)
    for why in dict.fromkeys(c["absent"] for c in cells if "absent" in c):
        print(f"{'':26}absent: {why}", flush=True)


def _print_floor(least: dict[str, int]) -> None:
    print(
        f"weights + one set of activations: {least['weights'] / MIB:.3f} +"
        f" {least['activations'] / MIB:.3f} MiB; {least['all_threads'] / MIB:.3f} MiB for all threads,"
        f" {least['all_tasks'] / MIB:.1f} MiB for all tasks",
        flush=True,
    )


def _row(peer: str, case: Any, steps: list[int], seconds: float, limit: int) -> dict[str, Any]:
    row: dict[str, Any] = {"steps": {str(k): _child(seconds, peer, case.name, k, limit) for k in steps}}
    found = [(k, row["steps"][str(k)]["bytes"]) for k in steps if "bytes" in row["steps"][str(k)]]
    if len(found) > 1:
        (first, low), (last, high) = found[0], found[-1]
        row["bytes_per_step"] = (high - low) / (last - first)
    try:
        row["error_f64"] = _error(peer, case)
    except Exception as error:  # its cells say why it is absent
        row["error"] = f"{type(error).__name__}: {error}"
    row["wrong"] = "error_f64" in row and not row["error_f64"] <= RIGHT
    return row


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.memory", description=__doc__)
    parser.add_argument("cases", nargs="*", default=CASES, help=f"default: {' '.join(CASES)}")
    parser.add_argument("--steps", default=",".join(map(str, STEPS)), help="inner steps, by comma")
    eager = ",".join(name for name in PEERS if name not in COMPILED)
    parser.add_argument(
        "--only",
        default=eager,
        help=f"which to measure, by comma (default: all but {' and '.join(COMPILED)})",
    )
    parser.add_argument("--threads", type=int, default=0, help="cores the processes may use (default: all)")
    parser.add_argument(
        "--seconds", type=float, default=180.0, help="longest for a measurement (default 180)"
    )
    parser.add_argument("--output", type=Path, help="JSON file (default: a new one in bench/results)")
    return parser.parse_args()


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        peer, case, steps, limit = sys.argv[2:]
        print(json.dumps(measure_one(peer, case, int(steps), int(limit))))
        return
    args = _arguments()
    if args.threads:
        machine.limit_threads(args.threads)
    import torch

    from bench import cases

    names, steps = args.only.split(","), sorted({int(k) for k in args.steps.split(",")})
    if unknown := [n for n in names if n not in PEERS]:
        raise SystemExit(f"unknown peer {unknown[0]!r}; known: {', '.join(PEERS)}")
    limit = _available() * 3 // 4
    report: dict[str, Any] = {
        "machine": machine.describe(),
        "limit": limit,
        "settings": SETTINGS,
        "cases": {},
    }
    path = args.output or machine.result_path("memory")
    for case in cases.select(args.cases):
        least = floor(case, torch.get_num_threads())
        rows: dict[str, dict[str, Any]] = {}
        report["cases"][case.name] = {"case": asdict(case), "floor_bytes": least, "peers": rows}
        _print_head(case, steps)
        for name in names:
            rows[name] = _row(name, case, steps, args.seconds, limit)
            _print_row(name, rows[name], steps)
            path.write_text(json.dumps(report, indent=1) + "\n")  # each row, for a run that is cut short
        _print_floor(least)
    print(f"saved {path}")


if __name__ == "__main__":
    main()
