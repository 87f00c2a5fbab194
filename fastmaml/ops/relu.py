"""y = x where x > 0, else 0

x [N, ..] -> y [N, ..]
backward: grad_x = g where x > 0, else 0.  tangent: t_y and t_grad_x alike, from t_x and t_g.
A NaN in x stays a NaN in y, and lets g through, as in torch.
Comes from nn.ReLU, F.relu, torch.relu, x.relu() and their in-place forms.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ._op import activation

RELU = activation("relu", (F.relu, torch.relu, Tensor.relu), (torch.relu_, Tensor.relu_))
