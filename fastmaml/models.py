"""The networks of the MAML paper that the command line knows by name."""

import importlib
import os
import sys
from collections import OrderedDict
from collections.abc import Callable
from itertools import pairwise

from torch import nn


def sine_mlp() -> nn.Sequential:
    """1-40-40-1 with ReLU: x [.., 1] -> y [.., 1] (Finn et al. 2017, section 5.1)."""
    return nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))


def omniglot_mlp(ways: int = 5) -> nn.Sequential:
    """784-256-128-64-64-ways, BatchNorm and ReLU after each hidden layer: x [N, 1, 28, 28] (or [N, 784]) ->
    logits [N, ways] (Finn et al. 2017, section 5.2, "no conv")."""
    widths = (784, 256, 128, 64, 64)
    layers: list[tuple[str, nn.Module]] = [("flatten", nn.Flatten())]
    for i, (inputs, outputs) in enumerate(pairwise(widths), 1):
        layers += [
            (f"linear{i}", nn.Linear(inputs, outputs)),
            (f"norm{i}", nn.BatchNorm1d(outputs)),
            (f"relu{i}", nn.ReLU()),
        ]
    return nn.Sequential(OrderedDict([*layers, ("head", nn.Linear(widths[-1], ways))]))


BUILT_IN: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str]] = {
    "sine": (sine_mlp, (1,), "mse"),
    "omniglot": (omniglot_mlp, (1, 28, 28), "cross_entropy"),
}
"""name -> (factory, shape of one example, loss)"""


def load(name: str) -> tuple[nn.Module, tuple[int, ...] | None, str | None]:
    """A built-in model by name, or what `module:factory` returns when called without arguments.

    Returns the model, the shape of one example and the loss (both None for a `module:factory`). Modules are
    found on the Python path and in the current folder. Raises ValueError for an unknown name, an import that
    fails, or a factory that gives no nn.Module.
    """
    if name in BUILT_IN:
        factory, shape, loss = BUILT_IN[name]
        return factory(), shape, loss
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute):
        known = ", ".join(BUILT_IN)
        raise ValueError(f"model must be one of {known}, or module:factory (as my_net:make), got {name!r}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        factory = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, SyntaxError) as error:
        raise ValueError(f"cannot import {name!r}: {error}") from error
    try:
        model = factory if isinstance(factory, nn.Module) else factory()
    except TypeError as error:
        raise ValueError(f"{name!r} cannot be made without arguments: {error}") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"{name!r} must give an nn.Module, got {type(model).__name__}")
    return model, None, None
