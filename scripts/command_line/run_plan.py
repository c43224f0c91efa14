"""The plan of a run: measured before its first meta-step, or that of the run that is resumed."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from command_line.options import RunOptions
from command_line.plan import Plan, Search, Way, find_plan
from metaimplicit import MetaLearner
from metaimplicit.learner import Ranks
from metaimplicit.training import CONFIG, read_sealed_json, to_device
from tasks import EpisodeSampler


def settle_plan(
    options: RunOptions,
    learner: MetaLearner,
    *,
    sampler: EpisodeSampler,
    ranks: Ranks,
    threads: int,
    can_vmap: bool,
) -> Plan:
    """The way to compute meta-steps, which the learner takes from now on.

    It is the fastest of several, or what the options say. A run that is resumed keeps its own,
    because round-off depends on it. Several processes are not timed.

    It leaves parameters, buffers, gradients and random state as they were.

    Args:
        options: The options.
        learner: The learner.
        sampler: What draws the training tasks.
        ranks: The processes of the run.
        threads: The largest number of CPU threads.
        can_vmap: Whether vmap gives what a loop gives.
    """
    on_cuda = next(learner.parameters()).is_cuda
    stored = read_plan(options) if options.resume else None
    if stored is not None:
        stored.apply(learner)
        return Plan(stored)
    if ranks.count > 1:
        return Plan(Way.of(learner))

    episodes = to_device(sampler[0], next(learner.parameters()).device)
    search = Search(
        learner,
        lambda: learner.backward(episodes).loss,
        seconds=partial(run_seconds, options),
    )
    is_fixed = {
        "threads": options.threads is not None or on_cuda,
        "vectorize": options.vectorize != "auto" or options.chunk_size is not None or not can_vmap,
        "chunk_size": options.chunk_size is not None,
        "compile": options.compile != "auto",
    }
    return find_plan(
        search,
        tasks=options.meta_batch,
        threads=threads,
        fixed={name for name, fixed in is_fixed.items() if fixed},
    )


def read_plan(options: RunOptions) -> Way | None:
    """The way of a run that is resumed, but for what the options say. None if it has none."""
    config = read_sealed_json(options.folder / CONFIG)
    if "plan" not in config:
        return None
    way = Way(**config["plan"]["way"])
    changes: dict[str, Any] = {"threads": options.threads or way.threads}
    if options.compile != "auto":
        changes["compile"] = options.compile
    return replace(way, **changes)


def run_seconds(options: RunOptions, of_step: float) -> float:
    """How long the run takes if each meta-step takes so many seconds."""
    seconds = [] if options.minutes is None else [60 * options.minutes]
    seconds += [] if options.steps is None else [of_step * options.steps]
    return min(seconds)
