"""y = tanh(x)

x [N, ..] -> y [N, ..].  y' = 1 - y^2,  y'' = -2 y y'
backward: grad_x = y' g.  tangent: t_y = y' t_x;  t_grad_x = y' t_g + y'' t_x g
Comes from nn.Tanh, torch.tanh, x.tanh() and their in-place forms.
"""

import torch
from torch import Tensor

from ._op import activation

TANH = activation("tanh", (torch.tanh, Tensor.tanh), (torch.tanh_, Tensor.tanh_))
