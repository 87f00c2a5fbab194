"""Model-agnostic meta-learning (Finn, Abbeel & Levine 2017, arXiv 1703.03400)."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import forms, functional, losses
from ..arguments import (
    PER_STEP,
    are_labels,
    check_count,
    check_loss,
    check_lr,
    check_query_x,
    check_x,
    target,
    understood,
)
from ..backends import check_model, check_name, problem_for
from ..backends.precision import check_precision
from ..optimizers import SGD, check_optimizer, loss_weights


class Evaluation(NamedTuple):
    """Query loss and, for classification, accuracy of each task after 0, 1, .. steps: [steps + 1, T].

    Both are means over a task's query examples, by their weights where they have some.
    """

    loss: Tensor
    accuracy: Tensor | None


class MAML(nn.Module):
    """A model whose parameters are learned so that `steps` SGD steps adapt it to a task.

    loss, lr, steps, first_order, optimizer, step_weights, backend, chunk_tasks, checkpoint_every,
    fast_weights and precision are those of `fastmaml.functional`. lr may hold nn.Parameters that an
    optimiser learns too: one, or an nn.ParameterList of `steps`, is among MAML's own; register those in a
    dict or list yourself.
    """

    def __init__(
        self, model: nn.Module, *, loss: str | losses.Loss, lr, steps: int, first_order: bool = False,
        optimizer: SGD | None = None, step_weights: Sequence[float] | None = None,
        backend: str | None = None, chunk_tasks: int | None = None, checkpoint_every: int | None = None,
        fast_weights=None, precision: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        check_model(model)
        check_count("steps", steps, 0)
        losses.resolve(loss)
        check_loss(loss)
        check_lr(lr, steps)
        check_optimizer(optimizer)
        check_name(backend)
        check_count("chunk_tasks", chunk_tasks, 1)
        check_count("checkpoint_every", checkpoint_every, 1)
        self.optimizer, self.step_weights = optimizer, loss_weights(step_weights, steps)
        self.model, self.loss, self.lr, self.steps, self.first_order = model, loss, lr, steps, first_order
        self.backend, self.chunk_tasks, self.checkpoint_every = backend, chunk_tasks, checkpoint_every
        forms.check(fast_weights)
        check_precision(precision)
        self.fast_weights, self.precision = fast_weights, precision

    def extra_repr(self) -> str:
        more = {"optimizer": self.optimizer, "step_weights": self.step_weights}
        told = "".join(f", {name}={value}" for name, value in more.items() if value is not None)
        return f"loss={self.loss!r}, steps={self.steps}, first_order={self.first_order}{told}"

    def forward(self, x_support: Tensor, y_support, x_query: Tensor, y_query) -> Tensor:
        """The meta-loss, mean over tasks, to call `.backward()` on. x [T, N, ..]; y or (y, weight)."""
        params = dict(self.model.named_parameters())
        return functional.meta_loss(
            self.model, params, (x_support, y_support), (x_query, y_query),
            lr=self.lr, steps=self.steps, fast_weights=self.fast_weights,
            step_weights=self.step_weights, **self._common(), **self._memory(),
        )  # fmt: skip

    def adapt(self, x: Tensor, y, steps: int | None = None) -> dict[str, Tensor]:
        """Fast weights {name: [T, *shape]} after `steps` steps on the tasks' support sets; differentiable.

        steps may be more than MAML's own: of a list of step sizes the last goes on.
        """
        params, steps = dict(self.model.named_parameters()), self.steps if steps is None else steps
        check_count("steps", steps, 0)
        return functional.inner_loop(
            self.model, params, x, y, lr=self._lr(0, steps), steps=steps, **self._common(), **self._memory()
        )

    @torch.no_grad()
    def evaluate(
        self, x_support: Tensor, y_support, x_query: Tensor, y_query, steps: int | None = None
    ) -> Evaluation:
        """Query loss and accuracy after 0, .., `steps` steps. Of a list of step sizes the last goes on.

        Where fast_weights asks for factors, no weight of a task is formed. With momentum, which is no
        weight, the steps to each k begin anew.
        """
        steps = self.steps if steps is None else steps
        check_count("steps", steps, 0)
        x_support = check_x("support x", x_support)
        x_query = check_query_x(x_query, x_support)
        loss = losses.resolve(understood(self.loss, self.model, x_support, y_support, y_query))
        problem = problem_for(
            self.model, tuple(x_support.shape[2:]), loss, (x_support.shape[1], x_query.shape[1])
        )
        target(problem, y_support, x_support, "support y")
        labels, weight = target(problem, y_query, x_query, "query y")
        queries = (labels,) if weight is None else (labels, weight)
        params: dict = dict(self.model.named_parameters())
        weights, begun = params, 0  # the weights after `begun` steps
        goes_on = self.optimizer is None or self.optimizer.momentum == 0  # momentum is not among the weights
        run = {**self._run(), "chunk_tasks": self.chunk_tasks}
        classifies = isinstance(losses.built_in(loss) or loss, losses.CrossEntropy) and are_labels(labels)
        found: list[Tensor] = []
        hits: list[Tensor] = []
        for k in range(steps + 1):
            if k:
                weights = functional.inner_loop(
                    self.model, weights if goes_on else params, x_support, y_support, loss=self.loss,
                    lr=self._lr(begun, k), steps=k - begun, optimizer=self.optimizer,
                    fast_weights=self.fast_weights, **run,
                )  # fmt: skip
                begun = k if goes_on else 0
            output = functional.apply(self.model, weights, x_query, **run)
            found.append(torch.stack([loss(*task) for task in zip(output, *queries, strict=True)]))
            if classifies:
                hits.append(_accuracy(output, labels, weight))
        return Evaluation(torch.stack(found), torch.stack(hits) if hits else None)

    def _lr(self, start: int, end: int):
        """The step sizes of steps start, .., end - 1."""
        if not isinstance(self.lr, PER_STEP):
            return self.lr
        if end > 0 and len(self.lr) == 0:
            raise ValueError(f"lr holds no step size, for {end} steps")
        return [self.lr[min(k, len(self.lr) - 1)] for k in range(start, end)]

    def _common(self) -> dict:
        common = {"loss": self.loss, "first_order": self.first_order, "optimizer": self.optimizer}
        return common | self._run()

    def _run(self) -> dict[str, Any]:
        return {"backend": self.backend, "precision": self.precision}

    def _memory(self) -> dict:
        return {"chunk_tasks": self.chunk_tasks, "checkpoint_every": self.checkpoint_every}


def _accuracy(output: Tensor, labels: Tensor, weight: Tensor | None) -> Tensor:  # [T, N, C], [T, N], [T, N]
    counted = (labels != losses.IGNORED).to(output.dtype) if weight is None else weight
    return (counted * (output.argmax(-1) == labels)).sum(1) / counted.sum(1)
