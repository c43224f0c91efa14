"""A learner's own meta-gradient against finite differences."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from metaimplicit.diagnostics.check import check_hypergradient
from metaimplicit.diagnostics.verdict import Check
from metaimplicit.learner.defaults import with_default_weights
from metaimplicit.learner.double import episode_in_float64, in_float64
from metaimplicit.learner.episodes import Episode, EpisodeBatch
from metaimplicit.learner.forms import read_episodes
from metaimplicit.learner.task_batches import TaskBatches
from metaimplicit.learner.threads import one_thread_in
from metaimplicit.learner.vectorization import preserve_random_state
from metaimplicit.unsupported import explain_unsupported, shorten
from metaimplicit.vectorization import VmapRecords, leave_comparison_to_caller


class CheckedTaskBatches(TaskBatches):
    """Batches of tasks whose meta-gradient can be checked."""

    @explain_unsupported()
    def check(
        self,
        episodes: EpisodeBatch,
        *,
        directions: int = 3,
        tolerance: float = 1e-3,
        seed: int = 0,
    ) -> Check:
        """Compare the meta-gradient with finite differences, both in float64.

        While it runs, the numbers of the learner are of type float64. At the end, the learner, its
        `.grad` and the random state are as they were. See `check_hypergradient`, which this calls.

        Args:
            episodes: A batch of tasks of one size, as for `backward`. Two or three tasks suffice.
            directions: The number of random directions of φ, ≥ 1.
            tolerance: The relative error up to which the verdict is "Right".
            seed: Seeds the random directions.

        Raises:
            ValueError: As in `backward` and `check_hypergradient`; the tasks differ in size; the
                model draws random numbers, as dropout does in training.

        Example:
            >>> from torch import nn
            >>> from torch.nn import functional as F
            >>> from metaimplicit import MetaLearner
            >>> x = torch.linspace(-1, 1, 16).reshape(2, 8, 1)  # two tasks of eight examples
            >>> learner = MetaLearner(nn.Linear(1, 1), F.mse_loss)
            >>> learner.check(((x, x.sin()), (x, x.cos()))).verdict
            'Right: it agrees with finite differences.'
        """
        batches = read_episodes(episodes)
        if len(batches) > 1:
            raise ValueError(
                f"episodes: got tasks in {len(batches)} sizes, expected one size; "
                "check tasks of one size at a time"
            )
        cuda = next(self.model.parameters()).is_cuda
        with (
            torch.inference_mode(False),
            one_thread_in(self.model),
            in_float64(self),
            preserve_random_state(self.method, cuda=cuda),
            _explained_types(),
        ):
            return copy.copy(self)._compare_with_differences(
                episode_in_float64(batches[0]),
                directions=directions,
                tolerance=tolerance,
                seed=seed,
            )

    def _compare_with_differences(self, episode: Episode, **options: Any) -> Check:
        self._vmap_records = VmapRecords()  # what this copy of the learner finds out is its own
        group, *others = self._read(episode)
        if others:
            raise ValueError(
                "episodes: got tasks with different numbers of classes, expected one number; "
                "check tasks of one number at a time"
            )
        self._check_vmap(group.data)
        way = self._way(group)
        problem = self._problem(self._network, way)
        leave_comparison_to_caller(problem)
        return check_hypergradient(
            problem,
            self.meta,
            group.data,
            inner=self.inner,
            method=with_default_weights(self.method, self.inner.steps),
            batched=True,
            vectorize=way,
            **options,
        )


@contextmanager
def _explained_types() -> Iterator[None]:
    """Say what to do where a loss or the model does not compute in float64."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        names = set(re.findall(r"\b(?:double|float|half|bfloat16|float32)\b", str(error).lower()))
        if not ("double" in names and len(names) > 1) and "different types" not in str(error):
            raise
        raise ValueError(
            f"check: it computes in float64, where the model or a loss raises: {shorten(error)}. "
            "Let all tensors that they hold or make follow the type of their arguments, as by "
            "`weight.to(outputs)`"
        ) from error
