"""The command line: fastmaml train sine | train omniglot | explain | demo."""

import argparse
import math
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def natural(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, got {value}")
    return value


def positive(text: str) -> float:
    value = float(text)
    if not (value > 0 and math.isfinite(value)):
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text}")
    return value


def not_negative(text: str) -> float:
    value = float(text)
    if not (value >= 0 and math.isfinite(value)):
        raise argparse.ArgumentTypeError(f"must be 0 or a positive number, got {text}")
    return value


def shape(text: str) -> tuple[int, ...]:
    return tuple(positive_int(size) for size in text.split(","))


def build_parser() -> argparse.ArgumentParser:
    shown: Any = {"formatter_class": argparse.ArgumentDefaultsHelpFormatter}
    parser = argparse.ArgumentParser(prog="fastmaml", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    train = commands.add_parser("train", help="meta-train MAML and evaluate it on held-out tasks")
    tasks = train.add_subparsers(dest="task", required=True)
    sine = tasks.add_parser("sine", help="regression of sine waves, 40-40 ReLU network", **shown)
    # not the schedule of the paper; why this one: META_LR in demo.py
    numbers: Any = {
        "inner_lr": 0.01,
        "eval_steps": 10,
        "iterations": 20000,
        "meta_lr": 3e-3,
        "decay": "cosine",
    }
    training_options(sine, shots=10, queries=10, tasks=25, **numbers)
    schedule_options(sine, evaluate_every=2000, log_every=200, checkpoint_every=2000)

    omniglot = tasks.add_parser("omniglot", help="characters, 256-128-64-64 network", **shown)
    add = omniglot.add_argument
    add("--data", type=Path, required=True, help="folder with the two official zip files")
    add("--ways", type=positive_int, default=5, help="classes in a task")
    add("--eval-queries", type=positive_int, default=15, help="query examples of each class in evaluation")
    numbers = {"inner_lr": 0.4, "eval_steps": 3, "iterations": 60000, "meta_lr": 1e-3, "decay": "none"}
    training_options(omniglot, shots=1, queries=15, tasks=32, **numbers)
    schedule_options(omniglot, evaluate_every=1000, log_every=100, checkpoint_every=500)

    explain = commands.add_parser("explain", help="what fastmaml makes of a model, and which backend runs it")
    add = explain.add_argument
    add("model", help="sine, omniglot, or module:factory")
    add("--shape", type=shape, help="shape of one example, as 1,28,28; needed for module:factory")
    add("--loss", choices=("mse", "cross_entropy"), help="default: that of the built-in model, else mse")
    add("--tasks", type=positive_int, default=25)
    add("--examples", type=positive_int, default=10, help="support examples in a task")
    add("--queries", type=positive_int, help="query examples in a task (default: as many)")
    add("--steps", type=natural, default=5, help="inner steps")

    demo = commands.add_parser("demo", help="MAML on sine waves: a table and a picture", **shown)
    add = demo.add_argument
    add("--out", type=Path, default=Path("runs/demo"), help="folder for the picture")
    add("--iterations", type=positive_int, default=40000, help="meta-steps of each network")
    add("--seed", type=natural, default=0)
    add("--backend", help="cpu, torch, ...; default: the first that can run")
    add("--quiet", action="store_true", help="no progress bar")
    return parser


def training_options(
    parser: argparse.ArgumentParser,
    *,
    shots: int,
    queries: int,
    tasks: int,
    inner_lr: float,
    eval_steps: int,
    iterations: int,
    meta_lr: float,
    decay: str,
) -> None:
    add = parser.add_argument
    add("--shots", type=positive_int, default=shots, help="support examples (of each class)")
    add("--queries", type=positive_int, default=queries, help="query examples (of each class)")
    add("--tasks", type=positive_int, default=tasks, help="tasks in a meta-batch")
    add("--inner-lr", type=positive, default=inner_lr, help="step size of the inner loop")
    add("--inner-steps", type=natural, default=1, help="inner steps in training (0: plain pretraining)")
    add("--inner-momentum", type=not_negative, default=0.0, help="momentum of the inner loop")
    add("--inner-weight-decay", type=not_negative, default=0.0, help="its weight decay")
    add("--inner-clip", type=positive, help="its largest norm of a task's gradient")
    add("--every-step", action="store_true", help="train on the mean of the query losses after every step")
    add("--eval-steps", type=natural, default=eval_steps, help="inner steps in evaluation")
    add("--eval-tasks", type=positive_int, default=600, help="held-out tasks of the final evaluation")
    add("--first-order", action="store_true", help="FOMAML: no second derivatives")
    add("--iterations", type=positive_int, default=iterations, help="meta-steps")
    add("--meta-lr", type=positive, default=meta_lr, help="learning rate of Adam")
    add("--decay", choices=("none", "cosine"), default=decay, help="schedule of the meta learning rate")
    add("--seed", type=natural, default=0)
    add("--backend", help="cpu, torch, ...; default: the first that can run")
    add("--threads", type=positive_int, help="threads of torch and of the cpu backend")
    add("--out", type=Path, help="folder of the run; default runs/<task and seed>")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--resume", action="store_true", help="continue the run in --out from its checkpoint")
    group.add_argument("--overwrite", action="store_true", help="start again although --out holds a run")
    add("--quiet", action="store_true", help="no progress bar")


def schedule_options(parser: argparse.ArgumentParser, **defaults: int) -> None:
    for name, steps in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=positive_int, default=steps, metavar="STEPS")


def main(arguments: Sequence[str] | None = None) -> int:
    typed = sys.argv[1:] if arguments is None else list(arguments)
    args = build_parser().parse_args(typed)
    args.typed = shlex.join(["fastmaml", *typed])
    from fastmaml import commands  # after parsing: --help and typing errors need no torch
    from fastmaml.train import Interrupted

    try:
        getattr(commands, args.command)(args)
        sys.stdout.flush()
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        return 128 + stop.signum
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:
        # what is left is flushed as Python exits, and must not fail again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except (commands.UsageError, FloatingPointError) as error:
        print(f"fastmaml: error: {error}", file=sys.stderr)
        return 2
    return 0
