"""y = x s,  s = 1 / (1 + exp(-x))

x [N, ..] -> y [N, ..].  y' = s (1 + x (1 - s)),  y'' = s (1 - s) (2 + x (1 - 2 s))
backward: grad_x = y' g.  tangent: t_y = y' t_x;  t_grad_x = y' t_g + y'' t_x g
Comes from nn.SiLU and F.silu, also in place.
"""

import torch.nn.functional as F

from ._op import activation

SILU = activation("silu", (F.silu,))
