"""Meta-train a few-shot learner, test it on held-out tasks, and leave everything in runs/.

python scripts/train.py                                  # printed characters, 5-way 1-shot
python scripts/train.py --method nystrom --rank 20
python scripts/train.py --method nystrom --help          # the options of a method
python scripts/train.py --task sinusoid --steps 20000
python scripts/train.py --task omniglot --minutes 60 --filters 64 --meta-batch 16
torchrun --nproc-per-node 2 scripts/train.py             # the tasks of a meta-step in 2 processes
"""

from __future__ import annotations

import startup  # isort: skip  # noqa: F401  # before what takes time to import

import sys
import time
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from command_line import (
    MeasuredPlan,
    RunOptions,
    anneal_method,
    build_learner,
    build_optimizer,
    check_classes,
    explain_stop,
    find_recipe,
    handle_errors,
    join_ranks,
    leave_ranks,
    leave_report,
    load_init,
    load_own_checkpoint,
    parse,
    predict_test_curves,
    require_no_ways,
    run_identity,
    run_test,
    set_up_cpu,
    settle_plan,
    summarize_test,
    undone,
)

import tasks
from metaimplicit import MetaLearner
from metaimplicit.learner import Ranks
from metaimplicit.methods import Report
from metaimplicit.training import (
    Budget,
    Progress,
    constant,
    cosine,
    describe,
    describe_unsettled,
    evaluate,
    fit,
    only_writer,
    peak_memory,
    plot_adaptation,
    plot_curves,
    read_metrics,
    to_device,
    write_json,
)


@dataclass(frozen=True)
class Run:
    """All that a run consists of, before it starts."""

    options: RunOptions
    ranks: Ranks
    splits: tasks.Splits
    learner: MetaLearner
    optimizer: torch.optim.Optimizer
    sampler: tasks.EpisodeSampler
    budget: Budget
    plan: MeasuredPlan
    rehearsal: Report
    identity: dict[str, Any]


@partial(handle_errors, takes_ranks=True)
def main(args: list[str]) -> None:
    """Train a learner and test it. Of several processes, the first one writes and tests."""
    options = parse(args)
    run = set_up(options, join_ranks(options))
    folder = run.options.folder
    advice = f"the same command with --resume continues the run in {folder}"
    with explain_stop(advice):
        if run.ranks.rank > 0:
            train(run)
            return
        with only_writer(folder):
            progress = train(run)
            test(run, progress)


def set_up(options: RunOptions, ranks: Ranks) -> Run:
    """Build the run. All errors in the options show here, before any work."""
    set_up_cpu(options.threads)
    splits = load_splits(options, ranks)
    if splits.source:
        print(f"{options.task}: {splits.source}")
    if options.resume:
        check_classes(options.folder, splits)

    torch.manual_seed(options.seed)
    train_family = training_family(splits.train, options)
    if options.augment:
        is_grey = train_family.input_shape[:1] == (1,)
        train_family = (
            tasks.Distorted(train_family)
            if is_grey
            else tasks.Augmented(train_family, jitter=options.jitter)
        )
    learner = build_learner(options, train_family)
    options = load_init(options, learner)
    anneal_method(options, learner, spent=0.0)
    optimizer = build_optimizer(options, learner)
    sampler = tasks.EpisodeSampler(
        train_family,
        tasks=options.meta_batch,
        seed=options.seed,
    )
    budget = Budget(steps=options.steps, minutes=options.minutes)
    identity = run_identity(options, splits)
    if options.resume and ranks.rank == 0:
        warn_if_spent(options.folder, learner, identity, budget)

    threads = torch.get_num_threads()
    torch.set_num_threads(options.threads or (threads if ranks.count > 1 else 1))
    rehearsal = rehearse(learner, sampler, ranks)
    can_vmap = not rehearsal.tasks_by.startswith("loop: ")  # and a reason
    anneal_method(options, learner, spent=1.0)  # how most of the run is computed
    plan = settle_plan(
        options,
        learner,
        sampler=sampler,
        ranks=ranks,
        threads=threads,
        can_vmap=can_vmap,
    )
    anneal_method(options, learner, spent=0.0)
    if ranks.rank == 0:
        print(plan.table() if options.plan and plan.trials else plan.summary(), flush=True)
    make_folder(options.folder)
    return Run(
        options,
        ranks,
        splits,
        learner,
        optimizer,
        sampler,
        budget,
        plan,
        rehearsal,
        identity,
    )


def load_splits(options: RunOptions, ranks: Ranks) -> tasks.Splits:
    """The tasks of the run. The first process reads them before the others, and may download.

    Raises:
        ValueError: The data do not suit the options, or hold NaN or Inf. Or a number of classes is
            given for regression.
    """
    arguments = options.task_arguments()
    loaded: list[tasks.Splits] = []
    ranks.from_first(lambda: loaded.append(tasks.load(**arguments)))
    splits = loaded[0] if loaded else tasks.load(**arguments)
    for family in (splits.train, splits.validation, splits.test):
        if isinstance(family, tasks.FewShot):
            family.pool.require_finite()
    if splits.train.kind == "regression" and not options.resume:
        ways = None if options.ways == RunOptions.ways else options.ways
        require_no_ways(options.task, ways=ways, train_ways=options.train_ways)
    return splits


def training_family(family: tasks.TaskFamily, options: RunOptions) -> tasks.TaskFamily:
    """The tasks to train with: those of `family`, with their own numbers of ways and shots."""
    arguments = options.training_arguments()
    if arguments == options.task_arguments():
        return family
    if isinstance(family, tasks.FewShot):  # the other splits may have too few classes
        return family.with_sizes(ways=arguments["ways"], shots=arguments["shots"])
    return tasks.load(**arguments).train


def warn_if_spent(
    folder: Path, learner: MetaLearner, identity: dict[str, Any], budget: Budget
) -> None:
    """Say so if the run that is resumed has no budget left. It is tested all the same."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # `fit` gives the same warnings
            progress = load_own_checkpoint(folder, learner, identity, select="last")
    except FileNotFoundError:
        return  # The run ended before its first checkpoint.
    if budget.spent(progress) >= 1:
        sys.stderr.write(
            f"--resume: {progress.step} meta-steps in {progress.seconds / 60:.1f} minutes have "
            f"spent the run's budget (steps {budget.steps}, minutes {budget.minutes}): it is only "
            "tested; raise them to continue\n"
        )


def rehearse(learner: MetaLearner, sampler: tasks.EpisodeSampler, ranks: Ranks) -> Report:
    """One backward pass and one evaluation. They meet all errors, and time vmap against the loop.

    Each process takes its share of the tasks.

    It leaves parameters, buffers, gradients and random state as they were.
    """
    device = next(learner.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []), undone(learner):
        episodes = to_device(ranks.share(sampler[0]), device)
        step = learner.backward(episodes)
        # Some inner loops train, but do not give the iterates that validation looks at.
        evaluate(learner, [episodes], steps=[learner.inner.steps])
    return step.report


def make_folder(out: Path) -> None:
    """Make the folder of the run.

    Raises:
        ValueError: It cannot be made.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out: {out} cannot be made a folder ({error})") from error


def train(run: Run) -> Progress:
    """Train the learner until the budget is spent."""
    options = run.options
    validation = tasks.EpisodeSampler(
        run.splits.validation, tasks=options.meta_batch, seed=options.seed
    )
    batches = -(-options.validation_episodes // options.meta_batch)  # rounded up
    config = {"options": options.dump(), **describe(run.learner, run.rehearsal)}
    config |= {"plan": run.plan.dump()}
    progress = fit(
        run.learner,
        run.optimizer,
        run.sampler,
        out=options.folder,
        budget=run.budget,
        config=config | {"classes": run.splits.digests, "data": run.splits.source},
        identity=run.identity,
        validation=lambda: (validation[i] for i in range(batches)),
        validate_every=options.validate_every,
        checkpoint_every=options.checkpoint_every,
        before_step=partial(anneal_method, options, run.learner),
        schedule=cosine if options.schedule == "cosine" else constant,
        clip=options.clip,
        workers=options.workers,
        resume=options.resume,
        ranks=run.ranks,
    )
    leave_ranks()
    return progress


def test(run: Run, progress: Progress) -> None:
    """Test the learner, and leave summary.json, the plots and the report."""
    options = run.options
    out = options.folder
    start = time.perf_counter()
    tested = load_own_checkpoint(out, run.learner, run.identity, select=options.select)
    family = run.splits.test
    result = run_test(run.learner, family, options, seed=options.test_seed)
    summary = summarize_test(run.learner, result, family, options, seed=options.test_seed)
    memory = peak_memory(next(run.learner.parameters()).device)
    summary |= {
        "meta_steps": progress.step,
        "tested_meta_step": tested.step,
        "train_seconds": progress.seconds,
        "test_seconds": time.perf_counter() - start,
        "peak_memory_mib": memory,
    }
    write_json(out / "summary.json", summary)

    name = options.recipe or f"{options.task}, {options.approach}"
    print(
        f"{name}: test {result.metric} {result.curve()[-1]} (95 %, {options.test_episodes} tasks, "
        f"{options.test_steps} inner steps) after {progress.step} meta-steps in "
        f"{progress.seconds:.0f} s, peak {memory:.0f} MiB -> {out}",
        flush=True,
    )
    plot_curves(out)
    fits = predict_test_curves(run.learner, family, options, "test", seed=options.test_seed)
    plot_adaptation(out, result, title=name, fits=fits)
    unsettled = describe_unsettled(read_metrics(out, complete=False))
    if unsettled:
        print(f"warning: {unsettled}", file=sys.stderr, flush=True)
    leave_report(
        out / "report.html",
        run.learner,
        run.splits.test,
        options,
        evaluation=result,
        summary=summary,
        fits=fits,
    )
    if options.recipe is not None:
        print(f"In papers: {find_recipe(options.recipe).describe_papers()}")


if __name__ == "__main__":
    main(sys.argv[1:])
