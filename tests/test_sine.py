"""Sine waves: the paper's distribution, numbered and resumable meta-batches."""

import itertools
import math
import pickle

import pytest
import torch
from torch.utils.data import DataLoader

from fastmaml.tasks import Sine, SineEpisodes


def same(a: SineEpisodes, b: SineEpisodes) -> bool:
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in SineEpisodes.__dataclass_fields__)


def test_shapes_and_dtypes() -> None:
    episodes = Sine(shots=5, queries=7, tasks=3).sample()
    x_support, y_support, x_query, y_query = episodes
    assert x_support.shape == y_support.shape == (3, 5, 1)
    assert x_query.shape == y_query.shape == (3, 7, 1)
    assert episodes.amplitude.shape == episodes.phase.shape == (3,)
    assert all(t.dtype == torch.float32 and t.is_contiguous() for t in episodes)


def test_points_lie_on_the_curve() -> None:
    episodes = Sine(tasks=50).sample()
    for x, y in ((episodes.x_support, episodes.y_support), (episodes.x_query, episodes.y_query)):
        torch.testing.assert_close(episodes.curve(x), y, rtol=0, atol=1e-5)
    grid = torch.linspace(-5, 5, 100)[:, None]
    assert episodes.curve(grid).shape == (50, 100, 1)


def test_distribution_is_the_papers() -> None:
    episodes = Sine(shots=10, queries=10, tasks=20000).sample()
    ranges = {"amplitude": (0.1, 5), "phase": (0, math.pi), "x_support": (-5, 5), "x_query": (-5, 5)}
    for name, (low, high) in ranges.items():
        values = getattr(episodes, name)
        assert low <= values.min()
        assert values.max() <= high + 1e-6
        # uniform: mean and variance within six standard errors
        unit = (values.double().flatten() - low) / (high - low)
        assert abs(unit.mean() - 1 / 2) < 6 * math.sqrt(1 / 12 / len(unit))
        assert abs(unit.var() - 1 / 12) < 6 * math.sqrt(1 / 180 / len(unit))
    assert abs(torch.corrcoef(torch.stack([episodes.amplitude, episodes.phase]))[0, 1]) < 0.05


def test_a_batch_depends_on_seed_and_index_alone() -> None:
    sine = Sine(tasks=4, seed=3)
    walked = list(itertools.islice(sine, 200))
    fresh = Sine(tasks=4, seed=3)
    for index in (199, 0, 77, 78):
        assert same(fresh[index], walked[index])
    assert not same(Sine(tasks=4, seed=4)[0], walked[0])
    firsts = torch.stack([episodes.amplitude[0] for episodes in walked])
    assert len(firsts.unique()) == 200


# blocks of generated batches are an implementation detail that indexing must not show
@pytest.mark.parametrize("tasks", [1, 25, 5000])
def test_block_edges(tasks: int) -> None:
    sine = Sine(tasks=tasks)
    edge = sine._block_size
    forward = [sine[i] for i in (edge - 1, edge)]
    backward = [sine[i] for i in (edge, edge - 1)]
    assert same(forward[0], backward[1])
    assert same(forward[1], backward[0])
    assert not same(forward[0], forward[1])


def test_writing_into_a_batch_does_not_change_the_stream() -> None:
    sine = Sine()
    first = sine[0]
    kept = first.x_support.clone()
    first.x_support.zero_()
    assert torch.equal(sine[0].x_support, kept)


def test_resume() -> None:
    sine = Sine(seed=5)
    for _ in range(30):
        sine.sample()
    state = sine.state_dict()
    resumed = Sine(seed=0)
    resumed.load_state_dict(pickle.loads(pickle.dumps(state)))
    assert all(same(resumed.sample(), sine.sample()) for _ in range(100))


def test_finite_stream() -> None:
    sine = Sine(batches=3)
    assert len(sine) == 3
    assert len(list(sine)) == 3
    with pytest.raises(IndexError, match=r"index must be in 0\.\.2, got 3"):
        sine[3]
    with pytest.raises(TypeError, match="endless"):
        len(Sine())


def test_dataloader_keeps_amplitude_and_phase() -> None:
    sine = Sine(batches=4)
    for index, episodes in enumerate(DataLoader(sine, batch_size=None)):
        assert same(episodes, sine[index])


def test_to_moves_every_tensor() -> None:
    episodes = Sine(tasks=2).sample().to(torch.float64)
    assert isinstance(episodes, SineEpisodes)
    assert {t.dtype for t in (*episodes, episodes.amplitude, episodes.phase)} == {torch.float64}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shots": 0}, "shots must be at least 1, got 0"),
        ({"queries": -1}, "queries must be at least 1, got -1"),
        ({"tasks": 0}, "tasks must be at least 1, got 0"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"batches": 0}, "batches must be at least 1 or None, got 0"),
        ({"phase": (2.0, 1.0)}, "phase must be a range"),
        ({"amplitude": (math.nan, 1.0)}, "amplitude must be a range"),
    ],
)
def test_bad_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sine(**arguments)
