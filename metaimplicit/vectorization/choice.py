"""`vectorize="auto"`: vmap, unless it differs from a loop or is impossible."""

from __future__ import annotations

import warnings
from collections.abc import Hashable
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from metaimplicit.inner import InnerLoop
from metaimplicit.iterate import Iterate
from metaimplicit.lifted import LiftedProblem
from metaimplicit.methods import Method
from metaimplicit.params import Params
from metaimplicit.problem import BilevelProblem, Composite, Stream
from metaimplicit.random_state import restored_host_state
from metaimplicit.tensors import tensors_in
from metaimplicit.vectorization.blame import find_differing_module
from metaimplicit.vectorization.comparison import find_objection
from metaimplicit.vectorization.evaluations import evaluations

AutoVectorize = Literal["auto", "vmap", "loop"]

CHECKED_CALLS = frozenset({1, 2, 50, 500})


@dataclass
class ShapeRecord:
    """What is known of vmap for data of one shape.

    Attributes:
        calls: How often there were such data.
        objection: Why a loop has to be used. Empty if vmap is right, as far as is known.

    Example:
        >>> [ShapeRecord(calls).is_due for calls in (1, 2, 3)]
        [True, True, False]
    """

    calls: int = 0
    objection: str = ""

    @property
    def is_due(self) -> bool:
        """Whether vmap and a loop should be compared at this call."""
        return self.calls in CHECKED_CALLS and not self.objection


class VmapRecords:
    """The record of each kind of data: of the shapes and dtypes of its tensors, in their order.

    How the tensors are nested does not count. A `Stream` counts as its first data, `fn(0)`.

    Example:
        >>> import torch
        >>> records = VmapRecords()
        >>> [records.next_call(torch.zeros(n)).calls for n in (2, 2, 3)]
        [1, 2, 1]
    """

    def __init__(self) -> None:
        self._records: dict[Hashable, ShapeRecord] = {}

    def next_call(self, data: Any, mode: Hashable = None) -> ShapeRecord:
        """The record of the kind of `data`, in which this call is counted.

        Args:
            data: The data.
            mode: What else changes what the losses compute, such as which modules are in training.
        """
        if isinstance(data, Stream):
            data = data.fn(0)
        key = tuple((x.shape, x.dtype) for x in tensors_in(data))
        record = self._records.setdefault((key, mode), ShapeRecord())
        record.calls += 1
        return record


@restored_host_state()
def explain_objection(
    problem: BilevelProblem,
    meta: Params,
    data: Any,
    *,
    inner: InnerLoop,
    method: Method,
    keeps_vmap: bool = False,
) -> str:
    """Why a loop has to be used for these data. Empty if vmap gives what a loop gives.

    A warning is given if vmap gives something else, as it does for hooks of tensors and modules.

    Args:
        problem: The problem of one task.
        meta: φ.
        data: The data of all tasks, or a `Stream` of such.
        inner: The inner loop. The outer loss sees the data of the step after its last.
        method: The method.
        keeps_vmap: Whether vmap is used all the same, because the user asked for it.

    Example:
        >>> import torch
        >>> from metaimplicit.inner import make_inner
        >>> from metaimplicit.methods import Unrolled
        >>> problem = BilevelProblem(
        ...     init=lambda meta, data: {"w": meta["w"]},
        ...     inner_loss=lambda params, meta, data: params["w"] * data,
        ...     outer_loss=lambda params, meta, data: params["w"] * data.item(),
        ... )
        >>> meta, data = {"w": torch.ones(())}, torch.ones(2)
        >>> inner = make_inner("gradient-descent")
        >>> explain_objection(problem, meta, data, inner=inner, method=Unrolled())
        "vmap: It looks like you're calling .item() on a Tensor"
    """
    twice = differentiates_twice(method, inner)
    compared = evaluations(last_step=inner.steps, second_derivatives=twice)
    objection = None
    with suppress(Exception) if keeps_vmap else nullcontext():  # a loop may be impossible
        objection = find_objection(problem, meta, data, compared)
    if objection is None:
        return ""
    module = objection.module
    if objection.difference is not None:
        module = find_differing_module(problem, meta, data, objection.difference)
    reason = objection.reason
    if module is not None:
        reason = f"{_describe(module, problem)}: {reason}"
    if objection.difference is not None:
        advice = (
            "the loop is right, and vmap is used because of vectorize='vmap'. Say 'auto' or 'loop'"
            if keeps_vmap
            else "a loop over the tasks is used in its place. Say vectorize='loop' if you know this"
        )
        warnings.warn(f"{reason}; {advice}", RuntimeWarning, stacklevel=3)
    return reason


def lift(
    problem: BilevelProblem,
    meta: Params,
    data: Any,
    *,
    inner: InnerLoop,
    method: Method,
    batched: bool,
    vectorize: AutoVectorize,
    owner: Any = None,
    chunk_size: int | None = None,
    start: Iterate | None = None,
) -> LiftedProblem:
    """The problem over the task axis, by vmap or by a loop, as `vectorize` says.

    Args:
        problem: As for `LiftedProblem`.
        meta: φ.
        data: As for `LiftedProblem`.
        inner: The inner loop.
        method: The method.
        batched: As for `LiftedProblem`.
        vectorize: With `"auto"`, vmap unless it is wrong or impossible. With `"vmap"`, a warning
            says so if it is wrong.
        owner: The object to which what is known of vmap belongs. If None, the problem.
        chunk_size: As for `LiftedProblem`.
        start: As for `LiftedProblem`.

    Raises:
        ValueError: As for `LiftedProblem`.

    Example:
        >>> import torch
        >>> from metaimplicit.inner import make_inner
        >>> from metaimplicit.methods import Unrolled
        >>> problem = BilevelProblem(
        ...     init=lambda meta, data: {"w": meta["w"]},
        ...     inner_loss=lambda params, meta, data: params["w"] * data,
        ...     outer_loss=lambda params, meta, data: params["w"] * data.item(),
        ... )
        >>> lifted = lift(
        ...     problem,
        ...     {"w": torch.ones(())},
        ...     torch.ones(2),
        ...     inner=make_inner("gradient-descent"),
        ...     method=Unrolled(),
        ...     batched=True,
        ...     vectorize="auto",
        ... )
        >>> lifted.tasks_by
        "loop: vmap: It looks like you're calling .item() on a Tensor"
    """
    if vectorize not in get_args(AutoVectorize):
        raise ValueError(f"vectorize: got {vectorize!r}, expected 'auto', 'vmap' or 'loop'")
    lifted = LiftedProblem(
        problem,
        data,
        batched=batched,
        vectorize="vmap" if vectorize == "auto" else vectorize,
        chunk_size=chunk_size,
        start=start,
        second_derivatives=differentiates_twice(method, inner),
    )
    owner = owner or problem
    asked = vectorize == "vmap"
    if not batched or vectorize == "loop" or (asked and owner in _COMPARED_ELSEWHERE):
        return lifted
    record = records_of(owner, method).next_call(data)
    if record.is_due:
        record.objection = explain_objection(
            problem, meta, data, inner=inner, method=method, keeps_vmap=asked
        )
    return lifted.looped(record.objection) if record.objection and not asked else lifted


_COMPARED_ELSEWHERE = WeakIdKeyDictionary()


def leave_comparison_to_caller(owner: Any) -> None:
    """Do not compare vmap with a loop for this owner when `vectorize="vmap"`: its maker does so.

    Example:
        >>> def loss(params, meta, data): ...
        >>> leave_comparison_to_caller(loss)
    """
    _COMPARED_ELSEWHERE[owner] = True


def differentiates_twice(method: Method, inner: InnerLoop) -> bool:
    """Whether second derivatives of the inner loss are taken, by the method or by the inner loop.

    Example:
        >>> from metaimplicit.inner import make_inner
        >>> from metaimplicit.methods import FirstOrder
        >>> differentiates_twice(FirstOrder(), make_inner("gradient-descent"))
        False
    """
    return method.second_derivatives or inner.second_derivatives


_RECORDS = WeakIdKeyDictionary()  # by owner, and then by its use


def records_of(owner: Any, method: Method) -> VmapRecords:
    """What is known of vmap for a problem or a loss, for as long as that lives.

    Args:
        owner: The problem or the loss. A bound method stands for its object.
        method: The method, since other methods need other derivatives.

    Example:
        >>> from metaimplicit.methods import FirstOrder
        >>> def loss(params, meta, data): ...
        >>> records_of(loss, FirstOrder()) is records_of(loss, FirstOrder())
        True
    """
    by_use: dict[Hashable, VmapRecords] = {}
    with suppress(TypeError):  # an object without weak references is not remembered
        by_use = _RECORDS.setdefault(getattr(owner, "__self__", owner), by_use)
    function = getattr(owner, "__func__", None)  # an object may have several losses
    key = (function, type(method), method.second_derivatives)
    return by_use.setdefault(key, VmapRecords())


def _describe(module: nn.Module, problem: BilevelProblem) -> str:
    """A module by its name in the model, if that is known, and its class."""
    loss = problem.inner_loss
    model = loss.module if isinstance(loss, Composite) else None
    names = {id(m): name for name, m in model.named_modules()} if model is not None else {}
    name = names.get(id(module), "")
    return f"module {name!r} ({type(module).__name__})" if name else type(module).__name__
