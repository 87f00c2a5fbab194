"""What can be said of the CUDA kernels without a GPU: `python -m bench.cuda_static`.

Reads from the object that nvcc made (`make setup`), and from what ptxas said of it, each kernel's registers,
spills and tensor-core instructions for each architecture. Fails if one spills, or if a kernel for rounded
operands has no such instructions. Nothing here was run on a GPU.
"""

import argparse
import re
from pathlib import Path
from typing import NamedTuple

from fastmaml.backends.precision import PRECISIONS

from .gpu_static import _tool, publish

OBJECT = Path(__file__).parents[1] / "build" / "cuda" / "inner_loop.o"
HEADER = ["arch", "kernel", "registers", "spilled bytes", "tensor-core instructions"]


class Kernel(NamedTuple):
    registers: int
    spills: int  # bytes of a thread that are stored
    tensor_cores: int  # instructions


def named(symbol: str) -> str:
    """inner_loop_kernel float32 tf32, of its mangled name"""
    found = re.search(r"\d([a-z_]+_kernel)I([fd])(?:L\w*?Precision(?:E)?(\d))?", symbol)
    assert found is not None, symbol
    name, kind, precision = found.groups()
    dtype = {"f": "float32", "d": "float64"}[kind]
    return " ".join([name, dtype, *([PRECISIONS[int(precision)]] if precision else [])])


def kernels(compiled: Path = OBJECT) -> dict[tuple[str, str], Kernel]:
    """(architecture, name) -> what became of it"""
    log = compiled.with_suffix(".ptxas").read_text()
    said = re.findall(
        r"entry function '(\w+)' for '(\w+)'\n.*\n.* (\d+) bytes spill stores.*\n.*Used (\d+) registers", log
    )
    tensor_cores: dict[tuple[str, str], int] = {}
    arch = symbol = ""
    for line in _tool("cuobjdump", "-sass", compiled).splitlines():
        if found := re.match(r"arch = (\w+)|\s+Function : (\w+)", line):
            arch, symbol = found[1] or arch, found[2] or symbol
        elif "HMMA" in line:
            tensor_cores[arch, symbol] = tensor_cores.get((arch, symbol), 0) + 1
    return {
        (arch, named(symbol)): Kernel(int(registers), int(spilled), tensor_cores.get((arch, symbol), 0))
        for symbol, arch, spilled, registers in said
    }


def faults(found: dict[tuple[str, str], Kernel]) -> list[str]:
    bad = [f"{arch}: {name} spills {k.spills} bytes" for (arch, name), k in found.items() if k.spills]
    for (arch, name), k in found.items():
        if (k.tensor_cores > 0) != name.endswith(("tf32", "bf16")):
            bad.append(f"{arch}: {name} has {k.tensor_cores} tensor-core instructions")
    return bad


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.cuda_static", description=__doc__)
    parser.add_argument("--out", type=Path, help="where to write the table")
    args = parser.parse_args()
    found = kernels()
    rows = [
        [arch, name, str(k.registers), str(k.spills), str(k.tensor_cores) if k.tensor_cores else "none"]
        for (arch, name), k in sorted(found.items(), key=lambda item: (int(item[0][0][3:]), item[0][1]))
    ]
    about = [
        "By `python -m bench.cuda_static`, of the object that `make setup` made. A block has at most 256",
        "threads; its shared memory depends on the network. None of these was run on a GPU.",
    ]
    publish("The CUDA kernels as compiled", about, HEADER, rows, args.out, faults(found))


if __name__ == "__main__":
    main()
