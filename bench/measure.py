"""Interleaved timing: every contender gets a turn in every round, so that all see the same machine."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

TURN = 0.03  # seconds a turn lasts at most, one call at least
SLOW = 0.15  # seconds a call, from which on a contender sits out some rounds
MOST_SKIPPED = 8
SGEMM_SIZE = 2048


@dataclass
class Times:
    """Seconds of every call; `first` are those that came right after another contender's turn."""

    calls: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.calls)

    @property
    def best(self) -> float:
        return min(self.calls)

    @property
    def behind_another(self) -> float:
        """Median of the first calls of the turns: caches cold, other libraries' thread pools still awake."""
        return statistics.median(self.first)

    def summary(self) -> dict[str, float | int]:
        quartiles = statistics.quantiles(self.calls, n=4) if len(self.calls) > 1 else [self.median] * 3
        return {
            "median_ms": 1e3 * self.median,
            "min_ms": 1e3 * self.best,
            "q1_ms": 1e3 * quartiles[0],
            "q3_ms": 1e3 * quartiles[2],
            "behind_another_ms": 1e3 * self.behind_another,
            "calls": len(self.calls),
            "turns": len(self.first),
        }


def sgemm_step() -> Callable[[], Tensor]:
    """The machine's yardstick: torch's float32 product of two 2048 x 2048 matrices."""
    a, b = torch.randn(2, SGEMM_SIZE, SGEMM_SIZE).unbind()
    out = torch.empty(SGEMM_SIZE, SGEMM_SIZE)
    return lambda: torch.mm(a, b, out=out)


def sgemm_flops_per_second(times: Times) -> float:
    return 2 * SGEMM_SIZE**3 / times.median


def _turn(step: Callable[[], Any], times: Times, most: float) -> None:
    spent = 0.0
    while not spent or spent + times.calls[-1] < most:
        start = time.perf_counter()
        step()
        seconds = time.perf_counter() - start
        times.calls.append(seconds)
        if not spent:
            times.first.append(seconds)
        spent += seconds


def interleave(steps: dict[str, Callable[[], Any]], seconds: float, rounds: int = 3) -> dict[str, Times]:
    """Time `steps` in turns until about `seconds` for each are spent in all and each has had `rounds` turns.

    All are spread over the whole of the run, so that a machine that slows down slows all of them: a slow
    contender takes its turn every n-th round, not its turns at the beginning. The order is reversed every
    other round.
    """
    times = {name: Times() for name in steps}
    every = {}
    for name, step in steps.items():  # warm-up
        step()
        start = time.perf_counter()
        step()
        every[name] = min(MOST_SKIPPED, max(1, round((time.perf_counter() - start) / SLOW)))
    done, spent = 0, 0.0
    while spent < seconds * len(steps) or min(len(t.first) for t in times.values()) < rounds:
        start = time.perf_counter()
        for name in list(steps) if done % 2 == 0 else reversed(list(steps)):
            # offset by half: the round 0 of everybody would else be crowded with the slow
            if done % every[name] == every[name] // 2:
                _turn(steps[name], times[name], TURN)
        spent += time.perf_counter() - start
        done += 1
    return times


def error(gradients: Sequence[Any], truth: Sequence[Tensor]) -> float:
    """Largest difference over the truth's largest entry; NaN if a gradient is NaN, missing or misshapen."""
    if len(gradients) != len(truth):
        return float("nan")
    scale = max(float(t.abs().max()) for t in truth)
    worst = 0.0
    for g, t in zip(gradients, truth, strict=True):
        if g is None or tuple(g.shape) != tuple(t.shape):
            return float("nan")
        g = g.detach() if isinstance(g, Tensor) else torch.from_numpy(np.array(g))
        difference = float((g.double() - t).abs().max())
        if math.isnan(difference):
            return difference
        worst = max(worst, difference)
    return worst / scale
