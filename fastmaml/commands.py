"""What the sub-commands do: each takes the parsed arguments of cli.py."""

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

import fastmaml
from fastmaml import models
from fastmaml.experiment import Setup, run
from fastmaml.tasks import EpisodeSampler, Omniglot, Sine
from fastmaml.train import Training

# what does not change the numbers of a run, so that --resume may change it
FREE = {
    "command",
    "typed",
    "data",
    "out",
    "resume",
    "overwrite",
    "quiet",
    "threads",
    "eval_tasks",
    "checkpoint_every",
}
TEST_SEED = 2**31  # the same held-out tasks whatever the seed of the training


class UsageError(Exception):
    """Something the user can put right; shown without a traceback."""


@contextmanager
def usage_errors() -> Iterator[None]:
    """The checks of the library, met before any work, are answers to the user."""
    try:
        yield
    except BrokenPipeError:  # whoever reads the output, `head` for one, has seen enough
        raise
    except (ValueError, TypeError, RuntimeError, OSError, ImportError) as error:
        raise UsageError(str(error)) from error


def train(args: argparse.Namespace) -> None:
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    out = args.out or Path("runs") / default_name(args)
    checkpoint = out / "checkpoint.pt"
    with usage_errors():
        if args.resume and not checkpoint.exists():
            raise UsageError(f"nothing to resume: {checkpoint} does not exist")
        if checkpoint.exists() and not (args.resume or args.overwrite):
            raise UsageError(f"{out} holds a run: --resume continues it, --overwrite starts again")
        setup = {"sine": sine, "omniglot": omniglot}[args.task](args)
        training = Training(
            setup.maml,
            setup.train,
            iterations=args.iterations,
            meta_lr=args.meta_lr,
            decay=args.decay,
            settings={name: value for name, value in vars(args).items() if name not in FREE},
        )
        if args.resume:
            training.load(checkpoint)
        setup.maml(*setup.train[0])  # a backend that cannot run says so here
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()  # and so does a folder that takes no files
    every = {name: getattr(args, name) for name in ("checkpoint_every", "log_every", "evaluate_every")}
    run(setup, training, out, command=args.typed, every=every, quiet=args.quiet)


def default_name(args: argparse.Namespace) -> str:
    kind = f"{args.ways}w{args.shots}s" if args.task == "omniglot" else f"{args.shots}shot"
    return f"{args.task}-{kind}-seed{args.seed}"


def maml(args: argparse.Namespace, model: torch.nn.Module, loss: str) -> fastmaml.MAML:
    steps = args.inner_steps
    if args.every_step and steps == 0:
        raise UsageError(
            "--every-step needs --inner-steps of 1 or more: there is no step to have a loss after"
        )
    return fastmaml.MAML(
        model,
        loss=loss,
        lr=args.inner_lr,
        steps=steps,
        first_order=args.first_order,
        optimizer=fastmaml.SGD(args.inner_momentum, args.inner_weight_decay, args.inner_clip),
        step_weights=[1 / steps] * steps if args.every_step else None,
        backend=args.backend,
    )


def sine(args: argparse.Namespace) -> Setup:
    return Setup(
        title=f"sine {args.shots}-shot",
        maml=maml(args, models.sine_mlp(), "mse"),
        train=Sine(args.shots, args.queries, args.tasks, args.seed),
        test=Sine(args.shots, queries=100, tasks=100, seed=TEST_SEED),
        tasks=args.tasks,
        eval_steps=args.eval_steps,
        eval_tasks=args.eval_tasks,
    )


def omniglot(args: argparse.Namespace) -> Setup:
    sizes = args.ways, args.shots
    return Setup(
        title=f"omniglot {args.ways}-way {args.shots}-shot",
        maml=maml(args, models.omniglot_mlp(args.ways), "cross_entropy"),
        train=EpisodeSampler(Omniglot(args.data, "train"), *sizes, args.queries, args.tasks, args.seed),
        test=EpisodeSampler(Omniglot(args.data, "test"), *sizes, args.eval_queries, tasks=50, seed=TEST_SEED),
        tasks=args.tasks,
        eval_steps=args.eval_steps,
        eval_tasks=args.eval_tasks,
    )


def explain(args: argparse.Namespace) -> None:
    with usage_errors():
        model, shape, loss = models.load(args.model)
        shape, loss = args.shape or shape, args.loss or loss or "mse"
        if shape is None:
            raise ValueError(f"--shape is needed: the shape of one example of {args.model}, as 1,28,28")
        x = torch.zeros(args.tasks, args.examples, *shape)
        print(fastmaml.explain(model, x, loss=loss, steps=args.steps, queries=args.queries))


def demo(args: argparse.Namespace) -> None:
    from fastmaml.demo import run_demo

    with usage_errors():
        run_demo(args.out, iterations=args.iterations, seed=args.seed, backend=args.backend, quiet=args.quiet)
