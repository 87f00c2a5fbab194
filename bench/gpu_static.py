"""What can be said of the Triton kernels without a GPU: `python -m bench.gpu_static`.

Compiles every specialisation that the named networks use for each architecture, and reads from the result the
registers, spills, shared memory, the blocks that a multiprocessor holds and what limits them, the tensor-core
instructions and, if asked, the bank conflicts of shared memory. Fails if a kernel spills, or has no
tensor-core instructions where its products should. Nothing here was run on a GPU.
"""

import argparse
import itertools
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton

from . import gpu_conflicts
from .cases import select
from .gpu_conflicts import TOOLS, Conflicts
from .gpu_launches import meta_step

MODELS = ("sine/small", "sine/5-steps", "mlp/policy", "omniglot-mlp/5-steps")
ROUNDED = ("mlp/policy", "omniglot-mlp/5-steps")  # for the precisions but ieee
ARCHITECTURES = (80, 90, 100, 120)
PRECISIONS = ("ieee", "tf32", "bf16", "float64")

# CUDA C++ Programming Guide, "Technical Specifications per Compute Capability":
# shared memory [KiB] and threads of a multiprocessor, its blocks at most; all have 65536 registers
LIMITS = {80: (164, 2048, 32), 90: (228, 2048, 32), 100: (228, 2048, 32), 120: (100, 1536, 24)}
KEPT = 1024  # bytes of it that the system takes for each block

# of a TF32 product in shared memory: more is what loads ahead of their use bring (kernels/linear.py, tile)
MOST_WAYS = 8

# where the products must use them: 120 has none for float64
TENSOR_CORES = {(a, p) for a in ARCHITECTURES for p in PRECISIONS} - {(a, "ieee") for a in ARCHITECTURES}
TENSOR_CORES -= {(120, "float64")}


@dataclass(frozen=True)
class Kernel:
    """One specialisation, compiled."""

    name: str
    registers: int
    spills: int  # bytes of a thread that are stored
    shared: int  # bytes of a block
    threads: int
    products: bool  # has it any?
    tensor_cores: int  # instructions
    conflicts: Conflicts | str = "not asked"

    def blocks(self, arch: int) -> tuple[int, str]:
        return occupancy(arch, self.registers, self.shared, self.threads)


def occupancy(arch: int, registers: int, shared: int, threads: int) -> tuple[int, str]:
    """Blocks on one multiprocessor, and what keeps them from being more."""
    memory, most_threads, most = LIMITS[arch]
    of_block = -(-registers // 8) * 8 * threads  # given out by 8 a thread
    room = {
        "registers": 65536 // max(of_block, 1),
        "shared memory": (memory << 10) // (shared + KEPT),
        "threads": most_threads // threads,
        "blocks": most,
    }
    limit = min(room, key=lambda name: room[name])
    return room[limit], limit


def _tool(name: str, *args: object) -> str:
    command = [str(TOOLS / name), *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def read(compiled: Any, conflicts: bool = False) -> Kernel:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        code = _tool("cuobjdump", "-sass", file.name)
    found = {key: int(n) for key, n in re.findall(r"(REG|STACK):(\d+)", usage)}
    threads = 32 * compiled.metadata.num_warps
    return Kernel(
        compiled.metadata.name,
        found["REG"],
        spilled(compiled) if found["STACK"] else 0,
        compiled.metadata.shared,
        threads,
        "tt.dot" in compiled.asm["ttir"],
        tensor_instructions(code),
        gpu_conflicts.of_compiled(compiled.asm, threads) if conflicts else "not asked",
    )


def tensor_instructions(code: str) -> int:
    return len(re.findall(r"\b(?:HMMA|HGMMA|UTCHMMA|DMMA)\b", code))


def spilled(compiled: Any) -> int:
    """Asked of the assembler: not all that lies on the stack is spilled."""
    arch = re.search(r"\.target (sm_\w+)", compiled.asm["ptx"])
    assert arch is not None
    with tempfile.NamedTemporaryFile(suffix=".ptx", mode="w") as file:
        file.write(compiled.asm["ptx"])
        file.flush()
        assembler = "ptxas" if arch[1] == "sm_80" else "ptxas-blackwell"
        text = _tool(assembler, "-v", f"--gpu-name={arch[1]}", file.name, "-o", "/dev/null")
    return sum(int(n) for n in re.findall(r"(\d+) bytes spill stores", text))


def kernels_of(models: Iterable[str], arch: int, precision: str, conflicts: bool = False) -> list[Kernel]:
    seen: dict[str, Any] = {}
    for case in select(list(models)):
        for compiled in meta_step(case, precision, arch).compiled.values():
            seen[compiled.hash] = compiled
    return [read(compiled, conflicts) for compiled in seen.values()]


def worst(found: list[Conflicts | str]) -> str:
    known = [c for c in found if isinstance(c, Conflicts)]
    return str(max(known, key=lambda c: (c.ways, c.conflicted))) if known else str(found[0])


def table(arch: int, precision: str, found: list[Kernel]) -> list[list[str]]:
    """A row for each kernel: the worst of its specialisations."""
    rows = []
    for name in sorted({k.name for k in found}):
        some = [k for k in found if k.name == name]
        blocks, limit = min(k.blocks(arch) for k in some)
        tensor = [k.tensor_cores for k in some]
        rows.append(
            [
                f"sm_{arch}", precision, name, str(len(some)), str(max(k.registers for k in some)),
                str(max(k.spills for k in some)), f"{max(k.shared for k in some) / 1024:.1f}",
                f"{blocks} ({limit})", f"{min(tensor)}-{max(tensor)}" if any(tensor) else "none",
                worst([k.conflicts for k in some]),
            ]
        )  # fmt: skip
    return rows


def wrong(arch: int, precision: str, found: list[Kernel]) -> list[str]:
    products = [k for k in found if k.products]
    why = [f"{k.name} spills {k.spills} bytes" for k in found if k.spills]
    if (arch, precision) in TENSOR_CORES:
        why += [f"{k.name} has a product without tensor cores" for k in products if not k.tensor_cores]
    for k in products if precision == "tf32" else ():
        if isinstance(k.conflicts, Conflicts) and k.conflicts.ways > MOST_WAYS:
            why.append(f"{k.name} has bank conflicts, {k.conflicts}")
    return why


HEADER = [
    "arch", "precision", "kernel", "specialisations", "registers", "spilled bytes", "shared KiB",
    "blocks on an SM (limit)", "tensor-core instructions", "bank conflicts",
]  # fmt: skip


NOTE = """\
A row holds the worst of a kernel's specialisations. Bank conflicts are those that `cuxray` finds in the code:
the worst, and how many of the memory accesses that it could follow have any. None of these kernels was run on
a GPU."""


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def publish(
    title: str,
    about: list[str],
    tables: list[tuple[list[str], list[list[str]]]],
    out: Path | None,
    faults: list[str],
) -> None:
    """Prints the tables, writes them to `out`, and ends with the faults if there are any."""
    text = "\n\n".join([f"# {title}", "\n".join(about), *(markdown(*table) for table in tables)]) + "\n"
    print(text)
    if out:
        out.write_text(text)
    if faults:
        sys.exit("\n".join(faults))


def models_of(args: argparse.Namespace, precision: str) -> list[str]:
    return args.models if precision == "ieee" else args.rounded


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_static", description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--rounded", nargs="+", default=list(ROUNDED), help="models for the other precisions")
    parser.add_argument("--arch", nargs="+", type=int, default=list(ARCHITECTURES))
    parser.add_argument("--precision", nargs="+", default=list(PRECISIONS), choices=PRECISIONS)
    parser.add_argument("--out", type=Path, help="where to write the table")
    parser.add_argument("--conflicts", action="store_true", help="ask cuxray for bank conflicts")
    args = parser.parse_args()
    if args.conflicts and (absent := gpu_conflicts.missing()):
        print(f"no {absent}: bank conflicts are not asked for", file=sys.stderr)
        args.conflicts = False
    rows, faults = [], []
    pairs = list(itertools.product(args.precision, args.arch))
    # by processes, for Triton compiles on one thread; forked, for nothing has run on others here
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(min(os.cpu_count() or 1, len(pairs)), context) as pool:
        futures = [
            pool.submit(kernels_of, models_of(args, precision), arch, precision, args.conflicts)
            for precision, arch in pairs
        ]
        for (precision, arch), future in zip(pairs, futures, strict=True):
            found = future.result()
            rows += table(arch, precision, found)
            faults += [f"sm_{arch} {precision}: {why}" for why in wrong(arch, precision, found)]
            print(f"sm_{arch} {precision}: {len(found)} specialisations", file=sys.stderr)
    what = "; ".join(f"{p} for {', '.join(models_of(args, p))}" for p in args.precision)
    about = [f"By `python -m bench.gpu_static`, triton {triton.__version__}:", f"{what}.", NOTE]
    publish("The Triton kernels as compiled", about, [(HEADER, rows)], args.out, faults)


if __name__ == "__main__":
    main()
