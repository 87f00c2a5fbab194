"""One run in one folder: progress bar, TensorBoard, held-out evaluation, learning curve, results as JSON."""

import importlib.util
import json
import math
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastmaml import plots
from fastmaml.train import Batches, Training

EXTRA = 'pip install "fastmaml[train]"'


@dataclass(frozen=True)
class Estimate:
    """Mean over tasks and half the width of its 95 % interval (1.96 standard errors)."""

    mean: float
    half: float

    @staticmethod
    def of(values: Tensor) -> "Estimate":  # [tasks]
        values = values.double()
        half = 1.96 * values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan
        return Estimate(values.mean().item(), half)

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.half:.3f}"

    def percent(self) -> str:
        return f"{100 * self.mean:.2f} ± {100 * self.half:.2f} %"


def evaluate(maml: Any, batches: Batches, *, tasks: int, steps: int) -> dict[str, list[Estimate]]:
    """Loss, and accuracy for classification, on the queries of `tasks` tasks after 0..steps inner steps."""
    losses, accuracies, seen = [], [], 0
    while seen < tasks:
        result = maml.evaluate(*batches[len(losses)], steps=steps)
        losses.append(result.loss)  # [steps + 1, T]
        accuracies.append(result.accuracy)
        seen += result.loss.shape[1]
    found = {"loss": torch.cat(losses, 1)[:, :tasks]}
    if accuracies[0] is not None:
        found["accuracy"] = torch.cat(accuracies, 1)[:, :tasks]
    return {name: [Estimate.of(values) for values in rows] for name, rows in found.items()}


@contextmanager
def progress_bar(training: Training, tasks: int, *, label: str, quiet: bool = False) -> Iterator[Any]:
    """A tqdm bar that counts tasks and shows the loss: yields (tick, report) for Training.fit."""
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise RuntimeError(f"the progress bar needs tqdm: {EXTRA}") from error
    bar = tqdm(
        total=training.iterations * tasks,
        initial=training.step * tasks,
        desc=label,
        unit=" tasks",
        unit_scale=True,
        dynamic_ncols=True,
        disable=quiet,
        mininterval=0.2 if sys.stderr.isatty() else 10.0,
    )

    def report(line: dict[str, float]) -> None:
        shown = {"loss": f"{line['loss']:.4f}"}
        if "test_accuracy" in line:
            shown["held-out"] = f"{100 * line['test_accuracy']:.1f}%"
        bar.set_postfix(shown, refresh=False)

    with bar:
        yield (lambda step: bar.update(tasks)), report


@contextmanager
def tensorboard(folder: Path, *, step: int, wanted: bool) -> Iterator[Callable[[dict[str, float]], None]]:
    """Yields a function that logs a line of the history; drops events after `step`, of a run cut short."""
    if not wanted:
        yield lambda line: None
        return
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder), purge_step=step + 1 if step else None)

    def write(line: dict[str, float]) -> None:
        for name, value in line.items():
            if name != "step":
                writer.add_scalar(name, value, int(line["step"]))

    try:
        yield write
    finally:
        writer.close()


def missing_extras(names: tuple[str, ...] = ("tqdm", "matplotlib", "tensorboard")) -> list[str]:
    return [name for name in names if importlib.util.find_spec(name) is None]


def commit() -> str | None:
    """The git commit of this source tree, with "-dirty" if it was changed; None for an installed package."""

    def git(*arguments: str) -> str:
        here = Path(__file__).parent
        return subprocess.run(
            ["git", "-C", str(here), *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return None


def provenance() -> dict[str, Any]:
    return {
        "commit": commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
    }


@dataclass(frozen=True)
class Setup:
    """What distinguishes one training command from another."""

    title: str
    maml: Any
    train: Batches
    test: Batches  # tasks that `train` never shows
    tasks: int  # in a meta-batch
    eval_steps: int
    eval_tasks: int


def run(
    setup: Setup, training: Training, out: Path, *, command: str, every: dict[str, int], quiet: bool
) -> dict[str, Any]:
    """Trains to the end, evaluates, fills `out`; returns what results.json holds. Raises Interrupted."""
    absent = missing_extras()
    if absent:
        print(f"without {', '.join(absent)} (install: {EXTRA}) there will be no such output", file=sys.stderr)

    def held_out() -> dict[str, float]:
        few = evaluate(setup.maml, setup.test, tasks=min(100, setup.eval_tasks), steps=setup.eval_steps)
        return {f"test_{name}": rows[-1].mean for name, rows in few.items()}

    with (
        progress_bar(training, setup.tasks, label=setup.title, quiet=quiet) as (tick, report),
        tensorboard(out / "tensorboard", step=training.step, wanted="tensorboard" not in absent) as write,
    ):

        def both(line: dict[str, float]) -> None:
            report(line)
            write(line)

        training.fit(checkpoint=out / "checkpoint.pt", evaluate=held_out, report=both, tick=tick, **every)

    final = evaluate(setup.maml, setup.test, tasks=setup.eval_tasks, steps=setup.eval_steps)
    if "matplotlib" not in absent:
        plots.learning_curve(training.history, out / "curve.png", title=setup.title)
    results = {
        "title": setup.title,
        "command": command,
        "settings": training.settings,
        **provenance(),
        "training_seconds": round(training.seconds, 2),
        "test_tasks": setup.eval_tasks,
        "test": {name: [asdict(row) for row in rows] for name, rows in final.items()},
        "history": training.history,
    }
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    show(final)
    print(f"{training.seconds:.0f} s of training; results in {out}/")
    return results


def show(found: dict[str, list[Estimate]]) -> None:
    """Prints a line per number of inner steps."""
    for steps in range(len(found["loss"])):
        line = f"after {steps:2d} steps   loss {found['loss'][steps]}"
        if "accuracy" in found:
            line += f"   accuracy {found['accuracy'][steps].percent()}"
        print(line)
