"""Few-shot learning: `MetaLearner`, what it takes, and what it returns."""

from metaimplicit.learner.episodes import Episode, EpisodeBatch, HasSets, Pair
from metaimplicit.learner.forms import name_parts, read_episodes
from metaimplicit.learner.learnable import Granularity
from metaimplicit.learner.meta_learner import MetaLearner
from metaimplicit.learner.ranks import LostRanksError, Ranks
from metaimplicit.learner.results import AdaptedModel, Step
from metaimplicit.learner.vectorization import solver_generator

__all__ = [
    "AdaptedModel",
    "Episode",
    "EpisodeBatch",
    "Granularity",
    "HasSets",
    "LostRanksError",
    "MetaLearner",
    "Pair",
    "Ranks",
    "Step",
    "name_parts",
    "read_episodes",
    "solver_generator",
]
