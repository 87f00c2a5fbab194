"""Accesses to shared memory that meet in a bank, as `cuxray` finds them in a cubin, without a GPU.

It takes what ptxas of CUDA 13 makes: for sm_80 and sm_90 Triton's PTX is assembled anew with that. Of kernels
whose conflicts are known from their source it says what they are (tests/test_gpu_conflicts.py); no hardware
counter was compared.
"""

import json
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Conflicts:
    """ways: of the worst; known, unknown: accesses that could and could not be judged, global ones too"""

    ways: int
    conflicted: int
    known: int
    unknown: int

    def __str__(self) -> str:
        rest = f", {self.unknown} unknown" if self.unknown else ""
        worst = f"{self.ways}-way, {self.conflicted}" if self.conflicted else "none"
        return f"{worst} of {self.known}{rest}"


def assembler() -> str | None:
    """nvcc's ptxas"""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("ptxas", path=f"{home}/bin") or shutil.which("ptxas")


def missing() -> str | None:
    """What is not installed, None if all is there."""
    if shutil.which("cuxray") is None:
        return "cuxray"
    return None if assembler() else "nvcc"


def of_compiled(asm: dict[str, Any], threads: int) -> Conflicts | str:
    """Of what Triton has compiled: the cubin itself for sm_100 and later, whose assembler is new enough."""
    arch = re.search(r"\.target (sm_\w+)", asm["ptx"])
    ptxas = assembler()
    assert arch is not None
    assert ptxas is not None
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        if arch[1] in ("sm_80", "sm_90a"):
            source.write_text(asm["ptx"])
            command = [ptxas, f"--gpu-name={arch[1]}", source, "-o", cubin]
            subprocess.run(command, check=True, capture_output=True)
        else:
            cubin.write_bytes(asm["cubin"])
        found = of_cubin(cubin, threads)
    return next(iter(found.values()), "unknown")


def of_cubin(cubin: Path, threads: int) -> dict[str, Conflicts]:
    """By kernel; without those that cuxray cannot follow."""
    # it would look for tools of its own on the network
    environment = os.environ | {"CUXRAY_NO_FETCH": "1", "PATH": f"{TOOLS}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        ["cuxray", "report", cubin, "--threads", str(threads), "--fast", "--json", "--no-cache"],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        return {}
    kernels = [kernel for unit in json.loads(done.stdout)["units"] for kernel in unit["kernels"]]
    return {k["name"]: _read(k["access"]) for k in kernels if k["access"].get("dataflow_converged")}


def _read(access: dict) -> Conflicts:
    return Conflicts(
        access["worst_bank_conflict_ways"] or 1,
        access["conflicted_shared_accesses"],
        access["analyzed_count"],
        access["unanalyzed_count"],
    )
