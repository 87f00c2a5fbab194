"""Omniglot characters and episodes of images."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import omniglot_files
from .episodes import Episodes, EpisodeStream, positive

ROWS_AT_ONCE = 256  # 1 MB of pixels, so that the three passes over them meet in cache


class Omniglot:
    """Omniglot (Lake et al. 2015) as in the MAML paper: 28 x 28, 1200 random characters to train on.

    root: the folder of the official images_background.zip and images_evaluation.zip. Nothing is downloaded.
    split: "train", "validation" or "test", which is all the rest.
    seed: of the one permutation of all characters that the splits are cut from.
    characters: how many are for training; the first `validation` of these are kept out of "train" and are
        "validation" (the MAML code takes 100; 0 here, as the paper tells it).
    rotations: characters turned by 90, 180, 270 degrees counterclockwise are classes of their own, in every
        split, as in the MAML code, which turns test characters too. An episode has a character in one
        rotation only, as there: many look the same when turned.
    resize: "nearest" gives the pixels that the MAML code trained on: its script asks Pillow for Lanczos, but
        for one-bit images, as these are, Pillow takes the nearest pixel whatever it is asked. "lanczos" is
        what the script meant, and easier: 5-way 1-shot by nearest neighbour in pixels is right in 43.8 %,
        not 37.5 %.
    cache: folder for the decoded images, by default FASTMAML_CACHE or the user's cache folder. 102 MB, made
        once in about 10 s, then memory-mapped, shared by processes. Made anew for archives of another size.

    `images` is [characters, 4, drawers, 28, 28] uint8, ink = 255, of all splits; `classes` says which
    characters are in this one. Raises FileNotFoundError or ValueError where an archive is missing or damaged,
    naming it and where to put it.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str = "train",
        *,
        seed: int = 0,
        characters: int = 1200,
        validation: int = 0,
        rotations: bool = True,
        resize: str = "nearest",
        cache: str | os.PathLike[str] | None = None,
    ) -> None:
        if split not in ("train", "validation", "test"):
            raise ValueError(f'split must be "train", "validation" or "test", got {split!r}')
        if resize not in omniglot_files.RESIZES:
            raise ValueError(f'resize must be "nearest" or "lanczos", got {resize!r}')
        self.root = Path(root).expanduser()
        self.cache = omniglot_files.default_cache() if cache is None else Path(cache).expanduser()
        self.split = split
        self.resize = resize
        self.rotations = omniglot_files.ROTATIONS if rotations else 1
        self.images = self._load()
        total = len(self.images)
        if not 0 <= validation < characters < total:
            wanted = f"0 <= validation < characters < {total}, the number of characters in {self.root}"
            raise ValueError(f"must have {wanted}, got validation={validation}, characters={characters}")
        order = np.random.default_rng(seed).permutation(total)
        held_out, train, test = np.split(order, [validation, characters])
        self.classes: np.ndarray = {"validation": held_out, "train": train, "test": test}[split]

    def __len__(self) -> int:
        """How many classes: characters of the split times rotations."""
        return len(self.classes) * self.rotations

    @property
    def names(self) -> list[str]:
        """Of every character of `images`, as "Tifinagh/character50"."""
        archives = omniglot_files.archives(self.root)
        return [name for archive in archives for name in omniglot_files.members(archive)]

    def _load(self) -> Tensor:
        return torch.from_numpy(omniglot_files.load(self.root, self.resize, self.cache))

    # A worker that is started afresh maps the file again instead of receiving 102 MB.
    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "images"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.images = self._load()


class EpisodeSampler(EpisodeStream[Episodes]):
    """Few-shot classification episodes: x [T, N, 1, H, W] float32 in 0..1, y [T, N] int64.

    Every task has `ways` classes of distinct characters in random order, the order being the labels; each
    class has `shots` support examples (N = ways * shots, class by class) and `queries` queries by other
    drawers. See `EpisodeStream` for indexing, iterating, resuming and use in a DataLoader.

    dataset: what is used of it is `images` [characters, rotations, drawers, H, W] uint8, `classes` (which of
        the characters) and `rotations` (how many of them).
    flat: x is [T, N, H * W], for networks without convolutions.
    Raises ValueError for a size below 1, more ways than characters, shots + queries above the drawers.
    """

    def __init__(
        self,
        dataset: Omniglot,
        ways: int = 5,
        shots: int = 1,
        queries: int = 15,
        tasks: int = 32,
        seed: int = 0,
        *,
        batches: int | None = None,
        flat: bool = False,
    ) -> None:
        super().__init__(seed, batches)
        positive(ways=ways, shots=shots, queries=queries, tasks=tasks)
        characters, drawers = len(dataset.classes), dataset.images.shape[2]
        if ways > characters:
            raise ValueError(f"ways must be at most {characters}, the characters of the split, got {ways}")
        if shots + queries > drawers:
            raise ValueError(f"shots + queries must be at most {drawers} (drawers), got {shots} + {queries}")
        self.dataset = dataset
        self.ways, self.shots, self.queries, self.tasks = ways, shots, queries, tasks
        self.flat = flat

    def make(self, index: int) -> Episodes:
        rng = np.random.default_rng((self.seed, index))
        T, W = self.tasks, self.ways
        _, R, D, height, width = self.dataset.images.shape
        character = self.dataset.classes[distinct(rng, T, W, len(self.dataset.classes))]  # [T, W]
        rotation = rng.integers(0, self.dataset.rotations, (T, W))
        drawer = rng.random((T, W, D)).argsort(axis=2)[..., : self.shots + self.queries]
        row = (character * R + rotation)[..., None] * D + drawer  # [T, W, shots + queries]
        # numpy and not torch, whose thread pool would wake for it beside the one that trains
        pixels = self.dataset.images.numpy().reshape(-1, height * width)
        image_shape = (height * width,) if self.flat else (1, height, width)

        def images(rows: np.ndarray) -> Tensor:
            rows = rows.reshape(-1)
            x = np.empty((len(rows), height * width), np.float32)
            for start in range(0, len(rows), ROWS_AT_ONCE):
                some = slice(start, start + ROWS_AT_ONCE)
                x[some] = pixels.take(rows[some], axis=0, mode="clip")  # the fastest mode
                x[some] *= np.float32(1 / 255)
            return torch.from_numpy(x).view(T, -1, *image_shape)

        def labels(each: int) -> Tensor:
            return torch.from_numpy(np.tile(np.arange(W).repeat(each), (T, 1)))

        support, query = row[..., : self.shots], row[..., self.shots :]
        return Episodes(images(support), labels(self.shots), images(query), labels(self.queries))


def distinct(rng: np.random.Generator, rows: int, k: int, n: int) -> np.ndarray:
    """`rows` ordered draws of k different numbers below n, uniform; [rows, k]."""
    if k * k > n:
        return rng.random((rows, n)).argsort(axis=1)[:, :k]
    # A row drawn again until it has no repeats is uniform; with k * k <= n most are right at once.
    drawn = rng.integers(0, n, (rows, k))
    while True:
        ordered = np.sort(drawn, axis=1)
        bad = np.flatnonzero((ordered[:, 1:] == ordered[:, :-1]).any(axis=1))
        if not len(bad):
            return drawn
        drawn[bad] = rng.integers(0, n, (len(bad), k))
