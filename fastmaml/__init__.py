"""Fast exact meta-gradients: the inner loop of gradient-based meta-learning, all tasks at once."""

__version__ = "0.1.0"
