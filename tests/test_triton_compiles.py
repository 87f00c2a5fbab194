"""The Triton kernels compile for every architecture without spills. Table: `python -m bench.gpu_static`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parent.parent


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
    models = ["sine/small", "mlp/policy", "wide/1024"]  # in ieee; the last with factored layers
    command = [sys.executable, "-m", "bench.gpu_static", "--models", *models, "--out", out]
    done = subprocess.run(
        [*command, "--arch", arch, "--precision", precision],
        env={n: v for n, v in os.environ.items() if n != "TRITON_INTERPRET"},
        cwd=ROOT, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for kernel in ("linear_forward", *["rows_update"] * (precision == "ieee")):
        assert f"| sm_{arch} | {precision} | {kernel}_kernel |" in out.read_text()
