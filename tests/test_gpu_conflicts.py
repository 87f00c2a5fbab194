"""bench/gpu_conflicts.py and the emulation of the CUDA kernels say of kernels what follows from their source:
32 banks of 4 bytes."""

import importlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest

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
    pytest.importorskip("triton")
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


EMULATED = """
#include "device.h"
namespace fastmaml::cuda {
struct alignas(16) Vector {
  float at[4];
};
template <class T, int stride>
void kernel(int) {
  own_shared<T>()[threadIdx.x * stride] = T{};
}
}  // namespace fastmaml::cuda
extern "C" void fastmaml_cuda_banks(int64_t*);
template <class T, int stride>
void tell() {
  using namespace fastmaml::cuda;
  int64_t found[5];
  launch(kernel<T, stride>, 1, Team{1, 32, 32 * stride * int(sizeof(T))}, nullptr, 0);
  fastmaml_cuda_banks(found);
  std::printf("%d %d\\n", int(found[0]), int(found[2]));
}
int main() {
  using fastmaml::cuda::Vector;
  tell<float, 1>(), tell<float, 2>(), tell<float, 32>(), tell<float, 33>();
  tell<double, 1>(), tell<double, 2>(), tell<Vector, 1>(), tell<Vector, 3>(), tell<Vector, 8>();
}
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_known_conflicts_are_counted_in_the_emulation(tmp_path: Path) -> None:
    conflicts = importlib.import_module("bench.cuda_conflicts")
    if not conflicts.EMULATION.exists():
        pytest.skip("no source tree")
    source, test = tmp_path / "kernel.cpp", tmp_path / "kernel"
    source.write_text(EMULATED)
    here = conflicts.compiled(source, tmp_path, counted=True), conflicts.banks(tmp_path)
    subprocess.run(["g++", "-pthread", *here, "-o", test], check=True)
    said = subprocess.run([test], capture_output=True, text=True, check=True).stdout.splitlines()
    assert [line.split() for line in said] == [
        ["1", ways] for ways in ("1", "2", "32", "1", "1", "2", "1", "1", "8")
    ]
