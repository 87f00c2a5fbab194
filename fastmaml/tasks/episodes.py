"""What every task source yields, and the index-seeded stream they share."""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, Generic, Self, TypeVar

import torch
from torch import Tensor
from torch.utils.data import Dataset


@dataclass(frozen=True)
class Episodes:
    """A meta-batch of `T` tasks; unpacks as `x_support, y_support, x_query, y_query = episodes`."""

    x_support: Tensor  # [T, N, ...]
    y_support: Tensor  # [T, N, ...]
    x_query: Tensor  # [T, Nq, ...]
    y_query: Tensor  # [T, Nq, ...]

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.x_support, self.y_support, self.x_query, self.y_query))

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """`Tensor.to` of every tensor that is floating; of the others only when no dtype is asked for."""
        dtype = next((a for a in (*args, *kwargs.values()) if isinstance(a, torch.dtype)), None)
        moved = {}
        for name, tensor in self._tensors():
            keep = dtype is not None and not tensor.is_floating_point()
            out = tensor.to(*args, **kwargs)
            moved[name] = out.to(tensor.dtype) if keep else out
        return replace(self, **moved)

    def pin_memory(self) -> Self:
        """Called by `DataLoader(..., pin_memory=True)`."""
        return replace(self, **{name: tensor.pin_memory() for name, tensor in self._tensors()})

    def _tensors(self) -> list[tuple[str, Tensor]]:
        return [(field.name, getattr(self, field.name)) for field in fields(self)]


E = TypeVar("E", bound=Episodes)


class EpisodeStream(Dataset[E], Generic[E]):
    """Meta-batches numbered 0, 1, 2, ..., each a function of (seed, number) alone.

    `stream[i]` is meta-batch i at any time, in any process: hand the stream to
    `DataLoader(stream, batch_size=None, num_workers=2)`, to resume with `sampler=range(done, total)`, and no
    two workers make the same episodes. `sample()` and iteration walk through the numbers from where the
    stream stands; `state_dict()` keeps that place, so that a resumed run sees what an uninterrupted one does.

    batches: how many there are. None is an endless stream: `len` then raises TypeError, and a DataLoader
        needs `sampler=`.
    """

    def __init__(self, seed: int, batches: int | None) -> None:
        if seed < 0:
            raise ValueError(f"seed must be at least 0, got {seed}")
        if batches is not None and batches < 1:
            raise ValueError(f"batches must be at least 1 or None, got {batches}")
        self.seed = seed
        self.batches = batches
        self.index = 0

    def make(self, index: int) -> E:
        """Meta-batch `index`; what a subclass provides."""
        raise NotImplementedError

    def __getitem__(self, index: int) -> E:
        if index < 0 or (self.batches is not None and index >= self.batches):
            last = "" if self.batches is None else self.batches - 1
            raise IndexError(f"index must be in 0..{last}, got {index}")
        return self.make(index)

    def __len__(self) -> int:
        if self.batches is None:
            raise TypeError(
                "an endless stream has no length: give it batches=, or the DataLoader sampler=range(n)"
            )
        return self.batches

    def sample(self) -> E:
        """The next meta-batch. A stream of `batches` starts again from the first after the last."""
        episodes = self[self.index]
        self.index += 1
        if self.index == self.batches:
            self.index = 0
        return episodes

    def __iter__(self) -> Iterator[E]:
        while True:
            yield self.sample()
            if self.batches is not None and self.index == 0:
                return

    def state_dict(self) -> dict[str, int]:
        """The place in the stream: {"seed", "index"}, plain integers."""
        return {"seed": self.seed, "index": self.index}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes to the place that `state_dict` described. Raises KeyError for a state of something else."""
        self.seed, self.index = int(state["seed"]), int(state["index"])


def positive(**sizes: int) -> None:
    """Raises ValueError naming the first size below 1."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
