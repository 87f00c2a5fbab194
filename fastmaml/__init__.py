"""Fast exact meta-gradients: the inner loop of gradient-based meta-learning, all tasks at once."""

from . import functional, losses, reference
from .algorithms import MAML
from .backends import backends
from .losses import MSE, CrossEntropy

__version__ = "0.1.0"
__all__ = ["MAML", "MSE", "CrossEntropy", "backends", "explain", "functional", "losses", "reference"]


def explain(model, x, loss=None):
    """The Program of `model` on x [T, N, ...], the backend that would run it, and why the others would not: a text."""
    from .explain import explain

    return explain(model, x, loss=loss)
