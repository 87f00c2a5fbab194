"""Sine-wave regression, the first experiment of the MAML paper."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .episodes import Episodes, EpisodeStream, positive

BLOCK_FLOATS = 1 << 15


@dataclass(frozen=True)
class SineEpisodes(Episodes):
    """Sine tasks; x and y are [T, N, 1] float32."""

    amplitude: Tensor  # [T]
    phase: Tensor  # [T]

    def curve(self, x: Tensor) -> Tensor:
        """amplitude * sin(x - phase) of every task; x [N, 1] or [T, N, 1] -> [T, N, 1]."""
        return self.amplitude[:, None, None] * torch.sin(x - self.phase[:, None, None])


class Sine(EpisodeStream[SineEpisodes]):
    """y = amplitude * sin(x - phase), drawn uniformly per task (Finn et al. 2017, section 5.1).

    Every meta-batch is `tasks` new waves with `shots` support and `queries` query points; see `EpisodeStream`
    for indexing, iterating, resuming. Training and evaluation should differ in `seed`.

    amplitude, phase, x: the ranges (low, high); the defaults are the paper's.
    Raises ValueError for a size below 1, a negative seed, or a range whose high is below its low.
    """

    def __init__(
        self,
        shots: int = 10,
        queries: int = 10,
        tasks: int = 25,
        seed: int = 0,
        *,
        batches: int | None = None,
        amplitude: tuple[float, float] = (0.1, 5.0),
        phase: tuple[float, float] = (0.0, math.pi),
        x: tuple[float, float] = (-5.0, 5.0),
    ) -> None:
        super().__init__(seed, batches)
        positive(shots=shots, queries=queries, tasks=tasks)
        for name, (low, high) in {"amplitude": amplitude, "phase": phase, "x": x}.items():
            if not low <= high:
                raise ValueError(f"{name} must be a range (low, high), got ({low}, {high})")
        self.shots, self.queries, self.tasks = shots, queries, tasks
        self.amplitude, self.phase, self.x = amplitude, phase, x
        # One generator per block of meta-batches: seeding one costs more than drawing 25 tasks.
        self._block_size = max(1, BLOCK_FLOATS // (tasks * (shots + queries + 2)))
        self._block_key: tuple[int, int] | None = None
        self._block: dict[str, Tensor] = {}

    def make(self, index: int) -> SineEpisodes:
        block, i = divmod(index, self._block_size)
        if self._block_key != (self.seed, block):
            self._block = self._draw(block)
            self._block_key = (self.seed, block)
        # Copies, because what the caller writes into must not come back with the same index.
        return SineEpisodes(**{name: tensor[i].clone() for name, tensor in self._block.items()})

    def _draw(self, block: int) -> dict[str, Tensor]:
        rng = np.random.default_rng((self.seed, block))
        B, T = self._block_size, self.tasks
        unit = rng.random((B, T, self.shots + self.queries + 2), dtype=np.float32)

        def spread(u: np.ndarray, bounds: tuple[float, float]) -> np.ndarray:
            low, high = np.float32(bounds[0]), np.float32(bounds[1])
            return low + u * (high - low)

        amplitude = spread(unit[..., 0], self.amplitude)  # [B, T]
        phase = spread(unit[..., 1], self.phase)
        x = spread(unit[..., 2:], self.x)  # [B, T, N + Nq]
        y = amplitude[..., None] * np.sin(x - phase[..., None])
        arrays = {
            "x_support": x[..., : self.shots, None],
            "y_support": y[..., : self.shots, None],
            "x_query": x[..., self.shots :, None],
            "y_query": y[..., self.shots :, None],
            "amplitude": amplitude,
            "phase": phase,
        }
        return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
