"""A race of few-shot learners: who is in it, how it is run, and what it leaves."""

from racing.contenders import CONTENDERS, find_missing
from racing.course import Course, run_race
from racing.report import LEVELS, draw_race, fastest_line, race_table

__all__ = [
    "CONTENDERS",
    "LEVELS",
    "Course",
    "draw_race",
    "fastest_line",
    "find_missing",
    "race_table",
    "run_race",
]
