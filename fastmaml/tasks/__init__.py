"""Sources of few-shot tasks: meta-batches of T tasks, seeded, resumable, ready for a DataLoader."""

from .episodes import Episodes, EpisodeStream
from .omniglot import EpisodeSampler, Omniglot
from .sine import Sine, SineEpisodes

__all__ = ["EpisodeSampler", "EpisodeStream", "Episodes", "Omniglot", "Sine", "SineEpisodes"]
