"""What can be said of the CUDA kernels without a GPU: `python -m bench.cuda_static`.

Reads from the objects that nvcc made (`make setup`), and from what ptxas said of them, each kernel's
registers, spills, static shared memory and tensor-core instructions for each architecture. For the named
networks: which kernel runs each by the library's plan, its shared memory, the blocks that a multiprocessor
holds and what limits them; and, if asked, the bank conflicts of shared memory. Fails if a kernel spills, or
if one for float32 has no tensor-core instructions for one kind of rounded operands. Nothing here was run on a
GPU.
"""

import argparse
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

import torch

from fastmaml.backends import cpu, cuda, problem_for
from fastmaml.losses import resolve

from . import cuda_conflicts
from .cases import Case, select
from .gpu_static import KEPT, LIMITS, MODELS, PRECISIONS, _tool, occupancy, publish

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from setup_cuda import KERNELS  # noqa: E402

OLDEST_CLUSTER = 90  # the kernels of older ones are empty

HEADER = ["arch", "kernel", "registers", "spilled bytes", "static shared bytes", "tensor-core instructions"]
NETWORKS = [
    "arch", "network", "numbers", "kernel", "blocks x threads of a task", "shared KiB of a block",
    "blocks on an SM (limit)", "bank conflicts",
]  # fmt: skip

ABOUT = """\
By `python -m bench.cuda_static --conflicts`, of the objects that `make setup` made: a task by one block, or
by a cluster; and of calls for the named networks with all gradients. Bank conflicts are those of the source,
counted in the emulation over one step of a task by one block (csrc/cuda/emulation/banks.cpp), for the strides
are not in the code: the worst, the accesses of warps that have any, and how many more rounds of the banks
that makes of all. None of these was run on a GPU."""


class Kernel(NamedTuple):
    registers: int
    spills: int  # bytes of a thread that are stored
    shared: int  # bytes of a block that the kernel itself declares
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
        r"entry function '(\w+)' for '(\w+)'\n.*\n.* (\d+) bytes spill stores.*\n.*Used (\d+) registers(.*)",
        log,
    )
    tensor_cores: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    arch = symbol = ""
    for line in _tool("cuobjdump", "-sass", compiled).splitlines():
        if found := re.match(r"arch = (\w+)|\s+Function : (\w+)", line):
            arch, symbol = found[1] or arch, found[2] or symbol
        elif found := re.search(r"HMMA\.\S*\.(\w+) ", line):
            tensor_cores[arch, symbol][found[1]] += 1
    return {
        (arch, named(symbol)): Kernel(int(registers), int(spilled), shared(rest), tensor_cores[arch, symbol])
        for symbol, arch, spilled, registers, rest in said
        if compiled.stem != "cluster" or int(arch[3:]) >= OLDEST_CLUSTER
    }


def shared(used: str) -> int:
    """What ptxas says of it, if there is any"""
    return sum(int(n) for n in re.findall(r"(\d+) bytes smem", used))


def counted(kernel: Kernel) -> str:
    return ", ".join(f"{n} {kind}" for kind, n in sorted(kernel.tensor_cores.items())) or "none"


def faults(found: dict[tuple[str, str], Kernel]) -> list[str]:
    bad = [f"{arch}: {name} spills {k.spills} bytes" for (arch, name), k in found.items() if k.spills]
    for (arch, name), k in found.items():
        if set(k.tensor_cores) != ({"TF32", "BF16"} if name.endswith("float32") else set()):
            bad.append(f"{arch}: {name} has tensor-core instructions {dict(k.tensor_cores)}")
    return bad


def planned(case: Case, dtype: torch.dtype, arch: int) -> cuda.Plan:
    """For a call with all gradients, on a GPU of that architecture"""
    problem = problem_for(case.model(dtype), (case.widths[0],), resolve(case.loss))
    assert cpu.encode(problem, dtype) is None
    limit, blocks = (LIMITS[arch][0] << 10) - KEPT, 8 if arch >= OLDEST_CLUSTER else 1
    sizes = cuda.with_all_gradients(cuda.Sizes(case.support, case.query))
    return cuda.plan_within(problem, dtype.itemsize, limit, blocks, **sizes)


def network(
    case: Case, numbers: str, arch: int, found: dict[tuple[str, str], Kernel], conflicts: dict[str, str]
) -> list[str]:
    dtype = torch.float64 if numbers == "float64" else torch.float32
    plan = planned(case, dtype, arch)
    first = [f"sm_{arch}", case.name, numbers]
    if plan.misfit:
        return [*first, f"none: it {plan.misfit}", "", "", "", ""]
    name = "one_block" if plan.blocks == 1 else "cluster"
    kernel = found[f"sm_{arch}", f"{name} {str(dtype).removeprefix('torch.')}"]
    dynamic = -(-plan.bytes // plan.blocks // 16) * 16  # whole vectors
    blocks, limit = occupancy(arch, kernel.registers, kernel.shared + dynamic, plan.threads)
    banks = conflicts.get(f"{case.name} {numbers}", "not asked") if plan.blocks == 1 else "not counted"
    size = f"{dynamic / 1024:.1f}"
    return [*first, name, f"{plan.blocks} x {plan.threads}", size, f"{blocks} ({limit})", banks]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.cuda_static", description=__doc__)
    parser.add_argument("--out", type=Path, help="where to write the table")
    parser.add_argument("--conflicts", action="store_true", help="count bank conflicts, with g++")
    args = parser.parse_args()
    found = {at: k for compiled in KERNELS for at, k in kernels(ROOT / compiled).items()}
    rows = [
        [arch, name, str(k.registers), str(k.spills), str(k.shared), counted(k)]
        for (arch, name), k in sorted(found.items(), key=lambda item: (int(item[0][0][3:]), item[0][1]))
    ]
    fitting = [c.name for c in select(list(MODELS)) if planned(c, torch.float32, 90).blocks == 1]
    conflicts = cuda_conflicts.of_networks(fitting) if args.conflicts else {}
    built = sorted({int(arch[3:]) for arch, _ in found} & set(LIMITS))
    networks = [
        network(case, numbers, arch, found, conflicts)
        for arch in built
        for case in select(list(MODELS))
        for numbers in PRECISIONS
    ]
    tables = [(HEADER, rows), (NETWORKS, networks)]
    publish("The CUDA kernels as compiled", [ABOUT], tables, args.out, faults(found))


if __name__ == "__main__":
    main()
