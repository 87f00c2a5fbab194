"""Meta-learning algorithms: thin modules over `fastmaml.functional`."""

from .maml import MAML, Evaluation

__all__ = ["MAML", "Evaluation"]
