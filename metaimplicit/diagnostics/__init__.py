"""Diagnostics: is a hypergradient right, which solver is best for a problem, and how much memory it takes."""

from metaimplicit.diagnostics.check import Check, check_hypergradient
from metaimplicit.diagnostics.compare import Comparison, Row, compare
from metaimplicit.diagnostics.memory import LiveBytes

__all__ = ["Check", "Comparison", "LiveBytes", "Row", "check_hypergradient", "compare"]
