"""The plan of a run: measured before its first meta-step, or that of the run that is resumed."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from command_line.options import RunOptions
from command_line.ways import MeasuredPlan, Search, Way, find_plan
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
) -> MeasuredPlan:
    """The way to compute meta-steps, which the learner takes from now on.

    It is the fastest of several. The options may fix parts of it. A run that is resumed on a device
    of the same kind keeps its own, because round-off depends on it. Several processes are not
    timed.

    Parameters, buffers and the random state keep their values. Gradients are dropped.

    Args:
        options: The options.
        learner: The learner.
        sampler: What draws the training tasks.
        ranks: The processes of the run.
        threads: The largest number of CPU threads.
        can_vmap: Whether vmap gives what a loop gives.
    """
    device = next(learner.parameters()).device
    stored = read_plan(options.folder) if options.resume else None
    if stored is not None and stored.device == device.type:
        way = change_way(stored.way, options)
        if ranks.count > 1:
            way = replace(way, threads=torch.get_num_threads())
        way.apply(learner)
        return replace(stored, way=way)
    if ranks.count > 1:
        return MeasuredPlan(Way.of(learner), device.type)

    episodes = to_device(sampler[0], device)
    search = Search(
        learner,
        lambda: learner.backward(episodes).loss,
        run_seconds=partial(run_seconds, options),
    )
    is_fixed = {
        "threads": options.threads is not None or device.type == "cuda",
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


def read_plan(folder: Path) -> MeasuredPlan | None:
    """The plan of a run. None if it has none."""
    stored = read_sealed_json(folder / CONFIG).get("plan")
    return None if stored is None else MeasuredPlan.load_from(stored)


def change_way(way: Way, options: RunOptions) -> Way:
    """The way of a run that is resumed, changed by --threads and --compile."""
    compile = way.compile if options.compile == "auto" else options.compile is True
    return replace(way, threads=options.threads or way.threads, compile=compile)


def run_seconds(options: RunOptions, of_step: float) -> float:
    """How long the run takes if each meta-step takes so many seconds."""
    seconds = [] if options.minutes is None else [60 * options.minutes]
    seconds += [] if options.steps is None else [of_step * options.steps]
    return min(seconds)
