"""y = x where x > 0, else negative_slope x

x [N, ..] -> y [N, ..]; attribute negative_slope.
backward: grad_x = g where x > 0, else negative_slope g.  tangent: t_y and t_grad_x alike, from t_x and t_g.
Comes from nn.LeakyReLU, F.leaky_relu and their in-place forms.
"""

import torch.nn.functional as F

from ._op import activation

LEAKY_RELU = activation("leaky_relu", (F.leaky_relu,), (F.leaky_relu_,), {"negative_slope": 0.01})
