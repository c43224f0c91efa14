"""Every numeric option of every script has a range, which is shown by --help and checked."""

import math
import re
from dataclasses import dataclass
from typing import Annotated, get_args, get_type_hints

import benchmark
import compare
import pytest
from command_line import RunOptions, parse
from command_line.flags import inner_flags, method_flags
from command_line.ranges import MOST_THREADS, Range, check_ranges, range_of, ranges_of, within
from evaluate import Evaluate
from experiments import EXPERIMENTS
from scripts.running import error_line, load_main

from metaimplicit import METHODS
from metaimplicit.inner import INNER_LOOPS

KINDS = [RunOptions, Evaluate, compare.Settings, benchmark.Benchmark, *EXPERIMENTS.values()]


def holds_numbers(hint):
    """Whether a type is that of a number, or of a tuple of numbers."""
    return hint in (int, float) or any(holds_numbers(part) for part in get_args(hint))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_numeric_option_has_a_range(kind):
    hints = get_type_hints(kind)
    numeric = {name for name, hint in hints.items() if holds_numbers(hint)}
    not_options = {"name"} | {name for name in hints if "ClassVar" in str(hints[name])}
    assert numeric - not_options == set(ranges_of(kind))


def test_every_numeric_option_of_a_method_or_an_inner_loop_has_a_range():
    groups = [method_flags(name) for name in METHODS] + [inner_flags(name) for name in INNER_LOOPS]
    options = [option for group in groups for option in group.options.values()]
    assert len(options) > 100
    for option in options:
        allowed = range_of(option)
        assert (allowed is not None) == holds_numbers(option.type), option
        if allowed is not None:
            allowed.check(option.name, option.default)


@dataclass
class Sample:
    count: Annotated[int, within(1, 3)] = 1
    rate: Annotated[float | None, within(0, 0.5)] = None
    pairs: Annotated[tuple[tuple[float, float], ...], within(0, 1)] = ((0.0, 1.0),)
    flag: bool = True


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"count": 4}, "--count: got 4, expected from 1 to 3"),
        ({"count": 0}, "--count: got 0, expected from 1 to 3"),
        ({"rate": math.nan}, "--rate: got nan, expected from 0 to 0.5"),
        ({"rate": math.inf}, "--rate: got inf, expected from 0 to 0.5"),
        ({"pairs": ((0.0, 1.0), (0.5, -0.1))}, "--pairs: got -0.1, expected from 0 to 1"),
    ],
)
def test_a_number_out_of_range_is_refused(values, message):
    check_ranges(Sample())
    check_ranges(Sample(count=3, rate=0.5))
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        check_ranges(Sample(**values))


def test_the_ends_of_a_range_are_shown_by_help(capsys):
    assert Range(1, 10_000)("5") == "(default: 5), from 1 to 10000"
    with pytest.raises(SystemExit) as stop:
        load_main("train")(["--help"])
    assert stop.value.code == 0
    text = re.sub(r"[\s│]+", " ", capsys.readouterr().out)
    assert (
        "Support examples of each class; for sinusoid, support points. (default: 1), from 1 to"
        in text
    )
    assert "--debug" in text


@pytest.mark.parametrize("name", ["train", "evaluate", "compare", "benchmark", "tune"])
def test_a_million_threads_are_refused(name, tmp_path, monkeypatch, capsys):
    """OpenMP crashes when it cannot start them."""
    monkeypatch.chdir(tmp_path)
    before = {"evaluate": ["."], "tune": ["weight-decay"]}.get(name, [])
    commands = {"compare": compare.run_command, "benchmark": benchmark.run_command}
    main = commands.get(name) or load_main(name)
    line = error_line(main, [*before, "--threads=1000000"], capsys)
    assert line == f"error: --threads: got 1000000, expected from 1 to {MOST_THREADS}"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--shots=x"], r"error: .*x.*; --help explains the options"),
        (["--colour=3"], r"error: .*--colour.*; --help explains the options"),
        (["--seed"], r"error: argument --seed: expected one argument"),
        (
            ["--method=cg", "--solver-steps=1000000"],
            r"error: --solver-steps: got 1000000, expected from 0 to 100000",
        ),
    ],
)
def test_a_wrong_command_line_is_one_line(args, message, capsys):
    assert re.fullmatch(message, error_line(load_main("train"), args, capsys))


def test_the_largest_options_are_parsed():
    options = parse(["--method=auto", "--memory=1099511627776", "--seed=4294967295"])
    assert options.method_options == {"memory": 2**40}
    assert options.test_seed == 2**32 + 999_999
