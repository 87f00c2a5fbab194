"""y = x Phi(x), Phi the normal distribution function; with attribute tanh = 1: y = x (1 + r) / 2, r = tanh(u)

x [N, ..] -> y [N, ..];  u = sqrt(2 / pi) (x + 0.044715 x^3).  (Hendrycks and Gimpel, arXiv 1606.08415)
exact: y' = Phi + x phi,  y'' = phi (2 - x^2),  phi(x) = exp(-x^2 / 2) / sqrt(2 pi)
tanh:  y' = (1 + r) / 2 + x r' / 2,  y'' = r' + x r'' / 2
       r' = (1 - r^2) u',  r'' = (1 - r^2) (u'' - 2 r u'^2)
backward: grad_x = y' g.  tangent: t_y = y' t_x;  t_grad_x = y' t_g + y'' t_x g
Comes from nn.GELU and F.gelu with approximate="none" (attribute tanh = 0) or "tanh".
"""

import torch.nn.functional as F
from torch import Tensor

from ._op import LayerOp, Tape, same_shape


def gelu(tape: Tape, input: Tensor, approximate: str = "none") -> Tensor:
    if approximate not in ("none", "tanh"):
        raise ValueError(f"approximate must be 'none' or 'tanh', got {approximate!r}")
    return tape.op(GELU, (input,), attrs={"tanh": float(approximate == "tanh")})


GELU = LayerOp("gelu", (), ("tanh",), same_shape, {F.gelu: gelu})
