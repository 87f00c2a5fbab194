"""What float32 operands of products may be rounded to: one rule for the backends that run on a GPU."""

import torch

PRECISIONS = ("ieee", "tf32", "bf16")  # by their places in csrc/cuda/table.h
_OF_TORCH = {"highest": "ieee", "high": "tf32", "medium": "bf16"}  # torch.set_float32_matmul_precision


def check_precision(precision: str | None) -> None:
    if precision is not None and precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {list(PRECISIONS)} or None, got {precision!r}")


def chosen(precision: str | None) -> str:
    """That one, for None what torch's own setting allows."""
    if precision is not None:
        return precision
    try:
        return _OF_TORCH[torch.get_float32_matmul_precision()]
    except RuntimeError:  # torch's newer settings are in use
        found = torch.backends.cuda.matmul.fp32_precision
        return found if found in PRECISIONS else "ieee"
