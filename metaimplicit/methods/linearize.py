"""The inner problem linearised at θ*: A = core + σI, and ∂f/∂θ with its graph to φ."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from metaimplicit.lifted import LiftedProblem
from metaimplicit.methods.base import Gradients
from metaimplicit.methods.equation import aliases
from metaimplicit.operators import (
    CurvatureClass,
    Hessian,
    LinearOperator,
    LossParts,
    find_curvature,
)
from metaimplicit.params import Params
from metaimplicit.problem import Composite, Decay, Proximal
from metaimplicit.random_state import HostState, NoticedDraws, restored_host_state

Result = TypeVar("Result")


@dataclass(frozen=True)
class Linearization:
    """The inner problem at a point θ.

    Args:
        core: A without the known multiple of the identity, shape `(tasks, n)`.
        gradient: ∂f/∂θ, `{name: [tasks, *shape]}`, with its graph to φ.
        sigma: σ, the strength of a `Proximal` penalty. It is 0 without one.
        parts: The first term of f, for a preconditioner that looks into it. None if compiled.
        compiled_mixed_product: u ↦ −(∂²f/∂θ∂φ)ᵀ u by entries of φ, and ∂f/∂θ. If None, `gradient`
            has the graph for it. If not, it has none.
    """

    core: LinearOperator
    gradient: Params
    sigma: float
    parts: LossParts | None
    compiled_mixed_product: Callable[[Tensor], tuple[Params, Params]] | None = None

    def residual(self, u: Tensor, v: Tensor) -> Tensor:
        """‖v − Au‖/‖v‖ of any u, `[tasks]`. It is 0 where v is."""
        left = v - (self.core.matvec(u) + self.sigma * u)
        smallest = torch.finfo(v.dtype).tiny
        share: Tensor = left.norm(dim=-1) / v.norm(dim=-1).clamp(min=smallest)
        return share

    def error_bound(self, residual_norm: Tensor, sigma: float) -> Tensor | None:
        """‖v − Au‖/σ ≥ ‖u − A⁻¹v‖, since A ⪰ σI if the core is positive semi-definite.

        Args:
            residual_norm: ‖v − Au‖, `[tasks]`.
            sigma: σ of A, with the damping of the method.
        """
        if not self.core.semidefinite or not sigma > 0:
            return None
        return residual_norm / sigma


def without_unread(
    v: Tensor,
    residual: Tensor,
    operator: LinearOperator,
    mixed_product: Callable[[Tensor], tuple[Gradients, Tensor]],
) -> Tensor:
    """The vector v without the entries of θ that F(θ, φ) = 0, the inner problem, does not read.

    Such an entry keeps its value, whatever φ is. But A u = v has no solution if v is not 0 where a
    row of A is. Examples are the rows of an embedding for words that are not in the batch, units
    that are never active, and parameters that only the outer loss reads. If φ can make F depend on
    one of them, as an example weight that is 0 can, v stays as it is.

    What F reads is told by F and its first derivatives at θ alone.

    Args:
        v: ∂g/∂θ, `[tasks, n]`.
        residual: F, such as ∂f/∂θ, likewise, or zeros if it is not known yet. An entry that is not
            0 is read.
        operator: A, whose product is taken if there are entries in doubt.
        mixed_product: w ↦ (∂F/∂φ)ᵀ w and F, which is taken if there are rows of zeros.

    Example:
        >>> f = lambda params: params["w"][:, 0].square()  # it reads one of two numbers
        >>> hessian = Hessian(f, {"w": torch.zeros(1, 2)})
        >>> residual = torch.zeros(1, 2)
        >>> without_unread(torch.ones(1, 2), residual, hessian, lambda w: ({}, residual))
        tensor([[1., 0.]])
    """
    in_doubt = (residual == 0) & (v != 0)
    if not bool(in_doubt.any()):
        return v
    # No row but a row of zeros has the product 0 with numbers without a pattern.
    count = torch.arange(1, v.shape[-1] + 1, dtype=torch.float32, device=v.device)
    numbers = count.square().cos().to(v.dtype).expand_as(v)
    unread = in_doubt & (operator.matvec(numbers) == 0)
    if not bool(unread.any()):
        return v
    of_phi, residual = mixed_product(torch.where(unread, numbers, 0.0))
    if any(bool(g.any()) for g in of_phi.values() if g is not None):
        return v
    return torch.where(unread & (residual == 0), 0.0, v)


def linearize(
    problem: LiftedProblem,
    params: Params,
    meta: Params,
    data: Any,
    *,
    curvature: str | CurvatureClass,
    decay: Decay | None = None,
    **options: Any,
) -> Linearization:
    """The inner problem at θ = `params`, as an implicit method needs it.

    Args:
        problem: The lifted problem.
        params: θ, `{name: [tasks, *shape]}`.
        meta: φ, leaves of autograd.
        data: What the inner loss sees.
        curvature: What A is made of. The Hessian of a penalty is always exact.
        decay: The weight decay of the inner loop, a penalty that is added to f.
        options: Further options of the curvature's class.

    Raises:
        ValueError: The inner loss draws random numbers, or lacks a part that the curvature needs.
            The proximal strength is negative.
    """
    require_outputs(problem, curvature)
    parts = _take_apart(problem, params, meta, data)
    kind, defaults = find_curvature(curvature)
    core: LinearOperator
    core = operator = kind.from_loss(parts, **defaults, **options)
    gradient = operator.gradient
    sigma = 0.0

    f = problem.problem.inner_loss
    penalties = [f.penalty if isinstance(f, Composite) else None, decay]
    for penalty in filter(None, penalties):
        hessian = Hessian(
            partial(
                _lifted_penalty,
                problem,
                penalty,
                meta,
            ),
            params,
        )
        # All gradients belong to copies of θ at one point, so their sum is ∂f/∂θ.
        gradient = {name: g + hessian.gradient[name] for name, g in gradient.items()}
        multiple = known_multiple(penalty, meta)
        if multiple is None:
            core = core + hessian
        else:
            sigma += multiple
    return Linearization(core, gradient, sigma, parts)


def _lifted_penalty(
    problem: LiftedProblem, penalty: Callable[..., Any], meta: Params, params: Params
) -> Tensor:
    return problem.penalty(penalty, params, meta)


def known_multiple(penalty: Callable[..., Any], meta: Params) -> float | None:
    """λ if the Hessian of the penalty is known to be λI, else None."""
    if not isinstance(penalty, (Proximal, Decay)):
        return None
    multiple = penalty.known_multiple(meta)
    if multiple is not None and not multiple >= 0:
        raise ValueError(
            f"proximal strength: got {multiple} from meta, expected ≥ 0; "
            "learn its logarithm, for example"
        )
    return multiple


def inner_gradient(
    problem: LiftedProblem, params: Params, meta: Params, data: Any, *, decay: Decay | None
) -> Params:
    """∂f/∂θ at θ = `params`, `{name: [tasks, *shape]}`, with its graph to θ and φ.

    Args:
        problem: The lifted problem.
        params: θ, with the graph that it has.
        meta: φ, likewise.
        data: What the inner loss sees.
        decay: The weight decay of the inner loop, a penalty that is added to f.
    """
    names = list(params)
    theta = dict(zip(names, aliases(list(params.values())), strict=True))
    loss = problem.inner(theta, meta, data).sum()
    if decay is not None:
        loss = loss + problem.penalty(decay, theta, meta).sum()
    gradients = torch.autograd.grad(
        loss,
        list(theta.values()),
        create_graph=True,
        allow_unused=True,
        materialize_grads=True,
    )
    return dict(zip(names, gradients, strict=True))


def require_outputs(problem: LiftedProblem, curvature: str | CurvatureClass) -> None:
    """Raise ValueError if the curvature needs outputs that the inner loss does not show."""
    kind, _ = find_curvature(curvature)
    if kind.needs_outputs and not isinstance(problem.problem.inner_loss, Composite):
        name = curvature if isinstance(curvature, str) else kind.__name__.lower()
        raise ValueError(
            f"curvature={name!r}: got an inner_loss that is a plain function, expected a "
            "Composite, which separates outputs from loss; or use curvature='hessian'"
        )


def _take_apart(problem: LiftedProblem, params: Params, meta: Params, data: Any) -> LossParts:
    """The inner loss without its penalty, in the parts that a curvature is built from."""
    f = problem.problem.inner_loss
    if not isinstance(f, Composite):
        whole = reject_random_numbers(lambda p: problem.inner(p, meta, data))
        return LossParts(params, outputs=whole, loss=lambda z: z)

    def apply_model(function: Callable[..., Any], at: Params) -> Any:
        seen_meta, seen_data = problem.arguments(meta, data)

        def one_task(p: Params, d: Any) -> Any:
            return function(lambda q: f.outputs(q, seen_meta, d), p)

        return problem.apply(one_task, at, seen_data)

    return LossParts(
        params,
        outputs=reject_random_numbers(
            lambda p: problem.outputs(
                f,
                p,
                meta,
                data,
            )
        ),
        loss=lambda z: problem.output_loss(f, z, meta, data),
        module=f.module,
        apply_model=apply_model,
        checked=f.checked,
        whole=reject_random_numbers(
            lambda p: problem.unpenalised(
                f,
                p,
                meta,
                data,
            )
        ),
    )


def reject_random_numbers(
    function: Callable[[Params], Result], name: str = "inner loss"
) -> Callable[[Params], Result]:
    """The same function, which raises ValueError if it draws random numbers.

    With dropout, say, A would differ from one evaluation to the next. So it would with numbers of
    Python or NumPy, as in mixup. Those are looked for in the first call alone.

    Args:
        function: A function of θ, `{name: [tasks, *shape]}`.
        name: What the error calls it.
    """
    is_first = True

    def checked(params: Params) -> Result:
        nonlocal is_first
        device = next(iter(params.values())).device
        before = _random_state(device)
        host_before = HostState.read() if is_first else None
        is_first = False
        result = function(params)
        # The states are those of the process, and another thread may have moved them.
        moved = not torch.equal(before, _random_state(device))
        host_moved = host_before is not None and not host_before.is_present()
        if (moved and _draws_random_numbers(function, params)) or (
            host_moved and _depends_on_host_state(function, params, result)
        ):
            raise ValueError(
                f"{name}: it draws random numbers (dropout?), so its derivatives are not those of "
                "the function that was solved; switch the model to evaluation mode, or use "
                "'unrolled'"
            )
        return result

    return checked


def _draws_random_numbers(function: Callable[[Params], Any], params: Params) -> bool:
    draws = NoticedDraws()
    with draws:
        function(params)
    return draws.found


def _depends_on_host_state(function: Callable[[Params], Any], params: Params, result: Any) -> bool:
    """Whether `result` is another one with other random numbers of Python or NumPy."""
    if threading.active_count() > 1:
        return _varies(function, params, result)
    with restored_host_state():
        for seed in (0, 1):
            random.seed(seed)
            np.random.seed(seed)
            if not _are_nearly_equal(function(params), result):
                return True
    return False


def _varies(function: Callable[[Params], Any], params: Params, result: Any) -> bool:
    """Whether the result varies as random numbers of Python or NumPy are drawn.

    Other threads may draw from these generators, whose states are left alone. Once nothing is drawn
    in an evaluation, it was another thread that has drawn before.
    """
    for _ in range(3):
        before = HostState.read()
        if not _are_nearly_equal(function(params), result):
            return True
        if before.is_present():
            return False
    return False


def _are_nearly_equal(first: Any, second: Any) -> bool:
    """Whether the tensors of two pytrees differ by round-off alone."""
    leaves = ([x for x in tree_leaves(tree) if isinstance(x, Tensor)] for tree in (first, second))
    return all(_is_nearly_equal(a, b) for a, b in zip(*leaves, strict=True))


def _is_nearly_equal(a: Tensor, b: Tensor) -> bool:
    """Whether two results differ by round-off alone, as where a device adds in another order."""
    if a.shape != b.shape or not (a.is_floating_point() or a.is_complex()):
        return torch.equal(a, b)
    return torch.allclose(a, b, rtol=1e-3, equal_nan=True)


def _random_state(device: torch.device) -> Tensor:
    state = torch.get_rng_state()
    if device.type != "cuda":
        return state
    return torch.cat([state, torch.cuda.get_rng_state(device)])
