"""Diagnostics: is a hypergradient right, which solver suits a problem, how much memory it takes."""

from metaimplicit.diagnostics.check import check_hypergradient
from metaimplicit.diagnostics.compare import Comparison, Row, comparable_methods, compare
from metaimplicit.diagnostics.memory import LiveBytes
from metaimplicit.diagnostics.verdict import Check

__all__ = [
    "Check",
    "Comparison",
    "LiveBytes",
    "Row",
    "check_hypergradient",
    "comparable_methods",
    "compare",
]
