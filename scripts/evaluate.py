"""Evaluate a run on tasks it has never seen: accuracy or mean squared error after 0, 1, … inner steps.

python scripts/evaluate.py runs/glyphs-cg-0 --episodes 2000 --steps 10
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import tyro
from tqdm import tqdm
from train import check_classes

import tasks
from metaimplicit.normalization import is_transductive
from metaimplicit.training import (
    CHECKPOINT,
    CONFIG,
    Options,
    build_learner,
    evaluate,
    load_learner,
    plot_adaptation,
    predict_curves,
    read_json,
    write_json,
)


@dataclass(frozen=True)
class Evaluate:
    """Evaluate a run on held-out tasks; leaves evaluation.json and adaptation.png in its folder."""

    run: tyro.conf.Positional[Path]
    """Folder that scripts/train.py left."""
    episodes: int = 600
    """Tasks, at least 2."""
    steps: int | None = None
    """Inner steps; by default those of the run's own test."""
    seed: int | None = None
    """Of the episodes; by default that of the run's own test, which gives the same tasks in the same order."""
    split: Literal["test", "validation"] = "test"
    """Whose classes: never those of training."""
    device: str = "auto"
    """auto takes CUDA where there is any; else cpu, cuda, cuda:1 …"""
    data_root: Path | None = None
    """Where the data is, if it has moved since."""
    threads: int | None = None
    """CPU threads of torch; by default torch's choice."""


def main(args: list[str]) -> None:
    chosen = tyro.cli(Evaluate, args=args)
    try:
        if not (chosen.run / CONFIG).exists():
            raise FileNotFoundError(
                f"run: found no {CONFIG} in {chosen.run}; give a folder that scripts/train.py left"
            )
        for name, least in {"episodes": 2, "steps": 0}.items():
            if (value := getattr(chosen, name)) is not None and value < least:
                raise ValueError(f"--{name}: got {value}, expected at least {least}")
        config = read_json(chosen.run / CONFIG)
        if "options" not in config or "task" not in config["options"]:
            raise ValueError(
                f"run: {chosen.run} is no run of scripts/train.py; give a folder that this left"
            )
        options = Options.load(config["options"])
        options = replace(
            options,
            device=chosen.device,
            data_root=chosen.data_root or options.data_root,
            test_episodes=chosen.episodes,
            test_steps=options.test_steps if chosen.steps is None else chosen.steps,
            threads=chosen.threads,
        ).resolved()
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        splits = tasks.load(**options.task_arguments())
        check_classes(chosen.run, splits)
        family = splits.test if chosen.split == "test" else splits.validation
        learner = build_learner(options, family)
        progress = load_learner(chosen.run / CHECKPOINT, learner)
        seed = options.test_seed if chosen.seed is None else chosen.seed
        sampler = tasks.EpisodeSampler(family, tasks=options.meta_batch, seed=seed)
    except (ValueError, FileNotFoundError, ImportError) as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)

    indices = tqdm(
        range(-(-options.test_episodes // options.meta_batch)), unit="batch", disable=None
    )
    result = evaluate(
        learner,
        (sampler[i] for i in indices),
        steps=options.test_steps,
        tasks=options.test_episodes,
    )
    fits = None
    if family.kind == "regression" and family.input_shape == (1,):
        dense = tasks.load(**options.task_arguments() | {"queries": 200}).test
        fits = predict_curves(
            learner, tasks.EpisodeSampler(dense, tasks=3, seed=seed)[0], options.test_steps
        )

    about = {
        "split": chosen.split,
        "episode_seed": seed,
        "transductive": is_transductive(learner.model),
        "meta_steps": progress.step,
    }
    write_json(chosen.run / "evaluation.json", result.summary() | about)
    plot_adaptation(chosen.run, result, title=f"{options.task}, {options.method}", fits=fits)
    print(
        f"{chosen.run}: {chosen.split} {result.metric} of {options.test_episodes} tasks, mean and 95 % interval"
    )
    print("inner steps    query " + result.metric)
    for steps, estimate in enumerate(result.curve()):
        print(f"{steps:11d}    {estimate}")


if __name__ == "__main__":
    main(sys.argv[1:])
