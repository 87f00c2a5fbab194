"""bench/gpu_conflicts.py says of kernels what follows from their source: 32 banks of 4 bytes."""

import importlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("triton")

KERNEL = """
extern "C" __global__ void kernel(const NUMBER* in, NUMBER* out, int n) {
  __shared__ NUMBER s[64 * 33];
  int t = threadIdx.x;
  for (int i = 0; i < 64; ++i) s[i * 32 + t] = in[i * 32 + t];
  __syncthreads();
  NUMBER a = 0;
  for (int i = 0; i < n; ++i) a += s[t * STRIDE + (i & 1)];
  out[t] = a;
}
"""


@pytest.mark.parametrize(
    ("number", "stride", "ways"),
    [
        ("float", 1, 1),
        ("float", 2, 2),
        ("float", 8, 8),
        ("float", 32, 32),
        ("float", 33, 1),
        ("double", 1, 1),
    ],
)
def test_known_conflicts_are_found(number: str, stride: int, ways: int, tmp_path: Path) -> None:
    conflicts = importlib.import_module("bench.gpu_conflicts")
    nvcc = shutil.which("nvcc", path=f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin")
    if conflicts.missing() or nvcc is None:
        pytest.skip(f"no {conflicts.missing() or 'nvcc'}")
    source, cubin = tmp_path / "kernel.cu", tmp_path / "kernel.cubin"
    source.write_text(KERNEL.replace("NUMBER", number).replace("STRIDE", str(stride)))
    subprocess.run([nvcc, "-arch=sm_90", "-cubin", "-o", cubin, source], check=True)
    found = conflicts.of_cubin(cubin, 32)["kernel"]
    assert found.ways == ways
    assert (found.conflicted > 0) == (ways > 1)
