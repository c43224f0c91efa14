"""Meta-train a few-shot learner, test it on held-out tasks, and leave everything in runs/.

python scripts/train.py                                         # printed characters, 5-way 1-shot, about 5 minutes
python scripts/train.py --method nystrom --rank 20
python scripts/train.py --task sinusoid --steps 20000
python scripts/train.py --task omniglot --minutes 60 --filters 64 --meta-batch 16
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
import tyro
from tqdm import tqdm

import tasks
from metaimplicit.normalization import is_transductive
from metaimplicit.training import (
    CHECKPOINT,
    CONFIG,
    Budget,
    Options,
    build_learner,
    constant,
    cosine,
    describe,
    evaluate,
    fit,
    load_learner,
    peak_memory,
    plot_adaptation,
    plot_curves,
    predict_curves,
    read_json,
    require_new_run_folder,
    write_json,
)


def parse(args: list[str]) -> Options:
    """The command line over the defaults of its task and method, or over the options of the run to be resumed."""

    def over(default: Options) -> Options:
        return tyro.cli(Options, args=args, default=default, config=(tyro.conf.FlagCreatePairsOff,))

    options = over(Options())
    options = over(Options.of(options.task))
    options = over(Options.of(options.task, options.method)).resolved()
    require_new_run_folder(options.folder, options.resume)
    if options.resume:
        path = options.folder / CONFIG
        if not path.exists():
            raise FileNotFoundError(
                f"--resume: found no {path}; name the folder of a run with --out"
            )
        stored = Options.load(read_json(path)["options"])
        options = over(replace(stored, out=options.folder)).resolved()
        if changed := options.changed(stored):
            names = ", ".join(changed)
            raise ValueError(
                f"--resume: {names} differ from the run's; leave them out, or start a new run"
            )
    return options


def check_classes(run: Path, splits: tasks.Splits) -> None:
    """Refuse splits whose classes are not those that the run was started with (ValueError)."""
    before = read_json(run / CONFIG).get("classes", splits.digests)
    if changed := [part for part, digest in splits.digests.items() if before[part] != digest]:
        raise ValueError(
            f"task: the {changed[0]} classes are not those that {run} was started with, so it may have been trained on "
            "what it would be tested on; give it the data as it was"
        )


def main(args: list[str]) -> None:
    # Set-up: whatever can be wrong with the options shows here, before any work.
    try:
        options = parse(args)
        out = options.folder
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        splits = tasks.load(**options.task_arguments())
        if options.resume:
            check_classes(options.folder, splits)
        torch.manual_seed(options.seed)
        learner = build_learner(options, splits.train)
        optimizer = torch.optim.Adam(learner.parameters(), lr=options.outer_lr)
        sampler = tasks.EpisodeSampler(splits.train, tasks=options.meta_batch, seed=options.seed)
        budget = Budget(steps=options.steps, minutes=options.minutes)
        device = next(learner.parameters()).device
        if options.resume and (out / CHECKPOINT).exists():
            made = load_learner(out / CHECKPOINT, learner)
            if budget.spent(made) >= 1:
                sys.stderr.write(
                    f"--resume: {made.step} meta-steps in {made.seconds / 60:.1f} minutes have spent the run's budget "
                    f"(steps {options.steps}, minutes {options.minutes}): it is only tested; raise them to go on\n"
                )
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices):  # a rehearsal, which also times vmap against the loop
            rehearsal = learner.backward(sampler[0].to(device))
            optimizer.zero_grad()
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"--out: {out} cannot be made a folder ({error})") from error
    except (
        ValueError,
        FileNotFoundError,
        FileExistsError,
        FloatingPointError,
        ImportError,
    ) as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)

    validation = tasks.EpisodeSampler(
        splits.validation, tasks=options.meta_batch, seed=options.seed
    )
    batches = -(-options.validation_episodes // options.meta_batch)
    try:
        progress = fit(
            learner,
            optimizer,
            sampler,
            out=out,
            budget=budget,
            config=describe(options, learner, rehearsal.report) | {"classes": splits.digests},
            validation=lambda: (validation[i] for i in range(batches)),
            validate_every=options.validate_every,
            checkpoint_every=options.checkpoint_every,
            schedule=cosine if options.schedule == "cosine" else constant,
            clip=options.clip,
            workers=options.workers,
            resume=options.resume,
        )
    except FloatingPointError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(1)
    except KeyboardInterrupt:
        sys.stderr.write(
            "stopped; the same command with --resume goes on from the last checkpoint\n"
        )
        sys.exit(130)

    began = time.perf_counter()
    test = tasks.EpisodeSampler(splits.test, tasks=options.meta_batch, seed=options.test_seed)
    indices = tqdm(
        range(-(-options.test_episodes // options.meta_batch)),
        desc="test",
        unit="batch",
        disable=None,
    )
    result = evaluate(
        learner, (test[i] for i in indices), steps=options.test_steps, tasks=options.test_episodes
    )
    memory = peak_memory(device)
    summary = result.summary() | {
        "episode_seed": options.test_seed,
        "transductive": is_transductive(learner.model),
        "meta_steps": progress.step,
        "train_seconds": progress.seconds,
        "test_seconds": time.perf_counter() - began,
        "peak_memory_mib": memory,
    }
    write_json(out / "summary.json", summary)
    plot_curves(out)
    fits = None
    if splits.test.kind == "regression" and splits.test.input_shape == (1,):
        dense = tasks.load(**options.task_arguments() | {"queries": 200}).test
        episodes = tasks.EpisodeSampler(dense, tasks=3, seed=options.test_seed)[0]
        fits = predict_curves(learner, episodes, options.test_steps)
    plot_adaptation(out, result, title=f"{options.task}, {options.method}", fits=fits)
    print(
        f"{options.task}, {options.method}: test {result.metric} {result.curve()[-1]} (95 %, {options.test_episodes} "
        f"tasks, {options.test_steps} inner steps) after {progress.step} meta-steps in {progress.seconds:.0f} s, "
        f"peak {memory:.0f} MiB -> {out}"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
