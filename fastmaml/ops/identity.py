"""y = x: functions that record no op at all.

Dropout in evaluation or with p = 0, and clone(). nn.Identity never reaches torch and needs nothing.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._op import Tape, Unsupported


def clone(tape: Tape, input: Tensor, *, memory_format: Any = None) -> Tensor:
    return tape.copy(input)


def _dropout(default_training: bool) -> Callable[..., Tensor]:
    def record(
        tape: Tape, input: Tensor, p: float = 0.5, training: bool = default_training, inplace: bool = False
    ) -> Tensor:
        if training and p != 0:
            raise Unsupported("", f"dropout with p={p} in training mode: set p=0 or call model.eval()")
        return input  # torch too returns the input itself here, not a copy

    return record


# torch's defaults differ: training=False for the two of SELU networks
IDENTITY_RECORDS: dict[Any, Callable[..., Tensor]] = {
    **dict.fromkeys((torch.clone, Tensor.clone), clone),
    **dict.fromkeys((F.dropout, F.dropout1d, F.dropout2d, F.dropout3d), _dropout(True)),
    **dict.fromkeys((F.alpha_dropout, F.feature_alpha_dropout), _dropout(False)),
}
