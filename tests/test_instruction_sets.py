"""The `cpu` backend on every instruction set that this machine has, on sizes of many kinds."""

import ctypes
import math
import os
import subprocess
import sys
from itertools import pairwise, product
from pathlib import Path

import pytest
import torch
from cases import error
from torch import nn

from fastmaml import functional, reference
from fastmaml.backends import cpu

pytestmark = pytest.mark.skipif(cpu.available() is not None, reason="no C++ extension")
FLAGS = {"generic": set(), "avx2": {"avx2", "fma"}, "avx512": {"avx512f", "avx512dq", "avx512vl"}}
FLAGS["amx"] = FLAGS["avx512"] | {"avx512bw", "amx_tile", "amx_bf16"}
EPS = torch.finfo(torch.float32).eps


def machine_flags() -> set[str]:
    """As Linux on x86 lists them; nothing elsewhere."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return {flag for line in lines if line.startswith("flags") for flag in line.split()}


def ask(code: str, isa: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"FASTMAML_ISA": isa, "PYTHONPATH": path}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)


# widths, examples of the support and query set: few and many rows; panels of 1 to 5 vectors, halves of one,
# and what is left over; long rows, which are taken a piece at a time; what is wide enough for a matrix unit
SIZES = [
    ((8, 40, 300, 3), 80, 3),
    ((8, 300, 17, 3), 80, 3),
    ((3, 200, 200, 4), 10, 10),
    ((3, 128, 64, 64, 5), 5, 75),
    ((1, 40, 40, 1), 10, 10),
    ((20, 100, 90, 7), 25, 12),
    ((33, 17, 50, 21), 40, 9),
    ((90, 300, 133, 65), 17, 9),
    ((1100, 70, 100, 5), 12, 5),
    ((9, 24, 36, 12), 24, 11),
    ((48, 40, 20, 3), 6, 20),
]


def among_nans(a: torch.Tensor) -> torch.Tensor:
    """A copy that begins and ends anywhere, between NaN: x is read where it lies if it needs no padding."""
    memory = torch.full((a.numel() + 66,), math.nan, dtype=a.dtype)
    return memory[33:-33].view(a.shape).copy_(a)


def check() -> None:
    """Meta-gradients against the reference; runs in a process of its own, for each instruction set."""
    for (widths, N, Q), activation, form in product(SIZES, [nn.Tanh, nn.LeakyReLU], ["dense", "factored"]):
        torch.manual_seed(0)
        layers: list[nn.Module] = []
        for i, o in pairwise(widths):
            layers += [nn.Linear(i, o), nn.LayerNorm(o) if o == 50 else activation()]
        model = nn.Sequential(*layers[:-1]).double()
        tasks = [(torch.randn(3, n, widths[0]), torch.randn(3, n, widths[-1])) for n in (N, Q)]
        found = {}
        for name, module, dtype in (
            ("truth", reference, torch.float64),
            ("ours", functional, torch.float64),
            ("theirs32", reference, torch.float32),
            ("ours32", functional, torch.float32),
        ):
            model.to(dtype)
            params = dict(model.named_parameters())
            data = [(among_nans(x.to(dtype)), y.to(dtype)) for x, y in tasks]
            how = {"backend": "cpu", "fast_weights": form} if module is functional else {}
            loss = module.meta_loss(model, params, *data, loss="mse", lr=0.05, steps=2, **how)
            grads = torch.autograd.grad(loss, list(params.values()))
            found[name] = torch.cat([loss.detach().view(1), *(g.flatten() for g in grads)]).double()
            model.double()
        off = {name: error(value, found["truth"]) for name, value in found.items()}
        assert off["ours"] < 1e-12, (widths, form, off)
        if activation is nn.Tanh:  # a sign that flips in float32 says nothing
            assert off["ours32"] <= 2 * off["theirs32"] + 16 * EPS, (widths, form, off)


def has(isa: str) -> bool:
    """Does this machine have it, and does the system let a process use it?"""
    if not FLAGS[isa] <= machine_flags():
        return False
    request_permission, tile_data = 0x1023, 18
    return isa != "amx" or ctypes.CDLL(None).syscall(158, request_permission, tile_data) == 0


@pytest.mark.parametrize("isa", FLAGS)
def test_meta_gradients(isa: str) -> None:
    done = ask("import fastmaml._C; print(fastmaml._C.isa())", isa)
    assert done.returncode == 0, done.stderr
    if done.stdout.strip() != isa:
        assert not has(isa), f"this machine has {isa}, but {done.stdout.strip()} was chosen"
        pytest.skip(f"this machine has {done.stdout.strip()} at most")
    done = ask("import test_instruction_sets; test_instruction_sets.check()", isa)
    assert done.returncode == 0, done.stderr


def test_unknown_name() -> None:
    done = ask("import fastmaml; fastmaml.backends()", "sse9")
    assert done.returncode != 0
    assert "ValueError: FASTMAML_ISA must be generic, avx2, avx512 or amx, got sse9" in done.stderr
