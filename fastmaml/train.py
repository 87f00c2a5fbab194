"""Meta-training that can be stopped at any step and continued to the same bits."""

import math
import os
import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor


class Batches(Protocol):
    """batches[i] is meta-batch i: x_support, y_support, x_query, y_query, each [T, N, ...]."""

    def __getitem__(self, index: int, /) -> Iterable[Tensor]: ...


class Interrupted(Exception):
    """Training stopped by a signal, after the checkpoint (if it keeps one) was written."""

    def __init__(self, signum: int, step: int, checkpoint: Path | None) -> None:
        kept = f"; the same command with --resume continues from {checkpoint}" if checkpoint else ""
        super().__init__(f"stopped by {signal.Signals(signum).name} at step {step}{kept}")
        self.signum = signum


class StopSignals:
    """Notes SIGINT or SIGTERM so that the loop can finish its step; the second one acts as usual."""

    received: int | None = None

    def __enter__(self) -> "StopSignals":
        self._old: dict[int, Any] = {}
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._old[number] = signal.signal(number, self._note)
            except ValueError:  # not the main thread: signals are not ours to take
                break
        return self

    def _note(self, number: int, frame: Any) -> None:
        self.received = number
        self._restore()

    def _restore(self) -> None:
        for number, old in self._old.items():
            signal.signal(number, old)
        self._old = {}

    def __exit__(self, *exception: object) -> None:
        self._restore()


def save_atomically(state: dict[str, Any], path: Path) -> None:
    """torch.save that leaves either the old file or the new one, whatever happens in between."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    with open(unfinished, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)


def flatten(parameters: list[torch.nn.Parameter]) -> torch.nn.Parameter:
    """Moves parameters and their gradients into one vector [P] each, of which they become views."""
    flat = torch.nn.Parameter(torch.cat([p.detach().flatten() for p in parameters]))
    flat.grad = torch.zeros_like(flat)
    sizes = [p.numel() for p in parameters]
    for p, values, grads in zip(parameters, flat.detach().split(sizes), flat.grad.split(sizes), strict=True):
        p.data = values.view_as(p)
        p.grad = grads.view_as(p)
    return flat


class Training:
    """A meta-training run and all that its future depends on: model, Adam's state, step, history.

    batches[step] is the meta-batch of that step and depends on nothing but `step` (as in fastmaml.tasks), so
    the step is the place of the task sampler too. `history` has one dict a log line: step, loss (mean since
    the last line), meta_lr, and what `evaluate` returned, if it ran there.
    """

    def __init__(
        self,
        maml: torch.nn.Module,
        batches: Batches,
        *,
        iterations: int,
        meta_lr: float = 1e-3,
        decay: str = "none",
        settings: dict[str, Any] | None = None,
    ) -> None:
        self.maml, self.batches = maml, batches
        self.iterations, self.meta_lr, self.decay = iterations, meta_lr, decay
        self.settings = settings or {}
        # In small nets a step of Adam is call overhead, and one vector needs a sixth of the calls of six.
        # fused=True would wait for OpenMP threads even here: 28 ms a step on two busy cores.
        self.flat = flatten([p for p in maml.parameters() if p.requires_grad])
        self.optimizer = torch.optim.Adam([self.flat], lr=meta_lr, foreach=False)
        self.step, self.seconds = 0, 0.0
        self.history: list[dict[str, float]] = []
        self.loss_sum = torch.zeros((), dtype=torch.float64)
        self.loss_count = 0

    def learning_rate(self) -> float:
        if self.decay == "cosine":
            return self.meta_lr * 0.5 * (1 + math.cos(math.pi * self.step / self.iterations))
        return self.meta_lr

    def advance(self) -> None:
        """One meta-step."""
        assert self.flat.grad is not None
        self.flat.grad.zero_()
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        loss = self.maml(*self.batches[self.step])
        loss.backward()
        self.optimizer.step()
        self.loss_sum += loss.detach()
        self.loss_count += 1
        self.step += 1

    def fit(
        self,
        *,
        checkpoint: Path | None = None,
        checkpoint_every: int = 1000,
        log_every: int = 100,
        evaluate: Callable[[], dict[str, float]] | None = None,
        evaluate_every: int = 1000,
        report: Callable[[dict[str, float]], None] = lambda line: None,
        tick: Callable[[int], None] = lambda step: None,
    ) -> None:
        """Trains up to `iterations`. report(line) gets each new line of the history, tick(step) each step.

        On SIGINT or SIGTERM finishes the step, writes the checkpoint and raises Interrupted. Raises
        FloatingPointError when the loss is no longer finite.
        """
        started = time.perf_counter() - self.seconds
        with StopSignals() as signals:
            while self.step < self.iterations:
                self.advance()
                tick(self.step)
                last = self.step == self.iterations
                evaluate_now = last or self.step % evaluate_every == 0
                if evaluate_now or self.step % log_every == 0:
                    self._log(evaluate if evaluate_now else None, report)
                if last or signals.received or self.step % checkpoint_every == 0:
                    self.seconds = time.perf_counter() - started
                    if checkpoint:
                        self.save(checkpoint)
                if signals.received:
                    raise Interrupted(signals.received, self.step, checkpoint)

    def _log(self, evaluate: Callable[[], dict[str, float]] | None, report: Callable[[dict], None]) -> None:
        line = {
            "step": self.step,
            "loss": self.loss_sum.item() / self.loss_count,
            "meta_lr": self.optimizer.param_groups[0]["lr"],
        }
        if not math.isfinite(line["loss"]):
            raise FloatingPointError(
                f"the meta-loss is {line['loss']} at step {self.step}: lower the inner or meta learning rate"
            )
        self.loss_sum.zero_()
        self.loss_count = 0
        self.history.append(line | (evaluate() if evaluate else {}))
        report(self.history[-1])

    def save(self, path: Path) -> None:
        state = {
            "settings": self.settings,
            "model": self.maml.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "history": self.history,
            "loss_sum": self.loss_sum,
            "loss_count": self.loss_count,
        }
        save_atomically(state, path)

    def load(self, path: Path) -> None:
        """Continues from `path`. Raises ValueError if that run had other settings."""
        state = torch.load(path, weights_only=True)
        differ = [
            f"{name} was {state['settings'].get(name)!r} and is now {value!r}"
            for name, value in self.settings.items()
            if state["settings"].get(name) != value
        ]
        if differ:
            raise ValueError(f"{path} is of a run with other settings: {'; '.join(differ)}")
        self.maml.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds, self.history = state["step"], state["seconds"], state["history"]
        self.loss_sum, self.loss_count = state["loss_sum"], state["loss_count"]
