"""The tests of the Triton kernels see faults in each of them: planted in copies, these must be caught.

And an executor of the compiler's own representation (ttsem) finds no stray access or race in the kernels as they
are, and does in a copy with a fault.
"""

import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import test_kernels
import test_triton
import torch
from cases import error
from faults import planted
from test_random_programs import _everything, meta_loss

from fastmaml import functional, reference
from fastmaml.backends import triton
from fastmaml.losses import MSE

pytest.importorskip("triton")
KERNELS = Path(importlib.import_module("fastmaml.kernels").__file__ or "").parent
TESTS = Path(__file__).parent

tanh = test_kernels.types.Activation("tanh")
silu = test_kernels.types.Activation("silu")


def layers(op: str, way: str, dual: bool, act=tanh, variants=(0, 1, 2)):
    def test() -> None:
        for variant in variants:
            test_kernels.check_layer(op, way, (2, 17, 5, 7), dual, act, variant)

    return test


def normed(axis: int, sizes: tuple[int, ...], dual: bool):
    return lambda: test_kernels.check_normed(axis, sizes, dual, tanh, 1)


def losses(loss: str, dual: bool, weighted: bool = True):
    return lambda: test_kernels.test_losses(loss, (3, 5, 5), weighted, dual)


def precision(rounded_to: str):
    return lambda: test_kernels.test_precision(rounded_to)


def small_mlp(own: bool):
    """The kernel of whole inner loops in the place of the backend's own, against the reference"""

    def test() -> None:
        case = test_triton.case_of(test_triton.mlp(3, 20, 17, 4, act=torch.nn.Sigmoid), MSE(), 3, 5, 6, 3)
        for x, _ in (case.support, case.query):
            x.requires_grad_(False)
        case.lr = 0.5
        if own:
            grown = {n: p.detach().expand(3, *p.shape).clone() for n, p in case.params.items()}
            case.params = {n: p.mul_(torch.rand_like(p)).requires_grad_() for n, p in grown.items()}
        truth = _everything(meta_loss, reference, case, {})
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(triton, "kernels", lambda: test_kernels.kernels)
            actual = _everything(meta_loss, functional, case, {"backend": "triton"})
        assert all(error(actual[n], truth[n]) <= 1e-13 for n in truth)

    return test


small, small_own = small_mlp(False), small_mlp(True)
forward, backward = layers("linear", "forward", False), layers("linear", "backward", False)
t_forward, t_backward = layers("linear", "forward", True), layers("linear", "backward", True)
joined, t_joined = normed(0, (2, 17, 5, 7), False), normed(0, (2, 17, 5, 7), True)
kept = lambda: test_kernels.test_one_of_each_kept_row((2, 3, 7))  # noqa: E731
norm, t_norm = (layers("batch_norm", "backward", dual) for dual in (False, True))

# file, text, what takes its place, the test that must fail
FAULTS = [
    # a missing mask
    ("linear.py", "x = tl.load(x_ptr + i[None, :], mask=x_mask, other=0.0)\n            w =", "x = tl.load(x_ptr + i[None, :], mask=m_mask, other=0.0)\n            w =", forward),
    ("linear.py", "    mask = m_mask & o_mask\n    if DUAL and", "    mask = m_mask\n    if DUAL and", t_forward),
    ("norm.py", "tl.store(out_ptr + e, out, mask=mask)", "tl.store(out_ptr + e, out, mask=(m < M)[:, None])", norm),
    # a wrong task offset
    ("linear.py", "w_ptr += t * w_stride + o[None, :]", "w_ptr += o[None, :]", forward),
    ("tiles.py", "base_ptr + t * base_stride + e", "base_ptr + e", backward),
    ("tiles.py", "scale_ptr + t * scale_stride", "scale_ptr", backward),
    ("rows.py", "rows_ptr + t * size + e", "rows_ptr + e", kept),
    ("norm.py", "at = tl.expand_dims(t * C + c if AXIS == 0 else t * M + m, AXIS) * 4", "at = tl.expand_dims(c if AXIS == 0 else m, AXIS) * 4", norm),
    # a dropped tangent term
    ("linear.py", "acc = dot(x, t_w, acc, PRECISION)", "pass", t_forward),
    ("linear.py", "acc = dot(g, t_w, acc, PRECISION)", "pass", t_backward),
    ("linear.py", "acc = dot(tl.trans(g), t_x, acc, PRECISION)", "pass", t_backward),
    ("elementwise.py", "t_g += second * tl.load(t_z_ptr + e, mask=mask, other=0.0) * g", "pass", t_backward),
    ("elementwise.py", "out += second * t_x * tl.load(g_ptr + e, mask=mask, other=0.0)", "pass", layers("elementwise", "backward", True)),
    ("norm.py", "out -= s * along * (q - mean(q, count, AXIS) - h * q_h)", "pass", t_norm),
    ("norm.py", "mean(t_q * h + q * t_h, count, AXIS)", "mean(t_q * h, count, AXIS)", t_norm),
    ("norm.py", "acc_w += tl.sum(t_g * h + g * t_h, 0)", "acc_w += tl.sum(t_g * h, 0)", t_norm),
    ("cross_entropy.py", "p * (t_z - tl.sum(p * t_z, 1)[:, None])", "p * t_z", losses("cross_entropy", True)),
    # a stale buffer
    ("rows.py", "BASE_ROWS, LR_ROWS, SCALE_ROWS, SIGN_ROWS,", "False, LR_ROWS, SCALE_ROWS, SIGN_ROWS,", kept),
    ("linear.py", "if ADD:", "if False:", backward),
    ("elementwise.py", "if z_ptr is not None:\n            tl.store(z_ptr", "if False:\n            tl.store(z_ptr", layers("linear", "forward", False, silu)),
    ("norm.py", "tl.store(statistics_ptr + 3, along, mask=group_mask)", "pass", layers("batch_norm", "forward", True)),
    # a norm in the kernel of the linear layer before it
    ("norm.py", "mean(tl.where(mask, x, 0.0), count, AXIS)", "mean(x, count, AXIS)", joined),
    ("norm.py", "t_x = tl.where(mask, t_x, 0.0)", "pass", t_joined),
    ("norm.py", "out = s * (t_x - t_m - h * along)", "out = s * (t_x - t_m)", t_joined),
    ("norm.py", "tl.store(statistics_ptr + 1, s, mask=group_mask)", "pass", joined),
    ("linear.py", "x = tl.load(y_ptr + e, mask=mask, other=0.0) if DUAL else acc", "x = acc", t_joined),
    ("linear.py", '"MO"[fused.axis] if fused else ""', '""', normed(0, (1, 65, 5, 3), False)),
    ("linear.py", "if norm and not fused:", "if False:", normed(1, (1, 2, 5, 129), False)),
    # the whole inner loop in one kernel
    ("mlp.py", "t_z2 = dot(h1, u2, t_z2, PRECISION)", "pass", small),
    ("mlp.py", "kept_ptr + k * each_step\n            store_matrix(kept + at_w1", "kept_ptr\n            store_matrix(kept + at_w1", small),
    ("mlp.py", "w_ptr += t * w_stride", "w_ptr += t * 0", small_own),
    ("mlp.py", "t_d1 += s1 * t_z1 * e1", "pass", small),
    ("mlp.py", "return z, tl.where((o < O)[None, :], activate(z, ACT, ATTR), 0.0)", "return z, activate(z, ACT, ATTR)", small),
    # an operand that is not rounded
    ("tiles.py", "input_precision=PRECISION", 'input_precision="ieee"', precision("tf32")),
    ("tiles.py", "a, b = a.to(tl.bfloat16), b.to(tl.bfloat16)", "a = a.to(tl.bfloat16)", precision("bf16")),
    # a wrong formula
    ("tiles.py", "if SIGN < 0:", "if False:", backward),
    ("silu.py", "t * (2.0 + z * (1.0 - 2.0 * s))", "t * (1.0 + z * (1.0 - 2.0 * s))", layers("elementwise", "backward", True, silu)),
    ("mse.py", "2.0 * s[:, None] * d", "s[:, None] * d", losses("mse", False)),
    ("mse.py", "/ total", "", losses("mse", False)),
    ("cross_entropy.py", "+ SMOOTHING / as_number(C, z.dtype)", "", losses("smoothed", False)),
]  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="a fault in a kernel may wedge the GPU")
@pytest.mark.parametrize("number", range(len(FAULTS)))
def test_a_planted_fault_is_caught(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, text, becomes, test = FAULTS[number]
    name = f"faulty_{number}"
    planted((file, text, becomes), KERNELS, tmp_path / name)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(test_kernels, "kernels", importlib.import_module("fastmaml.kernels"))
    test()  # passes without it
    monkeypatch.setattr(test_kernels, "kernels", importlib.import_module(name))
    with pytest.raises((AssertionError, RuntimeError)):
        test()


def semantics(kernels: Path, tmp_path: Path, tests: str) -> subprocess.CompletedProcess[str]:
    """Those of test_kernels*.py, in a tree of its own with those kernels, on the compiler's representation"""
    package = Path(importlib.import_module("fastmaml").__file__ or "").parent
    ignore = shutil.ignore_patterns("__pycache__", "*.so")
    shutil.copytree(package, tmp_path / "fastmaml", ignore=ignore)
    shutil.rmtree(tmp_path / "fastmaml" / "kernels", ignore_errors=True)
    shutil.copytree(kernels, tmp_path / "fastmaml" / "kernels", ignore=ignore)
    for name in ("test_kernels.py", "test_kernels_mlp.py", "naive_passes.py", "rounding.py", "barriers.py"):
        shutil.copy(TESTS / name, tmp_path / name)
    environment = {n: v for n, v in os.environ.items() if n != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "ttsem.sanitize", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    return subprocess.run(
        [*command, "-p", "barriers", "test_kernels.py", "test_kernels_mlp.py", "-k", tests],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=3600, check=False,
    )  # fmt: skip


needs_ttsem = pytest.mark.skipif(importlib.util.find_spec("ttsem") is None, reason="ttsem is not installed")


@needs_ttsem
def test_the_compilers_representation_is_sound(tmp_path: Path, every: int) -> None:
    of_each = "((one_of_each or one_norm) and blocks) or precision or (losses and sizes1)"
    tests = "test_" if every == 1 else f"{of_each} or (whole_loop and mse-0)"
    done = semantics(KERNELS, tmp_path, tests)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


# file, text, what takes its place, the test that sees it, and what is said of it there
SEEN_BY_TTSEM = [
    # programs of a task that add to the same part of a gradient
    ("linear.py", "    i = tl.program_id(2) * BLOCK_I + tl.arange(0, BLOCK_I)\n    rows =", "    i = tl.arange(0, BLOCK_I)\n    rows =", "one_of_each and linear and rows", "write-write"),
    # what other threads of the program have stored is read before they have
    ("mlp.py", "            tl.debug_barrier()", "            # none", "whole_loop and mse-0", "no barrier between a store and a load"),
    # tasks that keep their weights in one place; a store that goes past a row
    ("mlp.py", "kept_ptr += t * P", "kept_ptr += t * 0", "whole_loop and mse-0", "write-write"),
    ("mlp.py", "value, mask=(i < I)[:, None] & (o < O)[None, :]", "value, mask=(o < O)[None, :]", "whole_loop and mse-0", "two lanes of one store"),
]  # fmt: skip


@needs_ttsem
@pytest.mark.parametrize("number", range(len(SEEN_BY_TTSEM)))
def test_a_race_or_a_stray_store_is_caught_there(number: int, tmp_path: Path) -> None:
    file, text, becomes, tests, said = SEEN_BY_TTSEM[number]
    done = semantics(planted((file, text, becomes), KERNELS, tmp_path / "kernels"), tmp_path / "tree", tests)
    assert done.returncode != 0
    assert said in done.stdout
