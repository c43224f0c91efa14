"""`vectorize="auto"`: vmap, unless it differs from a loop or is impossible."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Hashable
from contextlib import suppress
from typing import Any, Literal, get_args

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten
from torch.utils.weak import WeakIdKeyDictionary

from metaimplicit.inner import InnerLoop
from metaimplicit.iterate import Iterate
from metaimplicit.lifted import LiftedProblem
from metaimplicit.methods import Method
from metaimplicit.params import Params
from metaimplicit.problem import BilevelProblem, Composite, Stream
from metaimplicit.vectorization.blame import find_differing_module
from metaimplicit.vectorization.comparison import evaluations, find_objection

AutoVectorize = Literal["auto", "vmap", "loop"]

CHECKED_CALLS = frozenset({1, 2, 50, 500})


class VmapChecks:
    """Compares vmap with a loop at the first batch of each shape, and at a few later ones.

    Example:
        >>> import torch
        >>> from metaimplicit.inner import make_inner
        >>> from metaimplicit.methods import Unrolled
        >>> problem = BilevelProblem(
        ...     init=lambda meta, data: {"w": meta["w"]},
        ...     inner_loss=lambda params, meta, data: params["w"] * (1 if data > 0 else -1),
        ...     outer_loss=lambda params, meta, data: params["w"],
        ... )
        >>> meta, inner, method = {"w": torch.ones(())}, make_inner("gradient-descent"), Unrolled()
        >>> checks = VmapChecks()
        >>> checks.objection(problem, meta, torch.ones(2), inner=inner, method=method)
        "vmap: It looks like you're attempting to use a Tensor in some data-dependent control flow"
    """

    def __init__(self) -> None:
        self._calls: Counter[Hashable] = Counter()
        self._objections: dict[Hashable, str] = {}

    def objection(
        self, problem: BilevelProblem, meta: Params, data: Any, *, inner: InnerLoop, method: Method
    ) -> str:
        """Why a loop has to be used for these data. Empty if vmap is right, as far as is known.

        A warning is given the first time that vmap is found to be wrong.

        Args:
            problem: The problem of one task.
            meta: φ.
            data: The data of all tasks, or a `Stream` of such.
            inner: The inner loop. The outer loss sees the data of the step after its last.
            method: The method. Its derivatives are compared.
        """
        second_derivatives = differentiates_twice(method, inner)
        shapes = _shapes(data.fn(0) if isinstance(data, Stream) else data)
        key = (shapes, second_derivatives)
        self._calls[key] += 1
        if key in self._objections or self._calls[key] not in CHECKED_CALLS:
            return self._objections.get(key, "")

        compared = evaluations(last_step=inner.steps, second_derivatives=second_derivatives)
        objection = find_objection(problem, meta, data, compared)
        if objection is None:
            return ""
        module = objection.module
        if objection.difference is not None:
            module = find_differing_module(problem, meta, data, objection.difference)
        reason = objection.reason
        if module is not None:
            reason = f"{_describe(module, problem)}: {reason}"
        self._objections[key] = reason
        if objection.difference is not None:
            warnings.warn(
                f"{reason}; a loop over the tasks is used in its place. Say vectorize='loop' if "
                "you know this",
                RuntimeWarning,
                stacklevel=3,
            )
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
        vectorize: With `"auto"`, vmap unless it is wrong or impossible.
        owner: The object to which the checks of vmap belong. If None, the problem.
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
        >>> lifted.vectorize, lifted.objection
        ('loop', "vmap: It looks like you're calling .item() on a Tensor")
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
    if vectorize != "auto" or not batched:
        return lifted
    checks = checks_of(owner or problem)
    objection = checks.objection(problem, meta, data, inner=inner, method=method)
    return lifted.looped(objection) if objection else lifted


def differentiates_twice(method: Method, inner: InnerLoop) -> bool:
    """Whether second derivatives of the inner loss are taken, by the method or by the inner loop.

    Example:
        >>> from metaimplicit.inner import make_inner
        >>> from metaimplicit.methods import FirstOrder
        >>> differentiates_twice(FirstOrder(), make_inner("gradient-descent"))
        False
    """
    return method.second_derivatives or inner.second_derivatives


_CHECKS = WeakIdKeyDictionary()


def checks_of(function: Any) -> VmapChecks:
    """The checks that belong to an object, for as long as it lives.

    Args:
        function: A problem or a loss. A bound method stands for its object.

    Example:
        >>> def loss(params, meta, data): ...
        >>> checks_of(loss) is checks_of(loss)
        True
    """
    owner = getattr(function, "__self__", function)
    checks = VmapChecks()
    with suppress(TypeError):  # an object without weak references is not remembered
        checks = _CHECKS.setdefault(owner, checks)
    return checks


def _shapes(data: Any) -> Hashable:
    """The structure of data, with the shapes and types of their tensors."""
    leaves, spec = tree_flatten(data)
    kinds = [(x.shape, x.dtype) if isinstance(x, Tensor) else type(x) for x in leaves]
    return str(spec), tuple(kinds)


def _describe(module: nn.Module, problem: BilevelProblem) -> str:
    """A module by its name in the model, if that is known, and its class."""
    loss = problem.inner_loss
    model = loss.module if isinstance(loss, Composite) else None
    names = {id(m): name for name, m in model.named_modules()} if model is not None else {}
    name = names.get(id(module), "")
    return f"module {name!r} ({type(module).__name__})" if name else type(module).__name__
