"""Bank conflicts of the CUDA kernels, counted in the emulation: csrc/cuda/emulation/banks.cpp says how.

In the compiled code they cannot be found: the kernels' strides are known when they run.
"""

import ctypes
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from fastmaml.functional import meta_loss

from .cases import Case, select

EMULATION = Path(__file__).parents[1] / "csrc/cuda/emulation"
# vectors must stay whole: they are one access
FLAGS = ["-std=c++17", "-O1", "-fno-tree-sra", "-fno-ipa-sra", "-fPIC", "-fvisibility=hidden"]
FLAGS += ["-Wno-unknown-pragmas", "-Wno-psabi"]


def compiled(source: Path, folder: Path, counted: bool) -> Path:
    made = folder / f"{source.stem}.o"
    flags = [*FLAGS, "-fsanitize=thread"] if counted else FLAGS
    subprocess.run(["g++", *flags, f"-I{EMULATION}", "-c", source, "-o", made], check=True)
    return made


def banks(folder: Path) -> Path:
    return compiled(EMULATION / "banks.cpp", folder, counted=False)


def build(folder: Path) -> Path:
    """The emulation, with its accesses counted."""
    kernels = [
        compiled(EMULATION / f"{name}.cpp", folder, counted=True) for name in ("inner_loop", "cluster")
    ]
    library = folder / "libfastmaml_cuda_banks.so"
    subprocess.run(["g++", "-shared", "-pthread", *kernels, banks(folder), "-o", library], check=True)
    return library


def of_networks(names: list[str]) -> dict[str, str]:
    """By "network numbers": what is found of one step of one task. In a process of its own, which takes the
    library in the place of the kernels."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-m", "bench.cuda_conflicts", *names],
            env=os.environ | {"FASTMAML_EMULATE": str(build(Path(folder)))},
            stdout=subprocess.PIPE, text=True, check=True,
        )  # fmt: skip
    return json.loads(done.stdout)


def counted(case: Case, dtype: torch.dtype, precision: str, library: ctypes.CDLL) -> str:
    model = case.model(dtype)
    support, query = ([a[:1] for a in examples] for examples in case.data(dtype))
    meta_loss(
        model, dict(model.named_parameters()), support, query,
        loss=case.loss, lr=case.lr, steps=1, backend="cuda", precision=precision,
    )  # fmt: skip
    found = (ctypes.c_int64 * 5)()
    library.fastmaml_cuda_banks(found)
    total, conflicted, ways, rounds, least = found
    if not conflicted:
        return f"none of {total}"
    return f"{ways}-way, {conflicted} of {total}, {100 * (rounds / least - 1):.0f} % more rounds"


def main() -> None:
    library = ctypes.CDLL(os.environ["FASTMAML_EMULATE"])
    found = {}
    for case in select(sys.argv[1:]):
        for precision in ("ieee", "tf32", "bf16"):
            found[f"{case.name} {precision}"] = counted(case, torch.float32, precision, library)
        found[f"{case.name} float64"] = counted(case, torch.float64, "ieee", library)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
