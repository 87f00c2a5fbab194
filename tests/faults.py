"""Faults planted in copies of the sources, to see that a test catches them."""

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

Fault = tuple[str, str, str]  # file, text that is in it once, what it becomes
Build = Callable[[Path, Path], Path]  # (sources, folder) -> the test, built there


def run(*command: object, timeout: float = 600) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(c) for c in command], capture_output=True, text=True, timeout=timeout, check=False
    )


def compiled(command: Sequence[str], source: Path, csrc: Path, folder: Path) -> Path:
    """The object of a source, made in the folder by that compiler with those flags."""
    target = folder / f"{source.stem}.o"
    done = run(*command, "-I", csrc, "-c", source, "-o", target)
    assert done.returncode == 0, done.stderr
    return target


def planted(fault: Fault, sources: Path, copy: Path, within: str = "") -> Path:
    """A copy of the sources with it; its file is in the folder `within` there."""
    file, text, becomes = fault
    shutil.copytree(sources, copy, ignore=shutil.ignore_patterns("__pycache__"))
    path = copy / within / file
    source = path.read_text()
    assert source.count(text) == 1, f"{file}: {source.count(text)} times in it: {text}"
    path.write_text(source.replace(text, becomes))
    return copy


def time_limit(test: Path, *arguments: object) -> float:
    """Ten times what the sound test takes, which passes: a fault that takes longer hangs."""
    start = time.perf_counter()
    sound = run(test, *arguments)
    assert sound.returncode == 0, sound.stdout
    return 10 * (time.perf_counter() - start) + 10


def missed(
    faults: Sequence[Fault],
    sources: Path,
    within: str,
    folder: Path,
    builds: Sequence[Build],
    limit: float,
    *arguments: object,
) -> list[str]:
    """Of each fault that the test lets pass, or that could not be planted or built, what went wrong.

    builds: of the test, the quickest first; what passes it is tried with the next.
    """

    def try_one(number: int) -> str | None:
        file, text, becomes = fault = faults[number]
        here = folder / str(number)
        try:
            csrc = planted(fault, sources, here / "csrc", within)
            tests = (build(csrc, here) for build in builds)
            passed = all(run(test, *arguments, timeout=limit).returncode == 0 for test in tests)
        except AssertionError as error:
            return str(error)
        except subprocess.TimeoutExpired:
            passed = False
        shutil.rmtree(here)
        return f"{file}: not caught: {becomes or 'without ' + text}" if passed else None

    with ThreadPoolExecutor(os.cpu_count() or 2) as pool:
        return [problem for problem in pool.map(try_one, range(len(faults))) if problem]
