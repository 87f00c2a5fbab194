"""The Triton kernels compile for every architecture without spills. Table: `python -m bench.gpu_static`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parent.parent
ARCHITECTURES = ("80", "90", "100", "120")


def compiling(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, command)],
        env={n: v for n, v in os.environ.items() if n != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)},
        cwd=ROOT, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("arch", "precision"),
    [
        ("80", "tf32"),
        ("90", "ieee"),
        ("100", "bf16"),
        ("120", "ieee"),
        ("80", "float64"),
        ("100", "float64"),
        ("120", "float64"),
    ],
)
def test_a_network_compiles_without_spills(arch: str, precision: str, tmp_path: Path, every: int) -> None:
    if every > 1 and (arch, precision) not in (("80", "tf32"), ("90", "ieee"), ("100", "float64")):
        pytest.skip("with --all")
    out = tmp_path / "table.md"
    rounded = ["mlp/policy"] + ["omniglot-mlp/5-steps"] * (every == 1)
    models = ["sine/small", "wide/1024", *rounded]  # in ieee; the second with factored layers
    how = "--models", *models, "--rounded", *rounded, "--arch", arch, "--precision", precision
    done = compiling("-m", "bench.gpu_static", *how, "--out", out)
    assert done.returncode == 0, done.stderr
    for kernel in ("linear_forward", *["rows_update"] * (precision == "ieee")):
        assert f"| sm_{arch} | {precision} | {kernel}_kernel |" in out.read_text()


def test_norms_losses_and_products_compile_as_they_should() -> None:
    """Norms and cross entropy of float64, of Omniglot's sizes, do not spill; a TF32 product has no loads
    ahead in shared memory, where they would meet in one bank (kernels/linear.py, tile)."""
    done = compiling("tests/compiled.py", *ARCHITECTURES)
    assert done.returncode == 0, done.stderr
    kernels = [line.split() for line in done.stdout.splitlines()]
    assert len(kernels) == 4 * len(ARCHITECTURES)
    for arch, name, spilled, shared in kernels:
        assert int(spilled) == 0, (arch, name)
        assert int(shared) <= 32 << 10, (arch, name)
