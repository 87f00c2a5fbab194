"""What can be said of the CUDA kernels without a GPU: `python -m bench.cuda_static`.

Reads from the objects that nvcc made (`make setup`), and from what ptxas said of them, each kernel's
registers, spills and tensor-core instructions for each architecture. Fails if one spills, or if a kernel for
float32 has no such instructions for one kind of rounded operands. Nothing here was run on a GPU.
"""

import argparse
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

from .gpu_static import _tool, publish

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from setup_cuda import KERNELS  # noqa: E402

OLDEST_CLUSTER = 90  # the kernels of older ones are empty

HEADER = ["arch", "kernel", "registers", "spilled bytes", "tensor-core instructions"]


class Kernel(NamedTuple):
    registers: int
    spills: int  # bytes of a thread that are stored
    tensor_cores: dict[str, int]  # instructions by the operands' kind


def named(symbol: str) -> str:
    """one_block float32, of its mangled name"""
    found = re.search(r"cuda\d+([a-z_]+?)\d+inner_loop_kernelI([fd])E", symbol)
    assert found is not None, symbol
    return f"{found[1]} {'float32' if found[2] == 'f' else 'float64'}"


def kernels(compiled: Path) -> dict[tuple[str, str], Kernel]:
    """(architecture, name) -> what became of it"""
    log = compiled.with_suffix(".ptxas").read_text()
    said = re.findall(
        r"entry function '(\w+)' for '(\w+)'\n.*\n.* (\d+) bytes spill stores.*\n.*Used (\d+) registers", log
    )
    tensor_cores: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    arch = symbol = ""
    for line in _tool("cuobjdump", "-sass", compiled).splitlines():
        if found := re.match(r"arch = (\w+)|\s+Function : (\w+)", line):
            arch, symbol = found[1] or arch, found[2] or symbol
        elif found := re.search(r"HMMA\.\S*\.(\w+) ", line):
            tensor_cores[arch, symbol][found[1]] += 1
    return {
        (arch, named(symbol)): Kernel(int(registers), int(spilled), tensor_cores[arch, symbol])
        for symbol, arch, spilled, registers in said
        if compiled.stem != "cluster" or int(arch[3:]) >= OLDEST_CLUSTER
    }


def counted(kernel: Kernel) -> str:
    return ", ".join(f"{n} {kind}" for kind, n in sorted(kernel.tensor_cores.items())) or "none"


def faults(found: dict[tuple[str, str], Kernel]) -> list[str]:
    bad = [f"{arch}: {name} spills {k.spills} bytes" for (arch, name), k in found.items() if k.spills]
    for (arch, name), k in found.items():
        if set(k.tensor_cores) != ({"TF32", "BF16"} if name.endswith("float32") else set()):
            bad.append(f"{arch}: {name} has tensor-core instructions {dict(k.tensor_cores)}")
    return bad


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.cuda_static", description=__doc__)
    parser.add_argument("--out", type=Path, help="where to write the table")
    args = parser.parse_args()
    found = {at: k for compiled in KERNELS for at, k in kernels(ROOT / compiled).items()}
    rows = [
        [arch, name, str(k.registers), str(k.spills), counted(k)]
        for (arch, name), k in sorted(found.items(), key=lambda item: (int(item[0][0][3:]), item[0][1]))
    ]
    about = [
        "By `python -m bench.cuda_static`, of the objects that `make setup` made: a task by one block, or by",
        "a cluster. A block has at most 256 threads; its shared memory depends on the network. None of these",
        "was run on a GPU.",
    ]
    publish("The CUDA kernels as compiled", about, [(HEADER, rows)], args.out, faults(found))


if __name__ == "__main__":
    main()
