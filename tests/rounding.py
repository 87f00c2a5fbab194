"""How a GPU rounds the operands of the Triton kernels' products, in torch and put into Triton's interpreter.

That leaves the operands of TF32 as they are, and cuts where it should round to bfloat16.
"""

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

# what rounding moves a number by at most, of itself
UNIT = {"tf32": 2.0**-10, "bf16": 2.0**-8}


def rounded(a: Tensor, precision: str) -> Tensor:
    """TF32: Triton has them converted by nothing, and tensor cores read the upper 19 bits of a float32.
    bfloat16: to the nearest, ties to even."""
    if precision == "tf32":
        return (a.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)
    return a.bfloat16().float() if precision == "bf16" else a


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Inside, interpreted kernels round as compiled ones."""
    if os.environ.get("TRITON_INTERPRET", "0") != "1":
        yield
        return
    interpreter = importlib.import_module("triton.runtime.interpreter")
    tl = importlib.import_module("triton.language")
    builder = interpreter.InterpreterBuilder
    dot, cast = builder.create_dot, builder.cast_impl

    def create_dot(self: Any, a: Any, b: Any, acc: Any, precision: Any, *rest: Any) -> Any:
        if precision.name == "TF32" and a.dtype.scalar == b.dtype.scalar == tl.float32:
            a, b = (
                interpreter.TensorHandle(rounded(torch.from_numpy(x.data), "tf32").numpy(), tl.float32)
                for x in (a, b)
            )
        return dot(self, a, b, acc, precision, *rest)

    def cast_impl(self: Any, a: Any, to: Any) -> Any:
        made = cast(self, a, to)
        if a.dtype.scalar == tl.float32 and to.scalar == tl.bfloat16:
            made.data = torch.from_numpy(a.data).bfloat16().view(torch.uint16).numpy()
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "create_dot", create_dot)
        patch.setattr(builder, "cast_impl", cast_impl)
        yield
