"""How long after `import fastmaml` the first meta-gradient is there: `python -m bench.first_result [CASE]`.

Each run is a process of its own; `import torch` is timed apart: a user of torch has paid for it already.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
CHILD = """
import json, sys, time
start = time.perf_counter()
import torch
torch_imported = time.perf_counter()
import fastmaml
import fastmaml.functional
imported = time.perf_counter()
from bench import cases
case = cases.select([sys.argv[1]])[0]
model, (support, query) = case.model(), case.data()
ready = time.perf_counter()
loss = fastmaml.functional.meta_loss(
    model, dict(model.named_parameters()), support, query,
    loss=case.loss, lr=case.lr, steps=case.steps, backend=sys.argv[2])
loss.backward()
done = time.perf_counter()
print(json.dumps({"import_torch_s": torch_imported - start, "import_fastmaml_s": imported - torch_imported,
                  "first_gradient_s": done - ready}))
"""


def first_result(case: str, backend: str = "cpu", runs: int = 3) -> dict[str, Any]:
    """Seconds of `import torch`, of `import fastmaml` after it, of the first meta-gradient: medians."""
    samples = []
    for _ in range(runs):
        command = [sys.executable, "-c", CHILD, case, backend]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
        if done.returncode:
            return {"absent": (done.stderr.strip().splitlines() or ["no message"])[-1]}
        samples.append(json.loads(done.stdout.splitlines()[-1]))
    result = {key: sorted(s[key] for s in samples)[len(samples) // 2] for key in samples[0]}
    result["after_import_torch_s"] = result["import_fastmaml_s"] + result["first_gradient_s"]
    return result


def report(result: dict[str, Any]) -> str:
    if "absent" in result:
        return f"first result: absent ({result['absent']})"
    return (
        f"first result, tracing included: {result['first_gradient_s']:.3f} s after import fastmaml,"
        f" which took {result['import_fastmaml_s']:.3f} s after import torch"
        f" ({result['import_torch_s']:.2f} s)"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("case", nargs="?", default="sine/5-steps")
    parser.add_argument("--backend", default="cpu")
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    print(report(first_result(args.case, args.backend, args.runs)))
