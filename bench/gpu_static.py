"""What can be said of the GPU kernels without a GPU: `python -m bench.gpu_static`.

Compiles every Triton specialisation that the named networks use for each architecture, and reads from the
result the registers, spills, shared memory, the blocks that a multiprocessor holds and
what limits them, and the tensor-core instructions. Fails if any kernel spills. Nothing here was run on a GPU.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton

from .cases import select
from .gpu_launches import meta_step

MODELS = ("sine/small", "sine/5-steps", "mlp/policy", "omniglot-mlp/5-steps")
ARCHITECTURES = (80, 90, 100, 120)
PRECISIONS = ("ieee", "tf32", "bf16")
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

# CUDA C++ Programming Guide, "Technical Specifications per Compute Capability":
# shared memory [KiB] and threads of a multiprocessor, its blocks at most; all have 65536 registers
LIMITS = {80: (164, 2048, 32), 90: (228, 2048, 32), 100: (228, 2048, 32), 120: (100, 1536, 24)}


@dataclass(frozen=True)
class Kernel:
    """One specialisation, compiled."""

    name: str
    registers: int
    spills: int  # bytes of a thread that are stored
    shared: int  # bytes of a block
    threads: int
    tensor_cores: int  # instructions

    def blocks(self, arch: int) -> tuple[int, str]:
        """Blocks on one multiprocessor, and what keeps them from being more."""
        shared, threads, most = LIMITS[arch]
        registers = -(-self.registers // 8) * 8 * self.threads  # given out by 8 a thread
        room = {
            "registers": 65536 // max(registers, 1),
            "shared memory": (shared << 10) // (self.shared + 1024),  # the system keeps 1 KiB a block
            "threads": threads // self.threads,
            "blocks": most,
        }
        limit = min(room, key=lambda name: room[name])
        return room[limit], limit


def _tool(name: str, *args: object) -> str:
    done = subprocess.run([str(TOOLS / name), *map(str, args)], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def read(compiled: Any) -> Kernel:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        code = _tool("cuobjdump", "-sass", file.name)
    found = {key: int(n) for key, n in re.findall(r"(REG|STACK):(\d+)", usage)}
    return Kernel(
        compiled.metadata.name,
        found["REG"],
        spilled(compiled) if found["STACK"] else 0,
        compiled.metadata.shared,
        32 * compiled.metadata.num_warps,
        len(re.findall(r"\b(?:HMMA|HGMMA|UTCHMMA|DMMA)\b", code)),
    )


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


def kernels_of(models: Iterable[str], arch: int, precision: str) -> list[Kernel]:
    seen: dict[str, Any] = {}
    for case in select(list(models)):
        for compiled in meta_step(case, precision, arch).compiled.values():
            seen[compiled.hash] = compiled
    return [read(compiled) for compiled in seen.values()]


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
            ]
        )  # fmt: skip
    return rows


HEADER = [
    "arch", "precision", "kernel", "specialisations", "registers", "spilled bytes", "shared KiB",
    "blocks on an SM (limit)", "tensor-core instructions",
]  # fmt: skip


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def models_of(args: argparse.Namespace, precision: str) -> list[str]:
    return args.models if precision == "ieee" else args.rounded


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_static", description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument(
        "--rounded",
        nargs="+",
        default=["mlp/policy"],
        help="models for the other precisions (default mlp/policy)",
    )
    parser.add_argument("--arch", nargs="+", type=int, default=list(ARCHITECTURES))
    parser.add_argument("--precision", nargs="+", default=list(PRECISIONS), choices=PRECISIONS)
    parser.add_argument("--out", type=Path, help="where to write the table")
    args = parser.parse_args()
    rows, faults = [], []
    for precision in args.precision:
        for arch in args.arch:
            found = kernels_of(models_of(args, precision), arch, precision)
            rows += table(arch, precision, found)
            faults += [f"sm_{arch} {precision}: {k.name} spills {k.spills} bytes" for k in found if k.spills]
            products = [k for k in found if k.name.startswith("linear")]
            if precision != "ieee" and not all(k.tensor_cores for k in products):
                faults.append(f"sm_{arch} {precision}: a product without tensor cores")
            print(f"sm_{arch} {precision}: {len(found)} specialisations", file=sys.stderr)
    text = "\n".join(
        [
            "# The Triton kernels as compiled",
            "",
            f"By `python -m bench.gpu_static`, triton {triton.__version__}:",
            "; ".join(f"{p} for {', '.join(models_of(args, p))}" for p in args.precision) + ".",
            "A row holds the worst of a kernel's specialisations. None of these was run on a GPU.",
            "",
            markdown(HEADER, rows),
            "",
        ]
    )
    print(text)
    if args.out:
        args.out.write_text(text)
    if faults:
        sys.exit("\n".join(faults))


if __name__ == "__main__":
    main()
