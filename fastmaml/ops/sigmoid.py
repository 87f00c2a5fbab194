"""y = 1 / (1 + exp(-x))

x [N, ..] -> y [N, ..].  y' = y (1 - y),  y'' = y' (1 - 2 y)
backward: grad_x = y' g.  tangent: t_y = y' t_x;  t_grad_x = y' t_g + y'' t_x g
Comes from nn.Sigmoid, torch.sigmoid, x.sigmoid() and their in-place forms.
"""

import torch
from torch import Tensor

from ._op import activation

SIGMOID = activation(
    "sigmoid", (torch.sigmoid, Tensor.sigmoid, torch.special.expit), (torch.sigmoid_, Tensor.sigmoid_)
)
