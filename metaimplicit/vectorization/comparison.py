"""Does vmap give what a loop over the tasks gives?"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.backends import cudnn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from metaimplicit.buffers import restored_buffers
from metaimplicit.lifted import LiftedProblem, Vectorize
from metaimplicit.params import Params, leaves
from metaimplicit.problem import BilevelProblem, Stream
from metaimplicit.random_state import NoticedDraws, restored_random_state
from metaimplicit.tensors import tensors_in
from metaimplicit.unsupported import find_module, shorten
from metaimplicit.vectorization.evaluations import (
    Evaluation,
    Groups,
    of_inner_loss,
    varied_numbers,
    without_repeats,
)


class Objection(NamedTuple):
    """Why vmap cannot be used.

    Attributes:
        reason: In words.
        module: The module in which vmap raised an error. None if there is none.
        difference: What differs between vmap and a loop. None if vmap raised an error.
    """

    reason: str
    module: nn.Module | None = None
    difference: Evaluation | None = None


def find_objection(
    problem: BilevelProblem, meta: Params, data: Any, compared: list[Evaluation]
) -> Objection | None:
    """Compare vmap with a loop over at most eight of the tasks, at the parameters of `init`.

    All tasks draw the same random numbers. The random state, the buffers of modules and the
    `.grad` of `meta` are left as they were.

    Args:
        problem: The problem of one task.
        meta: φ.
        data: The data of all tasks, or a `Stream` of such.
        compared: What is compared. Except for the inner loss, what a loop cannot evaluate is left
            out.

    Returns:
        None if vmap gives what the loop gives, up to round-off.

    Raises:
        Exception: The inner loss or its gradient raises an error in a loop.

    Example:
        >>> problem = BilevelProblem(
        ...     init=lambda meta, data: {"w": meta["w"]},
        ...     inner_loss=lambda params, meta, data: params["w"] * data,
        ...     outer_loss=lambda params, meta, data: params["w"] * data.item(),
        ... )
        >>> from metaimplicit.vectorization.evaluations import evaluations
        >>> compared = evaluations(last_step=1, second_derivatives=False)
        >>> find_objection(problem, {"w": torch.ones(())}, torch.ones(2), compared).reason
        "vmap: It looks like you're calling .item() on a Tensor"
    """
    trial = _Trial(problem, meta, choose_tasks(data))
    with torch.enable_grad(), warnings.catch_warnings(), _full_precision():
        warnings.simplefilter("ignore")
        if _all_agree(trial, without_repeats(compared)):
            return None
        for evaluate in compared:
            objection = _compare(trial, evaluate)
            if objection is not None:
                return objection
    return None


class _Trial(NamedTuple):
    """The problem, φ and the tasks with which evaluations are run by vmap and in a loop."""

    problem: BilevelProblem
    meta: Params
    data: Any

    @property
    def device(self) -> torch.device:
        return next(iter(self.meta.values())).device

    def run(
        self,
        compared: list[Evaluation],
        vectorize: Vectorize,
        *,
        shift: float = 0.0,
        same: bool = True,
    ) -> list[Groups]:
        """What each evaluation returns, in the random state of now.

        Args:
            compared: The evaluations.
            vectorize: How they are run.
            shift: By how much of their sizes φ and then θ_0, made from that φ, are moved before.
            same: Whether all tasks draw the same random numbers.
        """
        phi = {name: m.detach() for name, m in self.meta.items()}
        moved = {n: _shifted(m, shift) for n, m in phi.items() if m.is_floating_point()}
        phi |= leaves(moved)
        with restored_random_state(self.device), restored_buffers():
            lifted = LiftedProblem(self.problem, self.data, batched=True, vectorize=vectorize)
            if same:
                lifted = lifted.with_same_randomness()
            start = lifted.looped("").init(phi)
            theta = leaves({n: _shifted(p, shift) for n, p in start.items()})
            return [evaluate(lifted, theta, phi) for evaluate in compared]

    def largest_difference(self, loop: Groups, vmap: Groups) -> Difference:
        """Their largest difference, 0 if it is of the size of round-off."""
        difference = largest_difference(loop, vmap)
        eps = unit_roundoff([*tree_leaves(loop), *self.meta.values()])
        return difference if difference.size > 3 * math.sqrt(eps) else Difference(0.0, "")


def _all_agree(trial: _Trial, compared: list[Evaluation]) -> bool:
    """Whether vmap gives what a loop gives, and nothing draws random numbers.

    It takes less time than a look at one evaluation after the other.
    """
    draws = NoticedDraws()
    try:
        loop = trial.run(compared, "loop")
        with draws:
            vmap = trial.run(compared, "vmap")
    except Exception:
        return False
    if draws.found:
        return False
    differences = map(trial.largest_difference, loop, vmap)
    return not any(difference.size for difference in differences)


def _compare(trial: _Trial, evaluate: Evaluation) -> Objection | None:
    """Why vmap cannot be used for one evaluation."""

    def run(vectorize: Vectorize, **options: Any) -> Groups:
        (groups,) = trial.run([evaluate], vectorize, **options)
        return groups

    try:
        loop = run("loop")
    except Exception:
        if evaluate is of_inner_loss:
            raise  # every method would meet it, and the message of a loop is clearer
        return None
    draws = NoticedDraws()
    try:
        with draws:
            vmap = run("vmap")
        # Torch allows some draws only where all tasks draw the same numbers.
        differently = run("vmap", same=False) if draws.found else vmap
    except Exception as error:
        return Objection(shorten(error), module=find_module(error))

    cause = ""
    difference = trial.largest_difference(loop, vmap)
    if draws.found and not difference.size:
        with restored_random_state(trial.device):
            torch.rand((), device=trial.device)  # From here on, other numbers follow.
            elsewhere = run("loop")
        if largest_difference(loop, elsewhere).size == 0:
            # Each task draws other numbers in vmap, and the same ones in a loop.
            cause = ", because a loss seeds a generator by itself"
            difference = trial.largest_difference(loop, differently)
    if not difference.size:
        return None
    # The model may compute in a shorter type, as autocast inside of it does.
    seen = _SeenTypes()
    with suppress(Exception), seen:
        run("loop")
    if difference.size <= 8 * seen.unit_roundoff:
        return None
    # What amplifies a change of the parameters by round-off may amplify that of vmap, too.
    eps = unit_roundoff([*tree_leaves(loop), *trial.meta.values()])
    roundoff = largest_difference(loop, run("loop", shift=8 * eps))
    if difference.size <= 100 * roundoff.size:
        return None
    reason = f"vmap differs from a loop by {difference.size:.0e} in {difference.where}{cause}"
    return Objection(reason, difference=evaluate)


def choose_tasks(data: Any, at_most: int = 8) -> Any:
    """The data of the first and the last task, and of some between them.

    Example:
        >>> choose_tasks(torch.arange(5), at_most=3)
        tensor([0, 2, 4])
    """
    if isinstance(data, Stream):
        return Stream(lambda t: choose_tasks(data.fn(t), at_most))

    def chosen(x: Any) -> Any:
        if not isinstance(x, Tensor) or len(x) <= at_most:
            return x
        rows = torch.linspace(0, len(x) - 1, at_most, device=x.device).round().long()
        return x[rows]

    return tree_map(chosen, data)


@contextmanager
def _full_precision() -> Iterator[None]:
    """Let float32 products not be rounded to TF32, which by itself looks like a difference."""
    with ExitStack() as stack:
        # Torch has no common setting to read where a program has set operations one by one.
        with suppress(RuntimeError):
            stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
            torch.set_float32_matmul_precision("highest")
        with suppress(RuntimeError):
            stack.callback(setattr, cudnn, "allow_tf32", cudnn.allow_tf32)
            cudnn.allow_tf32 = False
        yield


class Difference(NamedTuple):
    """The largest one between two results.

    Attributes:
        size: Relative to the norm of its group.
        where: In which group, and of which name.
    """

    size: float
    where: str


def largest_difference(groups: Groups, others: Groups) -> Difference:
    """The largest distance of a tensor, relative to the norm of its group, over all rows."""
    largest = Difference(0.0, "")
    for label, group in groups.items():
        norms = [_row_norms(x.nan_to_num()) for x in group.values()]
        for name, x in group.items():
            other = others.get(label, {}).get(name, torch.zeros_like(x))
            same = (x == other) | (x.isnan() & other.isnan())
            distance = _row_norms(torch.where(same, 0.0, x - other))
            ratio = distance / torch.stack(norms).norm(dim=0).clamp(min=1e-300)
            size = float(ratio.nan_to_num(nan=math.inf).max())
            if size > largest.size:
                largest = Difference(size, f"{label} of {name!r}" if name else label)
    return largest


def _row_norms(x: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(x.detach().double().reshape(len(x), -1), dim=1)
    return norms


def unit_roundoff(tensors: list[Tensor]) -> float:
    """That of the coarsest type that the losses may be computed in."""
    device = tensors[0].device.type
    types = {x.dtype for x in tensors if x.is_floating_point()}
    if torch.is_autocast_enabled(device):
        types.add(torch.get_autocast_dtype(device))
    return max(torch.finfo(dtype).eps for dtype in types)


class _SeenTypes(TorchDispatchMode):
    """Keeps the round-off of the coarsest floating-point type that an operation returns."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.unit_roundoff = 0.0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        for x in tensors_in(result):
            if x.is_floating_point():
                self.unit_roundoff = max(self.unit_roundoff, torch.finfo(x.dtype).eps)
        return result


def _shifted(x: Tensor, relative: float) -> Tensor:
    x = x.detach()
    return x * (1 + relative * varied_numbers(x)) if relative else x
