"""The sections of a page that say what a run was, and what it ran on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from metaimplicit.training.page import Html, definitions, element, join, note, plain, table

PLACES = ("classes", "data", "run")  # in config.json


def options_section(options: Mapping[str, Any]) -> Html:
    """Every option by name. Those of a group have its name before their own."""
    if not options:
        return note("No options were stored.")
    return definitions({name.replace("_", " "): plain(value) for name, value in options.items()})


def provenance_section(config: Mapping[str, Any]) -> Html:
    """The sittings of a config.json, its data, and the run's name for itself."""
    known = {name: plain(config[name]) for name in PLACES if config.get(name)}
    sittings = config.get("sittings", [])
    if not (known or sittings):
        return note("No config.json says what this ran on.")
    return join([sittings_table(sittings), definitions(known)])


def sittings_table(sittings: Sequence[Mapping[str, Any]]) -> Html:
    """A line for each sitting: its steps, and what it ran on."""
    rows = []
    for sitting in sittings:
        end = sitting.get("to_step")
        steps = f"{sitting.get('from_step', 0)} – {'…' if end is None else end}"
        versions = [f"{name} {v}" for name, v in sitting.get("versions", {}).items() if v]
        commit, _, changed = plain(sitting.get("commit")).partition("-")
        device = f"{plain(sitting.get('device'))}, {plain(sitting.get('threads'))} threads"
        code = element("code", commit[:12] + ("-dirty" if changed else ""))
        rows.append([steps, code, ", ".join(versions), device])
    return table(["steps", "commit", "versions", "device"], rows)
