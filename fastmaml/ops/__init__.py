"""The layer ops, one file each: formula, shapes, attributes, and the torch functions that they stand for."""

from ._op import LayerOp, Tape, Unsupported
from .add import ADD
from .batch_norm import BATCH_NORM
from .flatten import FLATTEN
from .gelu import GELU
from .identity import IDENTITY_RECORDS
from .layer_norm import LAYER_NORM
from .leaky_relu import LEAKY_RELU
from .linear import LINEAR
from .relu import RELU
from .sigmoid import SIGMOID
from .silu import SILU
from .tanh import TANH

_ALL = (LINEAR, BATCH_NORM, LAYER_NORM, RELU, LEAKY_RELU, TANH, SIGMOID, GELU, SILU, ADD, FLATTEN)

OPS: dict[str, LayerOp] = {op.name: op for op in _ALL}
RECORDS = {function: record for op in _ALL for function, record in op.records.items()} | IDENTITY_RECORDS

__all__ = ["OPS", "RECORDS", "LayerOp", "Tape", "Unsupported"]
