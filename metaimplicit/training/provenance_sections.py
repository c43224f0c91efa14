"""The sections of a page that say what a run was, and what it ran on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from metaimplicit.training.page import Html, definitions, element, join, note, plain, table

PLACES = ("classes", "data", "run")  # in config.json
# What other sections show of config.json, and what programs read: its checksum, and `plan`.
SHOWN_ELSEWHERE = {*PLACES, "chosen", "parameters", "plan", "sha256", "sittings"}


def options_section(config: Mapping[str, Any]) -> Html:
    """The options in config.json by name, and what else the caller of `fit` put there.

    Options of a group have its name before their own.
    """
    given = {name: value for name, value in config.items() if name not in SHOWN_ELSEWHERE}
    if isinstance(given.get("options"), Mapping):
        given = {**given.pop("options"), **given}
    if not given:
        return note("No options were stored.")
    return definitions({name.replace("_", " "): plain(value) for name, value in given.items()})


def provenance_section(config: Mapping[str, Any]) -> Html:
    """The sittings of a config.json, its data, and the run's name for itself."""
    known = {name: plain(config[name]) for name in PLACES if config.get(name)}
    sittings = config.get("sittings", [])
    if not (known or sittings):
        return note("No config.json says what this ran on.")
    return join([sittings_table(sittings), definitions(known)])


def sittings_table(sittings: Sequence[Mapping[str, Any]]) -> Html:
    """A line for each sitting: its steps, if it noted any, and what it ran on."""
    has_steps = any(sitting.get("to_step") is not None for sitting in sittings)
    rows = []
    for sitting in sittings:
        end = sitting.get("to_step")
        steps = f"{sitting.get('from_step', 0)} – {'…' if end is None else end}"
        commit, _, changed = plain(sitting.get("commit")).partition("-")
        code = element("code", commit[:12] + ("-dirty" if changed else ""))
        versions = [f"{name} {v}" for name, v in sitting.get("versions", {}).items() if v]
        device = f"{plain(sitting.get('device'))}, {plain(sitting.get('threads'))} threads"
        if processes := sitting.get("processes"):
            device += f", {plain(processes)} processes"
        rows.append([*([steps] if has_steps else []), code, ", ".join(versions), device])
    return table([*(["steps"] if has_steps else []), "commit", "versions", "device"], rows)
