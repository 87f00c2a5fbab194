"""The sweep that drives the Triton kernels drives any namespace of passes: here the ops of csrc/cpu, one at a
time and task by task, on whole meta-gradients."""

import ctypes
import shutil
from pathlib import Path
from typing import Any

import naive_passes
import pytest
import torch
from cases import error
from faults import planted, run
from test_random_programs import KNOWN, _everything, inner_loop, meta_loss
from test_triton import case_of, mlp
from torch import Tensor, nn

from fastmaml import functional, reference
from fastmaml.backends import cpu
from fastmaml.losses import MSE

CSRC = Path(__file__).parents[1] / "csrc"
SOURCE = Path(__file__).parent / "cpp" / "op_tasks.cpp"
types = naive_passes.types

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="no g++"),
    pytest.mark.skipif(not CSRC.exists(), reason="not a source tree"),
]


def pointer(a: Tensor | None) -> int | None:
    return None if a is None else a.data_ptr()


class Passes:
    """The names and signatures of fastmaml.kernels. The C++ ops keep other things than statistics: each call
    makes anew what its backward pass reads."""

    types = types

    def __init__(self, library: Path) -> None:
        self.c = ctypes.CDLL(str(library))
        self.c.mse_task.restype = ctypes.c_double

    def op(self, name: str, x, w, b, O: int, *, g=None, t_g=None, attr=0.0, dual: bool) -> list[Tensor]:
        """y, or with g the gradients by x, w and b; their tangents with `dual`. For every task."""
        T, M, I = x.value.shape
        forward, kind = g is None, ctypes.c_int64(cpu._KINDS[name])
        sizes = [ctypes.c_int64(n) for n in (M, I, O)]
        params = [(None, None) if p is None else (p.value, naive_passes._tangent(p)) for p in (w, b)]
        given = [
            x.value,
            *(v for v, _ in params),
            g,
            x.t_value,
            *(t for _, t in params),
            t_g if dual else None,
        ]
        outputs = [x.value.new_zeros(T, M, O), torch.zeros_like(x.value)]
        outputs += [None if v is None else torch.zeros(v.shape, dtype=v.dtype) for v, _ in params]
        for t in range(T):
            here = [None if a is None else a[t].contiguous() for a in given]
            pointers = map(pointer, (*here, *(None if a is None else a[t] for a in outputs)))
            task = (ctypes.c_void_p * 12)(*pointers)
            self.c.op_task(kind, ctypes.c_double(attr), *sizes, int(forward), int(dual), task)
        return outputs[:1] if forward else outputs[1:]

    def forward(self, name: str, x, w, b, y, z, act, dual: bool, attr: float = 0.0) -> None:
        (out,) = self.op(name, x, w, b, y.value.shape[2], attr=attr, dual=dual)
        kept = None if z is None else z.t_value if dual else z.value
        if kept is not None:
            kept.copy_(out)
        if act.name != "none":
            made = types.Buffer(self.at(y, z, act), None, out) if dual else types.Buffer(out)
            (out,) = self.op(act.name, made, None, None, out.shape[2], attr=act.attr, dual=dual)
        (y.t_value if dual else y.value).copy_(out)

    def at(self, y, z, act) -> Tensor:
        """What f takes, or something of the same f and slopes."""
        if z is not None and z.value is not None:
            return z.value
        return torch.atanh(y.value) if act.name == "tanh" else y.value

    def before(self, y, z, act, dual: bool) -> tuple[Tensor, Tensor | None]:
        """The gradient by z and its tangent"""
        if act.name == "none":
            return y.grad, y.t_grad
        C = y.value.shape[2]
        x = types.Buffer(self.at(y, z, act), None, z.t_value if dual else None)
        how = {"g": y.grad, "t_g": y.t_grad, "attr": act.attr}
        grads = [self.op(act.name, x, None, None, C, **how, dual=d)[0] for d in (False, True)[: 1 + dual]]
        return grads[0], grads[1] if dual else None

    def linear_forward(self, x, w, b, y, z, act=types.NO_ACTIVATION, norm=None, *, dual, precision) -> None:
        self.forward("linear", x, w, b, y, z, act, dual)
        if norm is not None:
            name = ("batch_norm", "layer_norm")[norm.axis]
            self.forward(name, y, norm.w, norm.b, norm.y, norm.z, norm.act, dual, norm.eps)

    def linear_backward_input(self, x, w, y, z, act, *, add, dual, precision) -> None:
        g, t_g = self.before(y, z, act, dual)
        grad, _, _ = self.op("linear", x, w, None, y.value.shape[2], g=g, t_g=t_g, dual=dual)
        naive_passes._put(x.t_grad if dual else x.grad, grad, add)

    def linear_backward_weight(self, x, y, z, to_w, to_b, act, *, dual, precision) -> None:
        g, t_g = self.before(y, z, act, dual)
        T, I, O = len(g), x.value.shape[2], g.shape[2]
        w, b = types.Param(g.new_zeros(T, O, I)), types.Param(g.new_zeros(T, O))
        _, grad_w, grad_b = self.op("linear", x, w, b, O, g=g, t_g=t_g, dual=dual)
        naive_passes._update(to_w, grad_w)
        naive_passes._update(to_b, grad_b)

    def batch_norm_backward(self, x, w, y, z, statistics, to_w, to_b, act, *, wants_x, add, dual) -> None:
        g, t_g = self.before(y, z, act, dual)
        b = types.Param(torch.zeros_like(w.value))
        how = {"g": g, "t_g": t_g, "attr": nn.BatchNorm1d(1).eps, "dual": dual}
        grad, grad_w, grad_b = self.op("batch_norm", x, w, b, g.shape[2], **how)
        if wants_x:
            naive_passes._put(x.t_grad if dual else x.grad, grad, add)
        naive_passes._update(to_w, grad_w)
        naive_passes._update(to_b, grad_b)

    def mse(self, z, target, weight, loss, *, dual) -> None:
        assert weight is None
        T, N, C = z.value.shape
        out = z.t_grad if dual else z.grad
        for t in range(T):
            tensors = [z.value[t], z.t_value[t] if dual else None, target[t], out[t]]
            sizes = ctypes.c_int64(N), ctypes.c_int64(C), int(dual)
            value = self.c.mse_task(*sizes, *(ctypes.c_void_p(pointer(a)) for a in tensors))
            if not dual:
                loss[t] = value


def build(csrc: Path, folder: Path) -> Passes:
    library = folder / "op_tasks.so"
    flags = ["-std=c++17", "-O0", "-DFASTMAML_INLINE=inline", "-Wno-psabi", "-pthread", "-fPIC", "-shared"]
    done = run("g++", *flags, "-I", csrc, SOURCE, csrc / "cpu" / "arena.cpp", "-o", library)
    assert done.returncode == 0, done.stderr
    return Passes(library)


@pytest.fixture(scope="module")
def passes(tmp_path_factory: pytest.TempPathFactory) -> Passes:
    return build(CSRC, tmp_path_factory.mktemp("cpp"))


def check(passes: Passes, function: Any, act: Any) -> None:
    case = case_of(mlp(3, 7, 6, 2, act=act, norm=True), MSE(), 3, 5, 6, 3)
    truth = _everything(function, reference, case, {})
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(KNOWN, "ops of C++", naive_passes.backend(passes=passes))
        actual = _everything(function, functional, case, {"backend": "ops of C++"})
    errors = {n: error(actual[n], truth[n]) for n in truth}
    assert all(e <= 1e-10 for e in errors.values()), errors


@pytest.mark.parametrize("act", [nn.Tanh, nn.ReLU, nn.SiLU])
@pytest.mark.parametrize("function", [meta_loss, inner_loop])
def test_whole_meta_gradients(function: Any, act: Any, passes: Passes) -> None:
    check(passes, function, act)


def test_a_fault_in_an_op_is_seen(tmp_path: Path) -> None:
    fault = "norm.h", "store(t_keep.r + j * W, -r * q);", "store(t_keep.r + j * W, r * q);"
    faulty = build(planted(fault, CSRC, tmp_path / "csrc", "cpu"), tmp_path)
    with pytest.raises(AssertionError):
        check(faulty, meta_loss, nn.Tanh)
