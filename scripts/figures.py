"""Legends and panels of the scripts' plots."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

MOST_LINES = 8  # in one panel: more colours are hard to tell apart

Item = TypeVar("Item")


def panels(items: Sequence[Item], most: int = MOST_LINES) -> list[list[Item]]:
    """The items in as few groups as possible of at most `most`, of sizes as equal as possible.

    Example:
        >>> panels("abcde", most=2)
        [['a', 'b'], ['c', 'd'], ['e']]
    """
    if not items:
        return []
    count = math.ceil(len(items) / most)
    size = math.ceil(len(items) / count)
    return [list(items[first : first + size]) for first in range(0, len(items), size)]


def legend_below(ax: Axes, columns: int = 2) -> None:
    """Put the legend of a panel below its axis label. A panel without labels gets none."""
    if ax.get_legend_handles_labels()[1]:
        ax.legend(
            loc="upper center",
            bbox_to_anchor=(0.5, -0.2),
            ncols=columns,
            fontsize=7,
        )


def shared_legend_below(figure: Figure, columns: int = 6) -> None:
    """One legend below all panels, in which each label of theirs appears once."""
    handles: dict[str, Artist] = {}
    for ax in figure.axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    if handles:
        figure.legend(
            list(handles.values()),
            list(handles),
            loc="outside lower center",
            ncols=columns,
            fontsize=7,
        )
