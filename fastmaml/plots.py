"""The pictures: a learning curve, and what sine networks predict before and after adaptation."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

BEFORE, ONE, TEN, TRUE = "#9aa0a6", "#4c9be8", "#12438c", "#d1495b"


def pyplot() -> Any:
    """matplotlib.pyplot, writing files only. Raises RuntimeError naming the cure when it is missing."""
    try:
        import matplotlib
    except ImportError as error:
        raise RuntimeError('pictures need matplotlib: pip install "fastmaml[train]"') from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def learning_curve(history: Sequence[Mapping[str, float]], path: Path, *, title: str) -> None:
    """Meta-loss of training, and held-out accuracy (or loss, for regression) over meta-steps."""
    plt = pyplot()
    figure, left = plt.subplots(figsize=(7, 4), layout="constrained")
    left.plot(
        [h["step"] for h in history], [h["loss"] for h in history], color=ONE, lw=1, label="training loss"
    )
    left.set(xlabel="meta-step", ylabel="query loss", yscale="log", title=title)
    held_out = [h for h in history if "test_loss" in h]
    steps = [h["step"] for h in held_out]
    if held_out and "test_accuracy" in held_out[0]:
        right = left.twinx()
        right.plot(steps, [100 * h["test_accuracy"] for h in held_out], color=TRUE, label="held-out accuracy")
        right.set(ylabel="accuracy, %", ylim=(None, 100))
        figure.legend(loc="outside lower center", ncols=2)
    elif held_out:
        left.plot(steps, [h["test_loss"] for h in held_out], color=TRUE, label="held-out loss")
        left.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def sine_predictions(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """One row per K, one column per network.

    Each row: title, x [M], true [M], x_support [K], y_support [K], networks {name: {steps: prediction [M]}}.
    """
    plt = pyplot()
    columns = len(rows[0]["networks"])
    figure, axes = plt.subplots(
        len(rows),
        columns,
        figsize=(5.4 * columns, 3.4 * len(rows)),
        sharex=True,
        sharey="row",
        squeeze=False,
        layout="constrained",
    )
    styles = {0: (BEFORE, ":"), 1: (ONE, "--"), 10: (TEN, "-")}
    for row, line in zip(rows, axes, strict=True):
        for (name, predictions), axis in zip(row["networks"].items(), line, strict=True):
            axis.plot(row["x"], row["true"], color=TRUE, lw=2, label="true curve")
            for steps, prediction in predictions.items():
                color, dash = styles.get(steps, (TEN, "-."))
                label = "before adaptation" if steps == 0 else f"after {steps} step{'s'[: steps > 1]}"
                axis.plot(row["x"], prediction, color=color, ls=dash, lw=1.6, label=label)
            axis.plot(row["x_support"], row["y_support"], "^", color="#5b2a86", ms=8, label="support points")
            axis.set_title(f"{name}, {row['title']}")
            axis.grid(alpha=0.2)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    figure.savefig(path, dpi=150)
    plt.close(figure)
