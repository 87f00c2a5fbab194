"""Where and with what a measurement was taken."""

import os
import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("fastmaml", "torch", "jax", "jaxlib", "higher", "numpy", "pytest-benchmark")


def limit_threads(threads: int) -> None:
    """Hold the process and all libraries to `threads` cores; to be called before torch or jax is imported."""
    if "torch" in sys.modules or "jax" in sys.modules:
        raise RuntimeError("limit_threads must come before the import of torch and jax, whose pools it sizes")
    cores = sorted(os.sched_getaffinity(0))[:threads]
    # jax has no thread option: its pool has as many threads as the process may use cores
    os.sched_setaffinity(0, cores)
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(len(cores))


def _git(*args: str) -> str:
    here = Path(__file__).parent
    done = subprocess.run(["git", "-C", str(here), *args], capture_output=True, text=True, check=False)
    return done.stdout.strip()


def commit() -> str:
    """Short hash of HEAD, with a + when fastmaml, csrc or bench differ from it."""
    dirty = _git("status", "--porcelain", "--", ":/fastmaml", ":/csrc", ":/bench/*.py")
    return (_git("rev-parse", "--short", "HEAD") or "unknown") + ("+" if dirty else "")


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def describe() -> dict[str, Any]:
    """Machine, versions and commit of this run."""
    import torch

    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": commit(),
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch_threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": {p: _version(p) for p in PACKAGES},
    }


def result_path(kind: str) -> Path:
    """bench/results/<kind>-<commit>-<time>.json"""
    RESULTS.mkdir(exist_ok=True)
    return RESULTS / f"{kind}-{commit().rstrip('+')}-{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}.json"
