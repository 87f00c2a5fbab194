"""Products on the matrix unit (AMX): right, seen when they are not, and none where the system forbids them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from faults import planted, run
from test_planted_faults import CSRC, TESTS

from fastmaml.backends import cpu

COMPILE = ["g++", "-std=c++17", "-O1", "-DFASTMAML_INLINE=inline", "-Wno-psabi", "-pthread"]

# file of csrc/cpu, text that is in it once, what it becomes
FAULTS = [
    # a product left out, a part read in the place of another
    ("amx.cpp", "LOAD_A(2);\n    MULTIPLY(4);", "LOAD_A(2);"),
    ("amx.cpp", "LOAD_B(2);\n    MULTIPLY(0);", "LOAD_B(2);"),
    ("amx.cpp", "LOAD_A(1);\n    MULTIPLY(2);", "LOAD_A(1);"),
    ("amx.cpp", "(factor == Factor::a ? part : 2 - part)", "part"),
    # a part cut off in the place of rounded: all that is left out has one sign
    ("amx.cpp", "r0 = (r0 + half) & upper, r1 = (r1 + half) & upper;", "r0 = r0 & upper, r1 = r1 & upper;"),
    # a stale tile
    ("amx.cpp", "_tile_zero(1);", ""),
    ("amx.cpp", "if (!half) _tile_loadd(5, a + (part * 2 + 1) * tile, 64)", "if (!half && part < 2) _tile_loadd(5, a + (part * 2 + 1) * tile, 64)"),
    ("amx.cpp", "_tile_loadd(1, C + 16, row);", "_tile_zero(1);"),
    # wrong rows or numbers at the end
    ("amx.cpp", "s.columns[0] = K - k, s.columns[1] = K - k - 16;", "s.columns[0] = s.columns[1] = 16;"),
    ("amx.cpp", "Source s{{}, {K - k, K - k - 16}, {}};", "Source s{{}, {16, 16}, {}};"),
    ("amx.cpp", "i & by ? 16 + i : i + by", "i & by ? 16 + i : i"),
    ("packed.h", "rows - r <= 16", "rows - r <= 17"),
    ("packed.h", "c / 16, end / 16, columns, K", "c / 16, end / 16, columns - 1, K"),
    ("packed.h", "columns - c > lanes<T>", "columns - c >= amx::side"),
    # the sum of the pieces of a long row
    ("packed.h", "c / side * amx::blocks(K) + k / side", "c / side * amx::blocks(K)"),
    ("packed.h", "Activate<T> part = e;\n        if (k > 0) part.add = true;", "Activate<T> part = e;"),
    ("packed.h", "if (k + deep < K) part.act = false, part.mask = nullptr;", ""),
    ("outer_products.h", "o_size - r <= 16, !first, sum", "o_size - r <= 16, begin > 0, sum"),
    ("outer_products.h", "o_size - r <= 16, !first, sum", "o_size - r <= 16, true, sum"),
    ("outer_products.h", "x_rows[depth] = products[j].b + k * products[j].ldb + i;", "x_rows[depth] = products[j].b + i;"),
    ("outer_products.h", "d_rows[depth] = products[j].a + k * products[j].a_col + o;", "d_rows[depth] = products[j].a + k * products[j].a_col;"),
]  # fmt: skip

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="no g++"),
    pytest.mark.skipif(not CSRC.exists(), reason="not a source tree"),
]


def build(csrc: Path, folder: Path, *names: str) -> None:
    for name in names:
        source = TESTS / f"{name}.cpp" if name.startswith("test") else csrc / "cpu" / f"{name}.cpp"
        done = run(*COMPILE, "-I", csrc, "-c", source, "-o", folder / f"{name}.o")
        assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The objects of the C++ test of the products, which passes."""
    folder = tmp_path_factory.mktemp("amx")
    build(CSRC, folder, "test_amx", "amx", "arena")
    done = run("g++", *folder.glob("*.o"), "-o", folder / "test")
    assert done.returncode == 0, done.stderr
    done = run(folder / "test")
    assert done.returncode == 0, done.stdout
    if done.stdout.startswith("skipped"):
        pytest.skip(done.stdout.strip())
    return folder


def test_products(objects: Path) -> None:
    assert "every product right" in run(objects / "test").stdout


@pytest.mark.parametrize(("file", "text", "fault"), FAULTS)
def test_planted_fault_is_caught(objects: Path, tmp_path: Path, file: str, text: str, fault: str) -> None:
    planted((file, text, fault), CSRC, tmp_path / "csrc", "cpu")
    for name in ("test_amx.o", "amx.o", "arena.o"):
        shutil.copy(objects / name, tmp_path)
    build(tmp_path / "csrc", tmp_path, "amx" if file == "amx.cpp" else "test_amx")
    done = run("g++", *tmp_path.glob("*.o"), "-o", tmp_path / "test")
    assert done.returncode == 0, done.stderr
    assert run(tmp_path / "test").returncode != 0, f"not caught: {fault or 'without ' + text}"


here = pytest.mark.skipif(cpu.isa() != "amx", reason="no AMX here, or FASTMAML_ISA rules it out")

# prints a checksum of a meta-gradient for each dtype and number of threads
MEASURE = """
import hashlib, torch
from fastmaml import functional
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(150, 130), torch.nn.ReLU(), torch.nn.Linear(130, 70))
tasks = [(torch.randn(13, n, 150), torch.randn(13, n, 70)) for n in (5, 9)]
for dtype in (torch.float32, torch.float64):
    model.to(dtype)
    sums = set()
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        loss, grads = functional.meta_value_and_grad(
            model, dict(model.named_parameters()), *[(x.to(dtype), y.to(dtype)) for x, y in tasks],
            loss="mse", lr=0.1, steps=2, fast_weights="factored", backend="cpu")
        flat = torch.cat([loss.view(1), *(g.flatten() for g in grads.values())])
        sums.add(hashlib.sha256(flat.numpy().tobytes()).hexdigest())
    print(*sums)
"""


@here
def test_float32_is_made_on_it_the_same_for_any_threads() -> None:
    found = {}
    for isa in ("amx", "avx512"):
        env = os.environ | {"FASTMAML_ISA": isa}
        done = subprocess.run(
            [sys.executable, "-c", MEASURE], env=env, capture_output=True, text=True, check=True
        )
        found[isa] = [line.split() for line in done.stdout.splitlines()]
        assert [len(sums) for sums in found[isa]] == [1, 1]
    assert found["amx"][0] != found["avx512"][0]
    assert found["amx"][1] == found["avx512"][1]


# in the place of libc's
REFUSE = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <sys/syscall.h>
long syscall(long n, long a, long b, long c, long d, long e, long f) {
  if (n == SYS_arch_prctl && a == 0x1023) return errno = EPERM, -1;
  long (*real)(long, ...) = (long (*)(long, ...))dlsym(RTLD_NEXT, "syscall");
  return real(n, a, b, c, d, e, f);
}
"""


@here
def test_a_system_that_forbids_it(tmp_path: Path) -> None:
    (tmp_path / "refuse.c").write_text(REFUSE)
    library = tmp_path / "refuse.so"
    done = run("gcc", "-shared", "-fPIC", tmp_path / "refuse.c", "-o", library, "-ldl")
    assert done.returncode == 0, done.stderr
    code = "import fastmaml; print(next(b.note for b in fastmaml.backends() if b.name == 'cpu'))"
    env = os.environ | {"LD_PRELOAD": str(library), "FASTMAML_ISA": "amx"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "C++ kernels, avx512"
