"""The flags of methods and inner loops, read off the fields of their dataclasses.

`FlagGroup` turns the flags of one method or inner loop into a type that tyro parses, and the parsed
values into the options that differ from the defaults.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypedDict

import tyro

from metaimplicit.inner import INNER_LOOPS, make_inner
from metaimplicit.methods import METHODS, Implicit, Option, make_method, options_of

INNER_PREFIX = "inner_"
RUN_OPTIONS = {"steps", "lr"}  # of an inner loop: --inner-steps and --inner-lr have task defaults


@dataclass(frozen=True)
class FlagGroup:
    """The flags of a method or an inner loop.

    Args:
        title: What --help calls the group.
        options: The options, by the name of their flag, with underscores.
        names: The names of the options themselves, by the name of their flag.
    """

    title: str
    options: Mapping[str, Option]
    names: Mapping[str, str]

    @property
    def parsed_type(self) -> Any:
        """A type for tyro: a dictionary with one entry for each flag."""
        entries = {
            flag: Annotated[option.type, tyro.conf.arg(help=option.help)]
            for flag, option in self.options.items()
        }
        make_type: Any = TypedDict  # of entries that only the program knows
        return Annotated[make_type("Flags", entries), tyro.conf.arg(name=self.title)]

    def defaults(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The value of each flag: that of its option in `values`, or else the option's default."""
        return {
            flag: values.get(self.names[flag], option.default)
            for flag, option in self.options.items()
        }

    def given(self, parsed: Mapping[str, Any]) -> dict[str, Any]:
        """The options whose parsed value is not the default, by their own names."""
        return {
            self.names[flag]: value
            for flag, value in parsed.items()
            if value != self.options[flag].default
        }


def method_flags(method: str) -> FlagGroup:
    """The flags of a method.

    Raises:
        ValueError: The method is unknown.
    """
    options = options_of(make_method(method))
    return FlagGroup(f"--method {method}", options, {name: name for name in options})


def inner_flags(inner: str) -> FlagGroup:
    """The flags of an inner loop, without the number of steps and the step size.

    Raises:
        ValueError: The inner loop is unknown.
    """
    options = {}
    names = {}
    for name, option in options_of(make_inner(inner)).items():
        if name not in RUN_OPTIONS:
            options[INNER_PREFIX + name] = option
            names[INNER_PREFIX + name] = name
    return FlagGroup(f"--inner-optimizer {inner}", options, names)


def reject_flags_of_others(args: list[str], method: str, inner: str) -> None:
    """Check that the flags of methods and inner loops belong to the ones that are chosen.

    Raises:
        ValueError: A flag belongs to other methods or inner loops. The message names them.
    """
    method_groups = {name: method_flags(name) for name in METHODS}
    inner_groups = {name: inner_flags(name) for name in INNER_LOOPS}
    for arg in args:
        if arg.startswith("--"):
            flag = arg.partition("=")[0]
            _reject_flag_of_others(flag, "--method", method, method_groups)
            _reject_flag_of_others(flag, "--inner-optimizer", inner, inner_groups)


def describe_other_methods(method: str) -> str:
    """What all methods but one do, with their flags, a line for each.

    The flags that all implicit methods share have a line of their own.
    """
    shared = [name for name, option in options_of(Implicit()).items() if len(option.path) == 1]
    lines = []
    for other in METHODS:
        options = method_flags(other).options
        flags = [_flag(name, option) for name, option in options.items() if name not in shared]
        if other != method:
            lines.append(f"- {other}: {' '.join(flags) or 'no option'}")
    switches = " ".join(f"--{name.replace('_', '-')}" for name in shared)
    return "\n".join([*lines, f"- all implicit methods: {switches}"])


def _reject_flag_of_others(
    flag: str, choice: str, chosen: str, groups: Mapping[str, FlagGroup]
) -> None:
    name = flag.removeprefix("--").removeprefix("no-").replace("-", "_")
    owners = [owner for owner, group in groups.items() if name in group.options]
    if owners and chosen not in owners:
        raise ValueError(
            f"{flag}: got it with {choice} {chosen}, which has no such option, "
            f"expected {choice} {_either(owners)}"
        )


def _flag(name: str, option: Option) -> str:
    """The flag of an option. A switch that is on by default has one that turns it off."""
    prefix = "--no-" if option.default is True else "--"
    return prefix + name.replace("_", "-")


def _either(names: list[str]) -> str:
    """Names in a sentence, such as `a, b or c`."""
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else last
