"""What an inner optimizer does to all tasks' parameters, flat [T, P], and its derivative: csrc/cpu/descent.h.

    c = min(1, max_norm / |g_k|)
    M_{k+1} = momentum M_k + c g_k + weight_decay W_k,    W_{k+1} = W_k - a_k M_{k+1}
    n_{k+1} = momentum n_{k+2} - a_k v_{k+1}
    v_k = v_{k+1} + weight_decay n_{k+1} + H_k (c n_{k+1} + c' <g_k, n_{k+1}> g_k)

Plain descent has M = g and n = -a v, and no need of this: its step is the epilogue of the weight gradients.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .torch_descent import clipping, wide


class Descent:
    """adapt: [P], 1 where a number belongs to a parameter that adapts, 0 elsewhere"""

    def __init__(self, rule: Sequence[float], adapt: Tensor) -> None:
        self.momentum, self.weight_decay, self.max_norm = rule
        self.adapt = adapt

    @property
    def clips(self) -> bool:
        return self.max_norm < math.inf

    def _clip(self, g: Tensor) -> tuple[Tensor, Tensor]:
        norm = wide(g * self.adapt).square().sum(1, keepdim=True).sqrt()
        return clipping(norm, self.max_norm, g.dtype)

    def descend(self, w: Tensor, m: Tensor, g: Tensor, to: Tensor) -> None:
        """M_{k+1}; w may be [1, P]"""
        clip = self._clip(g)[0] if self.clips else None
        torch.mul(m, self.momentum, out=to)
        to.add_(g) if clip is None else to.addcmul_(g, clip)
        to.add_(w, alpha=self.weight_decay).mul_(self.adapt)

    def step(self, lr: Tensor, w: Tensor, m: Tensor, to: Tensor) -> None:
        torch.addcmul(w, lr, m, value=-1, out=to)

    def step_back(self, lr: Tensor, v: Tensor, n: Tensor) -> None:
        """n_{k+1} in the place of n_{k+2}, and what it adds to v"""
        n.mul_(self.momentum).addcmul_(v, lr, value=-1).mul_(self.adapt)
        v.add_(n, alpha=self.weight_decay)

    def along(self, g: Tensor, n: Tensor, to: Tensor) -> None:
        """u with v_k = .. + H u"""
        to.copy_(n)
        if self.clips:
            c, slope = self._clip(g)
            g = g * self.adapt
            to.mul_(c).add_(slope * (g * n).sum(1, keepdim=True) * g)
