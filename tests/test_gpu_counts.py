"""Counts of what a GPU would launch are those of the forms that run: `python -m bench.gpu_counts`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastmaml.backends import cuda

pytest.importorskip("triton")
ROOT = Path(__file__).parent.parent


@pytest.mark.skipif(
    not cuda.EMULATED or cuda.available() is not None, reason="no emulation of the CUDA kernels"
)
def test_counts(tmp_path: Path) -> None:
    out = tmp_path / "table.md"
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu_counts", "sine/small", "omniglot-mlp/5-steps", "--out", out],
        env={n: v for n, v in os.environ.items() if n != "TRITON_INTERPRET"},
        cwd=ROOT, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = [line.strip("| ").split(" | ") for line in out.read_text().splitlines() if line.startswith("| ")]
    sine, omniglot = (dict(zip(rows[0], row, strict=True)) for row in rows[2:])
    assert sine["kernels"] == "1"
    assert sine["`cuda`"] == "1 + 0"
    assert omniglot["factored layers"] == "1"
    assert float(omniglot["launches a layer and pass"]) < 2
