"""Tuning: hyperparameters as outer variables of a bilevel problem, moved while the model trains."""

from metaimplicit.tuning.domains import Box, Domain, Interval, Positive, Real, Simplex
from metaimplicit.tuning.hoag import HOAG, HOAGStep
from metaimplicit.tuning.tuner import Tuner, TunerStep

__all__ = ["HOAG", "Box", "Domain", "HOAGStep", "Interval", "Positive", "Real", "Simplex", "Tuner", "TunerStep"]
