"""Second-order meta-gradients against the peers: `python -m bench.meta_step sine omniglot-mlp`."""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from bench import machine  # torch and jax only after machine.limit_threads


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.meta_step", description=__doc__)
    parser.add_argument(
        "cases", nargs="*", help="cases or groups (sine, omniglot-mlp, sine/T1000, ...); default all"
    )
    parser.add_argument("--only", help="peers to measure, by comma (default: all but compile-vmap-grad)")
    parser.add_argument(
        "--threads", type=int, default=0, help="cores the process may use (default: all it has)"
    )
    parser.add_argument("--seconds", type=float, default=4.0, help="time for each peer and case (default 4)")
    parser.add_argument(
        "--quick", action="store_true", help="a look: 0.3 s each, no torch.compile, nothing saved"
    )
    parser.add_argument(
        "--cached-compile", action="store_true", help="let torch.compile use its cache on disk"
    )
    parser.add_argument("--output", type=Path, help="JSON file (default: a new one in bench/results)")
    return parser.parse_args()


class Truth:
    """float64 meta-gradients of a case: of all its tasks, and of a few for the peers' check in float64."""

    FEW = 8

    def __init__(self, case: Any) -> None:
        from bench import peers

        self.case = case
        self.small = replace(case, tasks=min(case.tasks, self.FEW))
        self.full = peers.reference(case)
        self.few = self.full if self.small == case else peers.reference(self.small)

    def check(self, build: Callable, step: Callable, whole: bool = False) -> dict[str, float]:
        """Errors of a peer: in float64 (does it compute the right thing) and in float32 (as it is timed)."""
        import torch

        from bench.measure import error

        case, truth = (self.case, self.full) if whole else (self.small, self.few)
        wide = build(case, torch.float64)
        return {"error_f64": error(wide(), truth), "error_f32": error(step(), self.full)}


# right to rounding in float64: BatchNorm with five steps costs 1e-12, the fault of grad(vmap) shows at 5e-4
RIGHT = 1e-9
# float32 is held against gross faults only: BatchNorm over many steps and flips of ReLU cost all peers dear
FLOAT32_GROSS = 0.2


def _gated(row: dict[str, Any]) -> bool:
    return not (row["error_f64"] <= RIGHT and row["error_f32"] <= FLOAT32_GROSS)


def _alone(case: Any, seconds: float) -> tuple[dict[str, Any], Any]:
    """fastmaml before any peer has run here, beside sgemm only; checked in full before it is timed."""
    import torch

    from bench import measure, peers

    truth = Truth(case)
    try:
        step = peers.fastmaml_cpu(case, torch.float32)
    except peers.Absent as absent:
        return {"absent": str(absent)}, truth
    row: dict[str, Any] = truth.check(peers.fastmaml_cpu, step, whole=True)
    if _gated(row):
        raise SystemExit(f"{case.name}: fastmaml is off the float64 reference, nothing is timed: {row}")
    times = measure.interleave({"sgemm": measure.sgemm_step(), "fastmaml": step}, seconds)
    rate = measure.sgemm_flops_per_second(times["sgemm"])
    row |= times["fastmaml"].summary() | {"of_sgemm": case.flops / times["fastmaml"].median / rate}
    return row | {"sgemm_gflops": rate / 1e9}, truth


def _against_peers(case: Any, truth: Truth, names: list[str], seconds: float) -> dict[str, Any]:
    import torch

    from bench import measure, peers

    peers.import_libraries()  # else the first call of the first case would hold the import
    rows: dict[str, dict[str, Any]] = {}
    steps: dict[str, Callable] = {"sgemm": measure.sgemm_step()}
    for name in names:
        build = peers.PEERS[name]
        try:
            start = time.perf_counter()
            step = build(case, torch.float32)
            step()
            rows[name] = {"first_call_s": time.perf_counter() - start}
            rows[name] |= truth.check(build, step)
        except Exception as error:  # a peer that breaks on this case must not take the others with it
            rows[name] = {"absent": peers.absence(name, error)}
            continue
        rows[name]["wrong"] = not rows[name]["error_f64"] <= RIGHT
        steps[name] = step
    times = measure.interleave(steps, seconds)
    rate = measure.sgemm_flops_per_second(times["sgemm"])
    for name in steps:
        if name != "sgemm":
            rows[name] |= times[name].summary()
            rows[name]["gflops"] = case.flops / times[name].median / 1e9
            rows[name]["of_sgemm"] = case.flops / times[name].median / rate
            if "fastmaml" in steps:
                rows[name]["times_fastmaml"] = times[name].median / times["fastmaml"].median
    return {"sgemm_gflops": rate / 1e9, "sgemm": times["sgemm"].summary(), "peers": rows}


def _print(case: Any, result: dict[str, Any]) -> None:
    print(
        f"\n{case.name}: {'-'.join(map(str, case.widths))}{' BatchNorm' if case.batch_norm else ''},"
        f" T={case.tasks} N={case.support} Q={case.query} K={case.steps}, {case.flops / 1e6:.1f} MFLOP, sgemm"
        f" {result['sgemm_gflops']:.0f} GF/s"
    )
    print(
        f"{'':18}{'median':>10}{'min':>10}{'behind':>10}{'x fast-':>9}{'of':>7}"
        f"{'error':>10}{'error':>10}{'first':>8}\n"
        f"{'':18}{'ms':>10}{'ms':>10}{'another':>10}{'maml':>9}{'sgemm':>7}"
        f"{'f64':>10}{'f32':>10}{'call s':>8}"
    )
    rows = result["peers"].items()
    alone = result.get("fastmaml_alone", {})
    for name, row in [("fastmaml, alone", alone), *rows] if "median_ms" in alone else rows:
        if "absent" in row:
            print(f"{name:18} absent: {row['absent']}")
            continue
        ratio = f"{row['times_fastmaml']:9.2f}" if "times_fastmaml" in row else f"{'':9}"
        first = f"{row['first_call_s']:8.2f}" if "first_call_s" in row else f"{'':8}"
        print(
            f"{name:18}{row['median_ms']:10.3f}{row['min_ms']:10.3f}{row['behind_another_ms']:10.3f}{ratio}"
            f"{row['of_sgemm']:7.2f}{row['error_f64']:10.1e}{row['error_f32']:10.1e}{first}"
            f"{'  WRONG' if row.get('wrong') else ''}"
        )
    rivals = {n: r for n, r in rows if not n.startswith("fastmaml") and "times_fastmaml" in r}
    for label, some in (
        ("fastest peer", rivals),
        ("fastest right peer", {n: r for n, r in rivals.items() if not r["wrong"]}),
    ):
        if some:
            name = min(some, key=lambda n: some[n]["median_ms"])
            print(f"{label}: {name}, {some[name]['times_fastmaml']:.2f} times the time of fastmaml")


def main() -> None:
    args = _arguments()
    if args.threads:
        machine.limit_threads(args.threads)
    scratch = tempfile.TemporaryDirectory()
    if not args.cached_compile:  # else the second run would report a compile time that no user sees at first
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = scratch.name

    from bench import cases, first_result, peers

    chosen = cases.select(args.cases)
    quick = [n for n in peers.DEFAULT if not n.startswith("compile")]
    names = args.only.split(",") if args.only else quick if args.quick else list(peers.DEFAULT)
    if unknown := [n for n in names if n not in peers.PEERS]:
        raise SystemExit(f"unknown peer {unknown[0]!r}; known: {', '.join(peers.PEERS)}")
    seconds = 0.3 if args.quick else args.seconds

    report: dict[str, Any] = {
        "machine": machine.describe(),
        "seconds": seconds,
        "threads": args.threads or None,
    }
    prepared = [_alone(case, seconds) if "fastmaml" in names else ({}, Truth(case)) for case in chosen]
    report["cases"] = {}
    for case, (alone, truth) in zip(chosen, prepared, strict=True):
        result = _against_peers(case, truth, names, seconds)
        result |= {"case": asdict(case), "flops": case.flops, "fastmaml_alone": alone}
        report["cases"][case.name] = result
        _print(case, result)
    if "fastmaml" in names:
        report["first_result"] = first_result.first_result(chosen[0].name, runs=1 if args.quick else 3)
        print("\n" + first_result.report(report["first_result"]))

    if args.output or not args.quick:
        path = args.output or machine.result_path("meta_step")
        path.write_text(json.dumps(report, indent=1) + "\n")
        print(f"saved {path}")


if __name__ == "__main__":
    main()
