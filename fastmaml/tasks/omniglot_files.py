"""From the two official Omniglot archives to one array on disk."""

import io
import os
import re
import tempfile
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np

ARCHIVES = ("images_background.zip", "images_evaluation.zip")
RESIZES = ("nearest", "lanczos")
SIDE = 28
ROTATIONS = 4
CACHE_VERSION = 1

# <set>/<Alphabet>/character<NN>/<id>_<drawer>.png
MEMBER = re.compile(r"(images_background|images_evaluation)/([^/]+/character\d+)/\d+_(\d+)\.png")


def default_cache() -> Path:
    """FASTMAML_CACHE, else `fastmaml` in XDG_CACHE_HOME, else ~/.cache/fastmaml."""
    if folder := os.environ.get("FASTMAML_CACHE"):
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fastmaml"


def cure(name: str, root: Path) -> str:
    return (
        f"put the official {name} of https://github.com/brendenlake/omniglot (folder python) into {root} "
        "(fastmaml downloads nothing)"
    )


def archives(root: Path) -> list[Path]:
    """The two archives in `root`. Raises FileNotFoundError naming the first that is missing."""
    for name in ARCHIVES:
        if not (root / name).is_file():
            raise FileNotFoundError(f"no {name} in {root}: {cure(name, root)}")
    return [root / name for name in ARCHIVES]


def members(archive: Path) -> dict[str, list[str]]:
    """{"Alphabet/character01": its drawings by drawer}, sorted.

    Raises ValueError for a damaged or foreign archive.
    """
    name, root = archive.name, archive.parent
    try:
        with zipfile.ZipFile(archive) as z:
            listing = z.namelist()
    except zipfile.BadZipFile as error:
        raise ValueError(f"{archive} is damaged ({error}): {cure(name, root)}") from error
    found: dict[str, list[tuple[int, str]]] = {}
    for path in listing:
        match = MEMBER.fullmatch(path)
        if match and match[1] == archive.stem:
            found.setdefault(match[2], []).append((int(match[3]), path))
    if not found:
        layout = f"{archive.stem}/<Alphabet>/character<NN>/<id>_<drawer>.png"
        raise ValueError(f"{archive} has no {layout}: {cure(name, root)}")
    drawings = {character: [path for _, path in sorted(found[character])] for character in sorted(found)}
    wanted = max(map(len, drawings.values()))
    for character, paths in drawings.items():
        if len(paths) != wanted:
            counts = f"{len(paths)} drawings of {character}, {wanted} of others"
            raise ValueError(f"{archive} has {counts}: {cure(name, root)}")
    return drawings


def read(archive: Path, resize: str) -> np.ndarray:
    """Every drawing, ink = 255, [characters, drawers, 28, 28] uint8.

    Raises ValueError for a damaged archive, ImportError without Pillow.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError('decoding Omniglot needs Pillow: pip install "fastmaml[train]"') from error

    drawings = members(archive)
    images = np.empty((len(drawings), len(next(iter(drawings.values()))), SIDE, SIDE), np.uint8)
    path = ""
    try:
        with zipfile.ZipFile(archive) as z:
            for c, paths in enumerate(drawings.values()):
                for d, path in enumerate(paths):
                    with Image.open(io.BytesIO(z.read(path))) as image:
                        how = Image.Resampling.LANCZOS if resize == "lanczos" else Image.Resampling.NEAREST
                        images[c, d] = 255 - np.asarray(image.convert("L").resize((SIDE, SIDE), how))
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, SyntaxError) as error:
        way_out = cure(archive.name, archive.parent)
        raise ValueError(f"{archive} is damaged at {path} ({error}): {way_out}") from error
    return images


def rotated(images: np.ndarray) -> np.ndarray:
    """[C, D, 28, 28] -> [C, 4, D, 28, 28]: by 0, 90, 180, 270 degrees counterclockwise."""
    return np.stack([np.rot90(images, r, axes=(2, 3)) for r in range(ROTATIONS)], axis=1)


def open_cached(path: Path) -> np.ndarray | None:
    """The array in `path`, or None if it is not there, is cut short or is not what this version writes."""
    try:
        # copy-on-write: nothing reaches the file, and torch takes the array as a writable one
        images = np.load(path, mmap_mode="c")
    except (OSError, ValueError, EOFError):
        return None
    fits = images.ndim == 5 and images.shape[1] == ROTATIONS and images.shape[3:] == (SIDE, SIDE)
    return images if fits and images.dtype == np.uint8 else None


def write_cache(path: Path, images: np.ndarray) -> None:
    """Writes beside `path` and renames, so that `path` is whole or not there, however the process ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            np.save(file, images)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def load(root: Path, resize: str, cache: Path) -> np.ndarray:
    """All drawings in all rotations, ink = 255, [characters, 4, drawers, 28, 28] uint8, memory-mapped.

    The characters of the background set come first, then by alphabet and number; drawers in order.
    Raises FileNotFoundError or ValueError where an archive is missing or damaged. Warns where the cache
    cannot be written; the array is then in memory.
    """
    zips = archives(root)
    sizes = "-".join(str(zip.stat().st_size) for zip in zips)
    path = cache / f"omniglot-v{CACHE_VERSION}-{resize}-{sizes}.npy"
    cached = open_cached(path)
    if cached is not None:
        return cached
    parts = [read(archive, resize) for archive in zips]
    if parts[0].shape[1] != parts[1].shape[1]:
        drawers = f"{parts[0].shape[1]} and {parts[1].shape[1]} drawings a character"
        raise ValueError(f"the archives in {root} have {drawers}: {cure(ARCHIVES[1], root)}")
    images = rotated(np.concatenate(parts))
    try:
        write_cache(path, images)
    except OSError as error:
        warnings.warn(f"cannot write the Omniglot cache {path} ({error}); keeping it in memory", stacklevel=3)
        return images
    written = open_cached(path)
    return images if written is None else written
