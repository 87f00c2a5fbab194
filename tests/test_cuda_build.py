"""nvcc compiles every kernel for every architecture, into registers alone; the extension then holds them."""

import ctypes
import importlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fastmaml
from fastmaml import functional
from fastmaml.backends import cpu, cuda, problem_for
from fastmaml.losses import MSE

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
        env={n: v for n, v in os.environ.items() if n not in ("TRITON_INTERPRET", "FASTMAML_EMULATE")},
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    kernels, _, networks = done.stdout.partition("| arch | network |")
    rows = [line.split(" | ")[:2] for line in kernels.splitlines() if line.startswith("| sm_")]
    # by a block and by a cluster, float32 and float64
    assert len({name for _, name in rows}) == 4
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST") is None
    assert {arch.removeprefix("| ") for arch, _ in rows} == set(ARCHITECTURES) or not wanted
    # small networks lie in a block, Omniglot's in none
    assert re.search(r"sine/small \| ieee \| one_block \| 1 x 128 \| [\d.]+ \| [1-9]\d* \(", networks)
    assert re.search(r"omniglot-mlp/5-steps \| ieee \| none: it needs \d+ bytes", networks)


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


class FakeNvcc:
    """An nvcc that says of which CUDA it is, and writes an object when it is told to."""

    def __init__(self, folder: Path, release: str) -> None:
        self.path, self.calls = folder / "bin" / "nvcc", folder / "calls"
        self.path.parent.mkdir(exist_ok=True)
        self.path.write_text(
            "#!/bin/sh\n"
            f"case $1 in --version) echo release {release}, V;; --list-gpu-code) echo sm_80 sm_90;;\n"
            f"*) echo $* >> {self.calls}; for last; do :; done; echo 0 > $last;; esac\n"
        )
        self.path.chmod(0o755)

    def compiled(self) -> int:
        return len(self.calls.read_text().splitlines()) if self.calls.exists() else 0


@pytest.fixture
def setup_cuda(monkeypatch: pytest.MonkeyPatch) -> Any:
    if not (ROOT / "setup_cuda.py").exists():
        pytest.skip("not a source tree")
    monkeypatch.syspath_prepend(str(ROOT))
    for name in ("FASTMAML_CUDA", "CUDA_HOME", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    return importlib.import_module("setup_cuda")


@pytest.mark.parametrize(
    ("release", "old"), [("11.8", True), ("12.0", True), ("12.1", False), ("13.0", False)]
)
def test_an_old_nvcc(
    setup_cuda: Any, release: str, old: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    nvcc = str(FakeNvcc(tmp_path, release).path)
    assert setup_cuda.find_nvcc() == (None if old else nvcc)
    assert (f"is of CUDA {release}, and the kernels take 12.1" in capfd.readouterr().err) == old
    monkeypatch.setenv("FASTMAML_CUDA", "1")
    if old:
        with pytest.raises(SystemExit, match=f"FASTMAML_CUDA=1, but .*is of CUDA {release}"):
            setup_cuda.find_nvcc()
    else:
        assert setup_cuda.find_nvcc() == nvcc
    monkeypatch.setenv("FASTMAML_CUDA", "0")
    assert setup_cuda.find_nvcc() is None


@pytest.mark.parametrize(
    ("listed", "codes"),
    [
        (None, ["[sm_80]", "[sm_90,compute_90]"]),  # 10.0 and 12.0+PTX are not known
        ("8.6+PTX;8.0", ["[sm_80,sm_86,compute_80]"]),
        ("7.5 9.0a", ["[sm_90a]"]),
        ("9.0 7.0+PTX 8.0", ["[sm_80]", "[sm_90,compute_90]"]),
        ("12.0 9.0 10.0a+PTX 10.0", ["[sm_90,sm_100,sm_120]", "[sm_100a,compute_100a]"]),
    ],
)
def test_architectures(
    setup_cuda: Any, listed: str | None, codes: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if listed:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
    arguments = setup_cuda.architectures(str(FakeNvcc(tmp_path, "12.4").path))
    assert [a.split("code=")[1] for a in arguments[1::2]] == codes
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.5")
    with pytest.raises(SystemExit, match="need compute capability"):
        setup_cuda.architectures(str(FakeNvcc(tmp_path, "12.4").path))


def test_what_makes_the_kernels_compile_again(
    setup_cuda: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "op.cuh"
    source.write_text("")
    os.utime(source, (0, 0))
    nvcc = FakeNvcc(tmp_path, "12.4")

    def compiles() -> bool:
        before = nvcc.compiled()
        if (tmp_path / setup_cuda.COMMAND).exists():  # clocks of file systems are coarse
            os.utime(tmp_path / setup_cuda.COMMAND, (1, 1))
        setup_cuda.compile_kernels(str(nvcc.path), ["op.cuh"], tmp_path)
        return nvcc.compiled() > before

    made = [tmp_path / name for name in setup_cuda.KERNELS]

    def age() -> None:
        for target in made:
            os.utime(target, (2, 2))

    assert compiles()
    age()
    assert not compiles()
    for change in (
        lambda: monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0"),
        lambda: FakeNvcc(tmp_path, "12.5"),
        lambda: os.utime(source, (3, 3)),
        made[1].unlink,
    ):
        change()
        assert compiles()
        os.utime(source, (0, 0))
        age()
        assert not compiles()


class FakeLibrary:
    """That of a machine with two GPUs; the second one's code was not compiled."""

    fastmaml_cuda_shared_limit = staticmethod(lambda index: 1000 + index)
    fastmaml_cuda_devices = staticmethod(lambda: 2)
    fastmaml_cuda_blocks = staticmethod(lambda index: 1)
    fastmaml_cuda_has_code = staticmethod(lambda index: 209 * index)
    fastmaml_cuda_error = staticmethod(lambda error: b"no kernel image is available")


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    current = [0]
    monkeypatch.setattr(cuda, "EMULATED", False)
    monkeypatch.setattr(cuda, "_path", lambda: "there")
    monkeypatch.setattr(cuda, "_load", lambda path: FakeLibrary)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (12, 1))
    for cached in (cuda.why_no_code, cuda._shared_limit):
        cached.cache_clear()
    yield current
    for cached in (cuda.why_no_code, cuda._shared_limit):
        cached.cache_clear()


def test_a_gpu_without_code_is_named(two_gpus: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    problem = problem_for(nn.Linear(2, 1), (2,), MSE())
    assert cuda.available() is None  # on the first
    assert cuda.supports(problem, torch.device("cuda", 0), torch.float32) is None
    why = cuda.supports(problem, torch.device("cuda", 1), torch.float32)
    assert why is not None
    assert "without code for this GPU, of compute capability 12.1 (no kernel image" in why
    assert "TORCH_CUDA_ARCH_LIST=12.1" in why
    two_gpus[0] = 1
    assert cuda.supports(problem, torch.device("cuda"), torch.float32) == why
    monkeypatch.setattr(FakeLibrary, "fastmaml_cuda_has_code", staticmethod(lambda index: 209))
    cuda.why_no_code.cache_clear()
    assert next(b for b in fastmaml.backends() if b.name == "cuda").note == why


def test_a_device_without_an_index_is_the_current_one(two_gpus: list[int]) -> None:
    for two_gpus[0] in (0, 1, 0):
        assert cuda.shared_limit(torch.device("cuda")) == 1000 + two_gpus[0]
    assert cuda.shared_limit(torch.device("cuda", 1)) == 1001


@pytest.mark.skipif(cuda.available() is not None, reason=cuda.available() or "")
@pytest.mark.parametrize("threads", ["48", "512", "-32", "many", ""])
def test_threads_of_a_block_are_checked(threads: str, monkeypatch: pytest.MonkeyPatch) -> None:
    device = "cpu" if cuda.EMULATED else "cuda"
    model, x = nn.Linear(2, 1).to(device), torch.zeros(1, 3, 2, device=device)
    monkeypatch.setenv("FASTMAML_CUDA_THREADS", threads)
    with pytest.raises(
        ValueError, match="FASTMAML_CUDA_THREADS must be a multiple of 32 up to 256, or 0, got"
    ):
        functional.apply(model, dict(model.named_parameters()), x, backend="cuda")
