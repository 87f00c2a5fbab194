"""Fast exact meta-gradients: the inner loop of gradient-based meta-learning, all tasks at once."""

from . import functional, losses, reference
from .algorithms import MAML
from .backends import backends
from .explain import explain
from .forms import FactoredWeight
from .losses import MSE, CrossEntropy
from .optimizers import SGD

__version__ = "0.1.0"
__all__ = [
    "MAML",
    "MSE",
    "SGD",
    "CrossEntropy",
    "FactoredWeight",
    "backends",
    "explain",
    "functional",
    "losses",
    "reference",
]
