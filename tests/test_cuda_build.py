"""nvcc compiles every kernel for every architecture, into registers alone; the extension then holds them."""

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastmaml.backends import cpu, cuda

ROOT = Path(__file__).parents[1]
LOG = ROOT / "build" / "cuda" / "inner_loop.ptxas"
ARCHITECTURES = ["sm_80", "sm_90", "sm_100", "sm_120"]

source_tree = pytest.mark.skipif(not (ROOT / "csrc").exists(), reason="not a source tree")


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")


@source_tree
def test_no_kernel_spills_and_tensor_cores_are_where_they_should() -> None:
    """By what ptxas said when the extension was built, and by its code."""
    if nvcc() is None:
        pytest.skip("no nvcc")
    if os.environ.get("FASTMAML_CUDA") == "0" or not LOG.exists():
        pytest.skip("the extension was built without CUDA kernels (FASTMAML_CUDA=0)")
    pytest.importorskip("triton")  # for its cuobjdump
    done = subprocess.run(
        [sys.executable, "-m", "bench.cuda_static"],
        env={n: v for n, v in os.environ.items() if n != "TRITON_INTERPRET"},
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = [line.split(" | ")[:2] for line in done.stdout.splitlines() if line.startswith("| sm_")]
    # the inner loop in float64 and in three precisions of float32, and the sum over tasks
    assert len({name for _, name in rows}) == 6
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST") is None
    assert {arch.removeprefix("| ") for arch, _ in rows} == set(ARCHITECTURES) or not wanted


@pytest.mark.skipif(cpu.available() is not None, reason="no C++ extension")
def test_the_extension_has_the_entry_where_nvcc_was() -> None:
    """Loaded on any machine: there the runtime finds no GPU, and says so."""
    import fastmaml._C

    library = ctypes.CDLL(fastmaml._C.__file__)
    if not hasattr(library, "fastmaml_cuda_run"):
        assert not LOG.exists() or os.environ.get("FASTMAML_CUDA") == "0"
        pytest.skip("built without CUDA kernels")
    assert library.fastmaml_cuda_devices() == torch.cuda.device_count() or not torch.version.cuda


def test_without_a_gpu_and_without_emulation_it_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    code = "import fastmaml; print(next(b for b in fastmaml.backends() if b.name == 'cuda'))"
    env = {n: v for n, v in os.environ.items() if n != "FASTMAML_EMULATE"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert "available=False" in done.stdout
    assert "no CUDA device" in done.stdout or "built without its CUDA kernels" in done.stdout


def test_an_emulation_that_is_not_there_is_named() -> None:
    code = "from fastmaml.backends import cuda; print(cuda.available())"
    env = os.environ | {"FASTMAML_EMULATE": "/nowhere/libfastmaml_cuda.so"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert "there is no /nowhere/libfastmaml_cuda.so: make emulation builds it" in done.stdout


@source_tree
@pytest.mark.skipif(not cuda.EMULATED, reason="a GPU runs these tests")
def test_the_emulation_is_newer_than_the_kernels() -> None:
    library = ROOT / "build" / "emulation" / "libfastmaml_cuda.so"
    if os.environ["FASTMAML_EMULATE"] != "1" or not library.exists():
        pytest.skip("make emulation has not run")
    newest = max(p.stat().st_mtime for p in (ROOT / "csrc" / "cuda").rglob("*") if p.is_file())
    assert library.stat().st_mtime >= newest, "run make emulation"
