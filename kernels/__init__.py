"""Triton kernels: the passes of every op over all tasks, plain and dual, in one source each.

fastmaml/backends/sweep.py drives them. TRITON_INTERPRET=1, set before this is imported, runs them on the CPU.
"""

from . import types
from .add import add_backward, add_forward
from .batch_norm import batch_norm_backward, batch_norm_forward
from .cross_entropy import cross_entropy
from .elementwise import elementwise_backward, elementwise_forward
from .layer_norm import layer_norm_backward, layer_norm_forward
from .linear import linear_backward_input, linear_backward_weight, linear_forward
from .mlp import MOST as MLP_MOST
from .mlp import mlp
from .mse import mse
from .rows import rows_update
from .tiles import GROUP_MOST

__all__ = [
    "GROUP_MOST",
    "MLP_MOST",
    "add_backward",
    "add_forward",
    "batch_norm_backward",
    "batch_norm_forward",
    "cross_entropy",
    "elementwise_backward",
    "elementwise_forward",
    "layer_norm_backward",
    "layer_norm_forward",
    "linear_backward_input",
    "linear_backward_weight",
    "linear_forward",
    "mlp",
    "mse",
    "rows_update",
    "types",
]
