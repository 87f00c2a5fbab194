"""Omniglot: decoding, cache, split, episodes.

On small archives of the official layout, and on the real ones where FASTMAML_OMNIGLOT names their folder.
"""

import io
import itertools
import os
import pickle
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from fastmaml.tasks import Episodes, EpisodeSampler, Omniglot, omniglot_files

REAL = os.environ.get("FASTMAML_OMNIGLOT")
BACKGROUND, EVALUATION = {"Zulu": 4, "Aleph": 5}, {"Mu": 6}  # characters of each alphabet
CHARACTERS, DRAWERS = 15, 20


def drawing(character: int, drawer: int) -> bytes:
    """105 x 105 of one bit, white 1: a bar on top and both numbers in bits; no two alike when turned."""
    ink = np.zeros((7, 7), bool)
    ink[0, :3] = True
    ink[2, 1:5] = [character >> bit & 1 for bit in range(4)]
    ink[4, 1:6] = [drawer >> bit & 1 for bit in range(5)]
    out = io.BytesIO()
    Image.fromarray(~ink.repeat(15, 0).repeat(15, 1)).save(out, "PNG")
    return out.getvalue()


def write_archives(root: Path) -> None:
    root.mkdir(parents=True, exist_ok=True)
    number = 0
    for name, alphabets in (("images_background", BACKGROUND), ("images_evaluation", EVALUATION)):
        with zipfile.ZipFile(root / f"{name}.zip", "w") as z:
            z.writestr(f"__MACOSX/{name}/._x.png", b"not an image")
            for alphabet, count in alphabets.items():
                for c in range(1, count + 1):
                    for drawer in reversed(range(DRAWERS)):
                        path = f"{name}/{alphabet}/character{c:02}/{number:04}_{drawer + 1:02}.png"
                        z.writestr(path, drawing(number, drawer))
                    number += 1


@pytest.fixture(scope="session")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("omniglot")
    write_archives(root)
    return root


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def train(archives: Path, cache: Path) -> Omniglot:
    return Omniglot(archives, characters=10, cache=cache)


def same(a: Episodes, b: Episodes) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_images_are_the_archives(train: Omniglot) -> None:
    assert train.images.shape == (CHARACTERS, 4, DRAWERS, 28, 28)
    assert train.images.dtype == torch.uint8
    assert train.names[:6] == [f"Aleph/character{c:02}" for c in range(1, 6)] + ["Zulu/character01"]
    numbers = [*range(4, 9), *range(4), *range(9, 15)]  # Aleph was written after Zulu
    for c, number in enumerate(numbers):
        for drawer in (0, 7, 19):
            image = Image.open(io.BytesIO(drawing(number, drawer)))
            # as the MAML code's script has it
            expected = np.array(image.resize((28, 28), Image.Resampling.LANCZOS))
            assert np.array_equal(train.images[c, 0, drawer].numpy(), np.where(expected, 0, 255))


def test_lanczos_is_smooth(archives: Path, cache: Path, train: Omniglot) -> None:
    smooth = Omniglot(archives, characters=10, resize="lanczos", cache=cache)
    assert len(smooth.images.unique()) > 10
    assert set(train.images.unique().tolist()) == {0, 255}
    difference = smooth.images.double().mean() - train.images.double().mean()
    assert abs(difference) < 10


def test_rotations_turn_counterclockwise(train: Omniglot) -> None:
    upright = train.images[:, 0]
    for r in range(4):
        assert torch.equal(train.images[:, r], torch.rot90(upright, r, (2, 3)))


def test_splits_partition_the_characters(archives: Path, cache: Path) -> None:
    def classes(split: str, seed: int) -> list[int]:
        return Omniglot(archives, split, characters=9, validation=2, seed=seed, cache=cache).classes.tolist()

    parts = [classes(split, 0) for split in ("train", "validation", "test")]
    assert [len(part) for part in parts] == [7, 2, 6]
    assert sorted(itertools.chain(*parts)) == list(range(CHARACTERS))
    assert classes("train", 0) == parts[0]
    assert classes("train", 1) != parts[0]
    assert len(Omniglot(archives, "test", characters=9, cache=cache)) == 24
    assert len(Omniglot(archives, "test", characters=9, rotations=False, cache=cache)) == 6


@pytest.mark.parametrize("flat", [False, True])
def test_episode_shapes(train: Omniglot, flat: bool) -> None:
    sampler = EpisodeSampler(train, ways=4, shots=2, queries=3, tasks=6, flat=flat)
    x_support, y_support, x_query, y_query = sampler.sample()
    image = (784,) if flat else (1, 28, 28)
    assert x_support.shape == (6, 8, *image)
    assert x_query.shape == (6, 12, *image)
    assert x_support.dtype == x_query.dtype == torch.float32
    assert y_support.dtype == y_query.dtype == torch.int64
    assert y_support.tolist() == [[0, 0, 1, 1, 2, 2, 3, 3]] * 6
    assert y_query.tolist() == [[0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]] * 6
    assert x_support.min() == 0
    assert x_support.max() == 1
    assert all(t.is_contiguous() for t in (x_support, y_support, x_query, y_query))


def origins(dataset: Omniglot, x: torch.Tensor) -> np.ndarray:
    """(character, rotation, drawer) of each image, found by comparing pixels; [..., 3]."""
    table = {image.numpy().tobytes(): i for i, image in enumerate(dataset.images.flatten(0, 2))}
    assert len(table) == CHARACTERS * 4 * DRAWERS
    rows = [table[(image * 255).round().byte().numpy().tobytes()] for image in x.flatten(0, 1)]
    found = np.stack(np.unravel_index(rows, dataset.images.shape[:3]), -1)
    return found.reshape(*x.shape[:2], 3)


def test_episodes_are_what_they_promise(train: Omniglot) -> None:
    ways, shots, queries, tasks = 5, 3, 17, 16
    sampler = EpisodeSampler(train, ways, shots, queries, tasks)
    seen = set()
    for index in range(3):
        episodes = sampler[index]
        support = origins(train, episodes.x_support).reshape(tasks, ways, shots, 3)
        query = origins(train, episodes.x_query).reshape(tasks, ways, queries, 3)
        both = np.concatenate([support, query], 2)
        assert (both[..., :2] == both[:, :, :1, :2]).all(), "one character in one rotation is one class"
        for task in both:
            assert len(set(task[:, 0, 0])) == ways, "distinct characters"
            assert all(len(set(drawers)) == shots + queries for drawers in task[..., 2]), "disjoint drawers"
        assert set(both[..., 0].ravel()) <= set(train.classes)
        seen |= {tuple(c) for c in both[:, :, 0, :2].reshape(-1, 2).tolist()}
    assert len(seen) == 40, "every character in every rotation comes up"


def test_labels_are_in_random_order(train: Omniglot) -> None:
    episodes = EpisodeSampler(train, ways=2, queries=1, tasks=400)[0]
    first, second = origins(train, episodes.x_support)[..., 0].T
    assert 140 < (first < second).sum() < 260


def test_without_rotations(archives: Path, cache: Path) -> None:
    upright = Omniglot(archives, characters=10, rotations=False, cache=cache)
    episodes = EpisodeSampler(upright, queries=1, tasks=50)[0]
    assert (origins(upright, episodes.x_support)[..., 1] == 0).all()


@pytest.mark.parametrize(("k", "n"), [(1, 1), (2, 5), (5, 5), (3, 100)])
def test_distinct_is_uniform(k: int, n: int) -> None:
    from fastmaml.tasks.omniglot import distinct

    drawn = distinct(np.random.default_rng(0), 40000, k, n)
    assert drawn.shape == (40000, k)
    assert all(len(set(row)) == k for row in drawn.tolist())
    for column in drawn.T:
        expected = 40000 / n
        chi2 = ((np.bincount(column, minlength=n) - expected) ** 2 / expected).sum()
        assert chi2 < n - 1 + 6 * np.sqrt(2 * n)


def test_a_batch_depends_on_seed_and_index_alone(train: Omniglot) -> None:
    sampler = EpisodeSampler(train, tasks=3, seed=1)
    walked = [sampler.sample() for _ in range(5)]
    fresh = EpisodeSampler(train, tasks=3, seed=1)
    assert all(same(fresh[i], walked[i]) for i in (4, 0, 2))
    assert not same(walked[0], walked[1])
    assert not same(walked[0], EpisodeSampler(train, tasks=3, seed=2)[0])
    fresh.load_state_dict(sampler.state_dict())
    assert same(fresh.sample(), sampler.sample())


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than there are cores
@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_dataloader_workers(train: Omniglot, start: str) -> None:
    sampler = EpisodeSampler(train, tasks=3, batches=6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of fork in a process with threads
        whole = list(DataLoader(sampler, batch_size=None, num_workers=2, multiprocessing_context=start))
    assert len(whole) == 6
    assert all(same(episodes, sampler[index]) for index, episodes in enumerate(whole))


def test_dataloader_resumes_by_index(train: Omniglot) -> None:
    sampler = EpisodeSampler(train, tasks=3)
    rest = list(DataLoader(sampler, batch_size=None, sampler=range(4, 6)))
    assert [same(a, b) for a, b in zip(rest, (sampler[4], sampler[5]), strict=True)] == [True, True]


def test_pickle_leaves_the_images_out(train: Omniglot) -> None:
    text = pickle.dumps(EpisodeSampler(train, tasks=3))
    assert len(text) < 5000
    assert same(pickle.loads(text)[0], EpisodeSampler(train, tasks=3)[0])


def test_cache_is_made_once(archives: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = Omniglot(archives, characters=10, cache=tmp_path).images
    (file,) = tmp_path.iterdir()
    monkeypatch.setattr(omniglot_files, "read", lambda *_: pytest.fail("decoded again"))
    again = Omniglot(archives, "test", characters=10, cache=tmp_path).images
    assert torch.equal(images, again)
    again.zero_()  # a private page, never the file
    assert torch.equal(Omniglot(archives, characters=10, cache=tmp_path).images, images)
    assert list(tmp_path.iterdir()) == [file]


def test_cache_of_a_broken_or_foreign_kind_is_made_again(archives: Path, tmp_path: Path) -> None:
    images = Omniglot(archives, characters=10, cache=tmp_path).images.clone()
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    other = io.BytesIO()
    np.save(other, np.zeros((3, 4), np.uint8))
    for content in (whole[:-1], whole[:50], b"", other.getvalue()):
        file.unlink()
        file.write_bytes(content)
        assert torch.equal(Omniglot(archives, characters=10, cache=tmp_path).images, images)
        assert file.read_bytes() == whole


@pytest.mark.parametrize("moment", ["save", "replace"])
def test_interrupted_write_leaves_no_cache(
    archives: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    def interrupt(*args: object) -> None:
        if moment == "save":
            args[0].write(b"half")  # type: ignore[attr-defined]
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(*((np, "save") if moment == "save" else (os, "replace")), interrupt)
        with pytest.raises(KeyboardInterrupt):
            Omniglot(archives, characters=10, cache=tmp_path)
    assert not list(tmp_path.iterdir())
    Omniglot(archives, characters=10, cache=tmp_path)


def test_cache_that_cannot_be_written(archives: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.warns(UserWarning, match="cannot write the Omniglot cache"):
        dataset = Omniglot(archives, characters=10, cache=tmp_path / "file")
    assert EpisodeSampler(dataset, tasks=2).sample().x_support.shape == (2, 5, 1, 28, 28)


def test_default_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("FASTMAML_CACHE", raising=False)
    assert omniglot_files.default_cache() == tmp_path / "fastmaml"
    monkeypatch.setenv("FASTMAML_CACHE", str(tmp_path / "mine"))
    assert omniglot_files.default_cache() == tmp_path / "mine"


@pytest.mark.parametrize("name", omniglot_files.ARCHIVES)
def test_missing_archive(tmp_path: Path, name: str) -> None:
    write_archives(tmp_path / "data")
    (tmp_path / "data" / name).unlink()
    with pytest.raises(
        FileNotFoundError, match=f"no {name} in .*: put the official {name} of .* into .*data"
    ):
        Omniglot(tmp_path / "data", cache=tmp_path)


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"put the official images_background\.zip"):
        Omniglot(tmp_path / "nowhere", cache=tmp_path)


@pytest.mark.parametrize("damage", ["cut", "bits", "foreign", "uneven", "not an image"])
def test_damaged_archive(tmp_path: Path, damage: str) -> None:
    root = tmp_path / "data"
    write_archives(root)
    archive = root / "images_evaluation.zip"
    content = bytearray(archive.read_bytes())
    if damage == "cut":
        archive.write_bytes(content[: len(content) // 2])
    elif damage == "bits":
        content[content.find(b"IDAT", len(content) // 3) + 6] ^= 0xFF
        archive.write_bytes(content)
    elif damage == "foreign":
        archive.write_bytes((root / "images_background.zip").read_bytes())
    else:
        with zipfile.ZipFile(archive, "a") as z:
            character = "character01" if damage == "uneven" else "character07"
            for drawer in [21] if damage == "uneven" else range(1, DRAWERS + 1):
                z.writestr(f"images_evaluation/Mu/{character}/0099_{drawer:02}.png", b"nothing")
    message = r"images_evaluation\.zip .*put the official images_evaluation\.zip .* into"
    with pytest.raises(ValueError, match=message):
        Omniglot(root, characters=10, cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ways": 0}, "ways must be at least 1, got 0"),
        ({"ways": 11}, "ways must be at most 10, the characters of the split, got 11"),
        ({"shots": 6, "queries": 15}, r"shots \+ queries must be at most 20 \(drawers\), got 6 \+ 15"),
        ({"seed": -2}, "seed must be at least 0, got -2"),
    ],
)
def test_bad_sampler_arguments(train: Omniglot, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EpisodeSampler(train, **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "evaluation"}, 'split must be "train", "validation" or "test", got'),
        ({"resize": "bicubic"}, 'resize must be "nearest" or "lanczos", got'),
        ({"characters": 15}, r"0 <= validation < characters < 15.*got validation=0, characters=15"),
        ({"characters": 3, "validation": 3}, "got validation=3, characters=3"),
    ],
)
def test_bad_dataset_arguments(archives: Path, cache: Path, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Omniglot(archives, **{"cache": cache, **arguments})


@pytest.mark.skipif(not REAL, reason="FASTMAML_OMNIGLOT does not name the folder of the official archives")
def test_real_archives(tmp_path: Path) -> None:
    assert REAL
    train, test = (Omniglot(REAL, split, cache=tmp_path) for split in ("train", "test"))
    assert train.images.shape == (1623, 4, 20, 28, 28)
    assert (len(train), len(test)) == (4800, 1692)
    assert set(train.images.unique().tolist()) == {0, 255}
    assert 0.05 < train.images[:, 0].float().mean() / 255 < 0.12
    assert len(set(train.names)) == 1623
    assert "Tifinagh/character50" in train.names

    # nearest neighbour in pixels: far above chance only if drawings and labels belong together
    episodes = EpisodeSampler(test, tasks=200, flat=True)[0]
    nearest = torch.cdist(episodes.x_query, episodes.x_support).argmin(2)
    accuracy = (episodes.y_support.gather(1, nearest) == episodes.y_query).float().mean()
    assert 0.33 < accuracy < 0.43
