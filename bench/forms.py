"""Dense against factored fast weights, and the automatic choice: `python -m bench.forms`.

Three layers, w-w-w-5, on a grid of inner steps, support examples, widths and tasks (15 query examples). Every
form of the two wide layers is timed, in turns of random order; the chosen one is held against the best. Where
it is more than a tenth slower all are timed again, for five times as long. `--picture FILE` draws time and
memory instead.
"""

import argparse
import itertools
import json
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from bench import machine, memory
from bench.cases import Case
from fastmaml import functional
from fastmaml.backends import factored_weights, prepare

STEPS, SHOTS, TASKS = (1, 5, 20, 50), (1, 5, 25, 100), (1, 32, 256)
WIDTHS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
QUERIES = 15
LONG = 1.0  # seconds a call
WEIGHTS = ("0.weight", "2.weight", "4.weight")
FORMS: dict[str, Any] = {
    "dense": "dense",
    "first": {"0.weight": "factored", "2.weight": "dense", "4.weight": "dense"},
    "second": {"0.weight": "dense", "2.weight": "factored", "4.weight": "dense"},
    "both": {"0.weight": "factored", "2.weight": "factored", "4.weight": "dense"},
    "factored": "factored",
}


def case(width: int, tasks: int, shots: int, steps: int) -> Case:
    widths = (width, width, width, 5)
    return Case("wide/forms", "wide", widths, "cross_entropy", tasks, shots, QUERIES, steps, 0.01)


def most_flops(c: Case) -> float:
    """Of the slower form: dense, or thin products of 4 N K (I + O) ((K - 1) N + Q) a layer."""
    w, N, K = c.widths[0], c.support, c.steps
    thin = 2 * 4 * N * K * 2 * w * ((K - 1) * N + c.query)
    return c.flops + 2 * c.tasks * thin


def step(c: Case, form: Any) -> Any:
    model = c.model()
    params, (support, query) = dict(model.named_parameters()), c.data()
    how = {"loss": c.loss, "lr": c.lr, "steps": c.steps, "backend": "cpu", "fast_weights": form}
    return lambda: functional.meta_value_and_grad(model, params, support, query, **how)


def chosen(c: Case) -> str:
    """The name of the form that fast_weights=None takes, up to the last layer's where no other has it."""
    problem, _ = prepare(c.model(), (c.widths[0],), c.loss, torch.device("cpu"), torch.float32, "cpu")
    sizes = c.tasks, c.support, c.query, c.steps, 1, False
    own = (False,) * len(problem.names)

    def weights(form: Any) -> tuple[int, ...]:
        return factored_weights(problem, "cpu", sizes, own, 1, form)

    wide = [problem.names.index(w) for w in WEIGHTS[:2]]
    names = {weights(form): name for name, form in FORMS.items()}
    automatic = weights(None)
    return names.get(automatic) or names[tuple(w for w in automatic if w in wide)]


def _seconds(call: Any) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(c: Case, forms: dict[str, Any], seconds: float) -> dict[str, float]:
    """Median seconds of a meta-step in each form, in turns; one time of a form of three times the least."""
    rng = random.Random(0)
    steps = {name: step(c, form) for name, form in forms.items()}
    first = {name: _seconds(call) for name, call in steps.items()}
    # a call of seconds has left its warm-up and most noise behind by its end
    times = {name: [first[name] if first[name] > LONG else _seconds(call)] for name, call in steps.items()}
    least = min(times.values())[0]
    order = [name for name in forms if times[name][0] < 3 * least]
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[order[0]]) < (2 if least > LONG else 4):
        for name in rng.sample(order, len(order)):
            if least < LONG:
                steps[name]()  # what another form has left in the caches is no part of this one's time
            times[name].append(_seconds(steps[name]))
    return {name: statistics.median(t) for name, t in times.items()}


def grid(args: argparse.Namespace) -> None:
    path = args.output or machine.result_path("forms")
    report: dict[str, Any] = {"machine": machine.describe(), "queries": QUERIES, "rows": [], "skipped": []}
    columns = "".join(f"{name:>10}" for name in FORMS)
    print(f"{'w':>5}{'T':>5}{'N':>5}{'K':>4}  {columns}  ms; chosen, over the best")
    for w, T, N, K in itertools.product(args.widths, TASKS, SHOTS, STEPS):
        c = case(w, T, N, K)
        where = {"width": w, "tasks": T, "shots": N, "steps": K}
        if not 1e9 * args.above < most_flops(c) <= 1e9 * args.gflop:
            report["skipped"].append(where)
            continue
        name, seconds = chosen(c), args.seconds
        times = measure(c, FORMS, seconds)
        if times[name] > 1.1 * min(times.values()):
            seconds *= 5
            times = measure(c, FORMS, seconds)
        over = times[name] / min(times.values())
        row = {"chosen": name, "seconds": times, "measured_for": seconds, "over_best": over}
        report["rows"].append({**where, **row})
        cells = "".join(f"{1e3 * t:10.2f}" for t in times.values())
        mark = "  <--" if over > 1.1 else ""
        print(f"{w:5}{T:5}{N:5}{K:4}  {cells}  {name:9}{over:6.2f}{mark}", flush=True)
        path.write_text(json.dumps(report, indent=1) + "\n")
    path.write_text(json.dumps(report, indent=1) + "\n")  # with what was left out behind the last of them
    ratios = sorted(r["over_best"] for r in report["rows"])
    if not ratios:
        raise SystemExit(f"all {len(report['skipped'])} points are left out")
    above = sum(r > 1.1 for r in ratios)
    print(
        f"{len(ratios)} points: the chosen over the best form: median {statistics.median(ratios):.3f}, worst"
        f" {ratios[-1]:.2f}, {above} above 1.10; {len(report['skipped'])} left out, over {args.gflop:g} GFLOP"
        + (f" or not over {args.above:g}" if args.above else "")
    )
    print(f"saved {path}")


def peak(width: int, shots: int, steps: int, form: str) -> float:
    """Peak MiB of one meta-step of 32 tasks, in a process of its own."""
    command = [sys.executable, "-m", "bench.forms", "--peak", str(width), str(shots), str(steps), form]
    env = {**memory.os.environ, **memory.SETTINGS}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env, cwd=memory.ROOT)
    return float(done.stdout.split()[-1]) / memory.MIB


def print_peak(width: int, shots: int, steps: int, form: str) -> None:
    step(case(16, 2 * torch.get_num_threads(), shots, 2), form)()
    call = step(case(width, 32, shots, steps), form)
    memory._reset_high_water()
    before = memory._status("VmRSS") or memory._high_water()
    call()
    print(memory._high_water() - before)


SWEEPS = {  # against what, and the sizes there
    "width": [(w, 5, 5) for w in (64, 128, 256, 512, 1024)],
    "inner steps": [(512, 5, k) for k in (1, 5, 10, 20)],
    "support examples": [(512, n, 5) for n in (1, 5, 10, 25)],
}


def picture(path: Path, seconds: float) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    fig, axes = plt.subplots(2, 3, figsize=(12, 6.5), constrained_layout=True)
    for column, (name, sizes) in enumerate(SWEEPS.items()):
        x = [s[("width", "support examples", "inner steps").index(name)] for s in sizes]
        forms = {"dense": "dense", "factored": "factored"}
        times = [measure(case(w, 32, n, k), forms, seconds) for w, n, k in sizes]
        peaks = [{form: peak(w, n, k, form) for form in forms} for w, n, k in sizes]
        for form in forms:
            axes[0, column].loglog(x, [1e3 * t[form] for t in times], "o-", label=form)
            axes[1, column].loglog(x, [p[form] for p in peaks], "o-", label=form)
        for row, what in enumerate(("ms a meta-step", "MiB, peak of a meta-step")):
            axes[row, column].set(xlabel=name, ylabel=what)
            axes[row, column].grid(alpha=0.3, which="both")
            axes[row, column].set_xticks(x, [str(v) for v in x])
            axes[row, column].minorticks_off()
        print(name, x, times, peaks, flush=True)
    axes[0, 0].legend()
    fig.suptitle(
        f"w-w-w-5, 32 tasks, {QUERIES} query examples; elsewhere 5 steps, 5 support examples, w = 512\n"
        f"{machine.describe()['cpu']}, {torch.get_num_threads()} threads"
    )
    fig.savefig(path, dpi=80)
    print(f"saved {path}")


def main() -> None:
    if sys.argv[1:2] == ["--peak"]:
        width, shots, steps = map(int, sys.argv[2:5])
        print_peak(width, shots, steps, sys.argv[5])
        return
    parser = argparse.ArgumentParser(prog="python -m bench.forms", description=__doc__)
    parser.add_argument("--seconds", type=float, default=0.3, help="for all forms of a point (default 0.3)")
    parser.add_argument("--gflop", type=float, default=20.0, help="leave out points of more than this a step")
    parser.add_argument("--above", type=float, default=0.0, help="and of no more than this")
    parser.add_argument("--widths", type=int, nargs="+", choices=WIDTHS, default=WIDTHS, help="of the grid")
    parser.add_argument("--output", type=Path, help="JSON file (default: a new one in bench/results)")
    parser.add_argument("--picture", type=Path, help="draw time and memory into this file instead")
    args = parser.parse_args()
    if args.picture:
        picture(args.picture, args.seconds)
    else:
        grid(args)


if __name__ == "__main__":
    main()
