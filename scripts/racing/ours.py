"""Learners of metaimplicit in the race, with the options of train.py."""

from __future__ import annotations

from dataclasses import replace

from command_line import RunOptions, build_learner, build_optimizer, default_options
from command_line.options import HeadFlag
from command_line.recipes import FEATURES
from torch import Tensor

from metaimplicit.learner import Ranks
from metaimplicit.normalization import describe_normalization
from metaimplicit.training import constant, cosine, evaluate
from metaimplicit.training.meta_step import take_step
from racing.contender import Sizes
from tasks import Episodes, TaskFamily

HEADS: tuple[HeadFlag, ...] = ("ridge", "logistic", "prototypes")
METHODS = ("cg", "unrolled", "first-order")


def our_options(task: str, name: str) -> RunOptions:
    """The options of a contender: the defaults of a method, or those of the recipes with a head.

    Args:
        task: The flag of the task.
        name: One of `HEADS`, whose features are evaluated once, or of `METHODS`, with which all
            parameters adapt.
    """
    for head in HEADS:
        if name == head:
            return replace(default_options(task, head=head), device="cpu", **FEATURES)
    return replace(default_options(task, method=name), device="cpu")


class OurLearner:
    """A `MetaLearner` that is trained and tested as train.py does it."""

    def __init__(self, options: RunOptions, family: TaskFamily) -> None:
        self.options = options
        self.module = build_learner(options, family)
        self.optimizer = build_optimizer(options, self.module)
        self.schedule = cosine if options.schedule == "cosine" else constant
        self.normalization = describe_normalization(self.module.model)

    @staticmethod
    def sizes(options: RunOptions) -> Sizes:
        """The training tasks of a run with these options."""
        ways = options.train_ways or options.ways
        return Sizes(tasks=options.meta_batch, ways=ways, queries=options.queries)

    def step(self, episodes: Episodes, *, spent: float) -> None:
        """One meta-step, by a step size that decays as the options say."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.options.outer_lr * self.schedule(spent)
        take_step(
            self.module,
            self.optimizer,
            episodes,
            ranks=Ranks(),
            clip=self.options.clip,
            step=0,
            context="the race ends here",
        )

    def accuracies(self, episodes: Episodes) -> Tensor:
        """The query accuracy of each task, `[tasks]`, after the inner steps of a test."""
        return evaluate(self.module, [episodes], steps=[self.options.test_steps]).values[-1]
