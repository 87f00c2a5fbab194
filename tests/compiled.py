"""Norms, cross entropy and a TF32 product, compiled for each architecture that is named, as 90.

Prints of each kernel its architecture and name, the bytes that it spills and those of its shared memory. Not
for a process of tests, where Triton interprets.
"""

import sys

import torch

from bench.gpu_launches import kernels, noted
from bench.gpu_static import read

T = 2
types = kernels.types
RELU = types.Activation("leaky_relu")


def buffer(M: int, C: int, dtype: torch.dtype):
    return types.Buffer(*torch.zeros(4, T, M, C, dtype=dtype))


def param(*shape: int, dtype: torch.dtype):
    return types.Param(*torch.zeros(2, T, *shape, dtype=dtype), torch.ones(1, dtype=dtype))


def norm(M: int, C: int, dtype: torch.dtype) -> None:
    """The tangents, which need the most registers"""
    x, y, w, statistics = buffer(M, C, dtype), buffer(M, C, dtype), param(C, dtype=dtype), buffer(C, 4, dtype)
    update, at = types.Update(w.value, lr=w.lr), statistics.value
    kernels.batch_norm_forward(x, w, w, y, None, at, RELU, eps=1e-5, dual=True)
    kernels.batch_norm_backward(x, w, y, None, at, update, update, RELU, wants_x=True, add=False, dual=True)


def cross_entropy(N: int, C: int, dtype: torch.dtype) -> None:
    target, loss = torch.zeros(T, N, dtype=torch.int64), torch.zeros(T, dtype=dtype)
    kernels.cross_entropy(buffer(N, C, dtype), target, None, loss, smoothing=0.0, dual=False)


def product(M: int, I: int, O: int) -> None:
    """Of TF32, an operand of which is worked on before: the gradient, by the slope of relu"""
    x, y, w = buffer(M, I, torch.float32), buffer(M, O, torch.float32), param(O, I, dtype=torch.float32)
    update = types.Update(w.value, lr=w.lr)
    kernels.linear_backward_weight(x, y, None, update, None, RELU, dual=True, precision="tf32")


for arch in map(int, sys.argv[1:]):
    with noted(arch) as launches:
        norm(5, 256, torch.float64)
        cross_entropy(75, 5, torch.float64)
        product(20, 100, 100)
    for compiled in launches.compiled.values():
        kernel = read(compiled)
        print(arch, kernel.name, kernel.spills, kernel.shared)
