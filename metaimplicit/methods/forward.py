"""Forward mode through the inner loop: the derivative of the training state is carried along."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from metaimplicit.counts import check_count
from metaimplicit.forward_mode import push_forward
from metaimplicit.inner import InnerLoop
from metaimplicit.iterate import (
    Iterate,
    OptimizerState,
    Sensitivity,
    merge_state,
    numbers_of,
    tensors_of,
)
from metaimplicit.lifted import LiftedProblem
from metaimplicit.methods.base import Adaptation, Dependencies, Gradients, Method
from metaimplicit.methods.inner_step import read_by_loss, take_inner_step
from metaimplicit.methods.kept_sensitivity import KeptSensitivity
from metaimplicit.methods.report import Report
from metaimplicit.methods.shared import initial_dependencies, retry_under_vmap
from metaimplicit.params import Params, detached
from metaimplicit.problem import Stream
from metaimplicit.random_state import HostState, RandomState
from metaimplicit.solvers import SolverState
from metaimplicit.solvers.iteration import all_ended


@dataclass(frozen=True)
class Forward(Method):
    """(dθ_T/dφ)ᵀ v = Z_Tᵀ v with Z_t = ∂s_t/∂φ = A_t Z_{t−1} + B_t, s_t = (θ_t, optimiser state).

    A_t = ∂Φ_t/∂s_{t−1} and B_t = ∂Φ_t/∂φ belong to the inner step s_t = Φ_t(s_{t−1}, φ). They are
    never formed: a step is one Jacobian–vector product for each number of φ, taken in one batch
    (Franceschi et al. 2017, alg. 2). The result is exact for θ_T, as that of `Unrolled`. Memory
    does not grow with T, but memory and time are dim φ times those of the training state, so the
    method suits few hyperparameters and long loops.

    Args:
        chunk: The number of tangents that are pushed at a time, to bound memory. If None, all.
        carry: Whether a call that continues another (`start`) also continues its Z, as if φ had
            never moved. This is real-time tuning (ibid., alg. RTHO), whose partial hypergradient
            at step t is Z_tᵀ ∂g/∂θ(θ_t). If False, the start is a constant, and Z = 0 there.
        memory: The bytes that Z and the unit tangents of φ may take. If they need more, an error
            is raised before anything is allocated.

    Raises:
        ValueError: The chunk is below 1. On adapting: there are too many hyperparameters for
            `memory`, or `start` carries the derivative with respect to other hyperparameters.

    Example:
        >>> from metaimplicit import BilevelProblem, GradientDescent
        >>> from metaimplicit.hypergradient import hypergradient
        >>> problem = BilevelProblem(
        ...     init=lambda meta, data: {"w": torch.zeros(())},
        ...     inner_loss=lambda params, meta, data: 0.5 * (params["w"] - meta["target"]).square(),
        ...     outer_loss=lambda params, meta, data: params["w"],
        ... )
        >>> result = hypergradient(
        ...     problem,
        ...     {"target": torch.tensor(3.0)},
        ...     data=None,
        ...     inner=GradientDescent(steps=2, lr=0.5),
        ...     method=Forward(),
        ... )
        >>> result.grads["target"]  # w_2 = (1 − 0.5²) target
        tensor(0.7500)
    """

    chunk: int | None = None
    carry: bool = False
    memory: int = 2**32
    flag = "forward"

    def __post_init__(self) -> None:
        if self.chunk is not None:
            check_count("Forward chunk", self.chunk, unit=" tangent, or None")

    def adapt(self, problem: LiftedProblem, inner: InnerLoop, meta: Params) -> Adaptation:
        """Run the inner loop, and carry ∂(θ, optimiser state)/∂φ along."""
        return retry_under_vmap(partial(self._adapt, inner=inner, meta=meta), problem)

    def _adapt(self, problem: LiftedProblem, inner: InnerLoop, meta: Params) -> Adaptation:
        initial = problem.init(meta)
        dependencies = initial_dependencies(problem, inner, initial, meta)
        inner.check_at(initial, meta)
        in_loss, unread = read_by_loss(problem, initial, meta, data=problem.at(0))
        dependencies.loss.update(in_loss)

        phi = self._moving_entries(problem, meta, dependencies)
        fixed = detached({name: m for name, m in meta.items() if name not in phi})
        self._check_memory(initial, phi)

        units = _unit_tangents(phi)
        z = self._initial_sensitivity(problem, phi, fixed=fixed, units=units)
        iterate = Iterate(
            params={name: p.detach().contiguous() for name, p in initial.items()},
            state={} if problem.start is None else problem.start.state,
        )
        device = next(iter(initial.values())).device
        active = torch.ones(problem.tasks, dtype=torch.bool, device=device)
        steps = torch.zeros_like(active, dtype=torch.int64)
        norm = torch.zeros_like(active, dtype=torch.float32)
        kept = None
        if inner.tol is not None:
            tangents = self._initial_tangents(z, inner, initial, phi, fixed=fixed, units=units)
            kept = KeptSensitivity(iterate, inner.initial_slots(initial, meta), tangents)
        for t in range(inner.steps):
            data = problem.at(t)
            if t > 0 and isinstance(problem.data, Stream):
                in_loss, unread = read_by_loss(problem, iterate.params, meta, data=data)
                dependencies.loss.update(in_loss)
            step = partial(
                take_inner_step,
                problem=problem,
                inner=inner,
                fixed=fixed,
                unread=unread,
                data=data,
                active=active,
                number=t,
            )
            iterate, z, norm = self._push(step, iterate, z, inner=inner, phi=phi, units=units)
            if kept is not None and inner.tol is not None:
                active = active & ~(norm <= inner.tol)  # a norm of NaN does not stop a task
                kept.update(iterate, z, active)
            steps += active
            if kept is not None and all_ended(active, step=t + 1):
                break

        if kept is not None:
            iterate, z = kept.finish(iterate, z, steps)
        report = Report(self.flag, steps, norm)

        def pullback(vectors: Params, _: SolverState) -> tuple[Gradients, Report]:
            gradients: Gradients = dict.fromkeys(meta)
            if phi:
                gradients |= _pull_back_tangents(z, vectors, phi)
            return gradients, report

        end = replace(iterate, sensitivity=z)
        return Adaptation(iterate.params, report, dependencies, end, pullback)

    def _moving_entries(
        self, problem: LiftedProblem, meta: Params, dependencies: Dependencies
    ) -> Params:
        """The entries of φ that θ may depend on, detached.

        An entry that only the outer loss reads needs no tangents. A stream may read entries at a
        later step that it does not read at its first. A start may bring derivatives along.
        """
        streams = isinstance(problem.data, Stream)
        start = problem.start.sensitivity if self.carry and problem.start is not None else None
        carried = () if start is None else start.meta
        return {
            name: m.detach().contiguous()  # an expanded tensor can have no tangent
            for name, m in meta.items()
            if m.requires_grad and (streams or name in carried or dependencies.routes(name))
        }

    def _check_memory(self, params: Params, phi: Params) -> None:
        count = _count(phi)
        n = _count(params)
        bytes_per_number = max((m.element_size() for m in phi.values()), default=0)
        need = count * (n + count) * bytes_per_number
        if need > self.memory:
            raise ValueError(
                f"forward: got {count} hyperparameters for {n} parameters, "
                f"whose tangents take {need / 2**20:.0f} MiB, "
                f"expected at most {self.memory / 2**20:.0f}; "
                "use 'unrolled' or an implicit method, or raise memory="
            )

    def _initial_sensitivity(
        self, problem: LiftedProblem, phi: Params, *, fixed: Params, units: Params
    ) -> Sensitivity:
        """Z_0: the Jacobian of init, or the Z that `start` carries, or 0 at a constant start."""
        names = tuple(phi)
        start = problem.start
        if start is None:
            _, tangents = self._push_all(
                lambda m: problem.init({**fixed, **m}), point=(phi,), tangents=(units,)
            )
            return Sensitivity(names, tangents, {})

        if self.carry and start.companion is not None:
            raise ValueError(
                "start: got the end of 'f2sa', expected that of 'forward' or 'real-time'"
            )
        carried = start.sensitivity
        if not self.carry or carried is None:
            count = _count(phi)
            constants = (start.params, tensors_of(start.state))
            zeros = tree_map(lambda x: x.new_zeros(count, *x.shape), constants)
            return Sensitivity(names, *zeros)
        if carried.meta != names:
            raise ValueError(
                f"start: got the derivative of {list(carried.meta)}, expected that of {list(names)}"
            )
        return carried

    def _initial_tangents(
        self,
        z: Sensitivity,
        inner: InnerLoop,
        initial: Params,
        phi: Params,
        *,
        fixed: Params,
        units: Params,
    ) -> OptimizerState:
        """The derivatives of the optimiser's slots before the first step, where they are not 0."""

        def slots(phi: Params) -> OptimizerState:
            return tensors_of(inner.initial_slots(initial, {**fixed, **phi}))

        if not any(slots(phi).values()):
            return z.state
        _, tangents = self._push_all(slots, point=(phi,), tangents=(units,))
        return {name: tangents.get(name, {}) | z.state.get(name, {}) for name in initial}

    def _push(
        self,
        step: Callable[..., tuple[Params, OptimizerState, Tensor]],
        iterate: Iterate,
        z: Sensitivity,
        *,
        inner: InnerLoop,
        phi: Params,
        units: Params,
    ) -> tuple[Iterate, Sensitivity, Tensor]:
        """s_t and Z_t from s_{t−1} and Z_{t−1}; and ‖∂f/∂θ‖ at s_{t−1}, `[tasks]`."""
        numbers = numbers_of(iterate.state)
        next_numbers: OptimizerState = {}

        def tensors_of_step(
            params: Params, tensors: OptimizerState, phi: Params
        ) -> tuple[Params, OptimizerState, Tensor]:
            state = merge_state(numbers, tensors)
            point = inner.gradient_point(params, state)
            next_params, next_state, norm = step(point, state, phi)
            # torch.func.jvp returns tensors only, so plain numbers (a count of steps) leave here.
            next_numbers.update(numbers_of(next_state))
            return next_params, tensors_of(next_state), norm

        # Z_t = A_t Z_{t−1} + B_t: the tangents of the step along those of s_{t−1} and of φ.
        point = (iterate.params, tensors_of(iterate.state), phi)
        values, tangents = self._push_all(
            tensors_of_step, point=point, tangents=(z.params, z.state, units)
        )
        params, tensors, norm = values
        z_params, z_tensors, _ = tangents
        next_iterate = Iterate(params, merge_state(next_numbers, tensors))
        return next_iterate, Sensitivity(z.meta, z_params, z_tensors), norm

    def _push_all(
        self, function: Callable[..., Any], *, point: tuple[Any, ...], tangents: tuple[Any, ...]
    ) -> tuple[Any, Any]:
        """A function and its derivative along tangents, over their first axis, `chunk` at a time.

        Returns the values, which are the same for every tangent, and the pushed tangents, stacked.
        """
        leaves = tree_leaves(tangents)
        count = max((len(x) for x in leaves), default=0)
        if count == 0:
            value = function(*point)
            return value, tree_map(lambda x: x.new_zeros(0, *x.shape), value)
        push = partial(_jvp, function, point)
        chunk = self.chunk or count
        values: Any = None
        parts: list[Any] = []
        # All tangents are those of one step, which draws its random numbers once.
        state = RandomState.read(leaves[0].device)
        host = HostState.read() if chunk < count else None  # which takes time
        for begin in range(0, count, chunk):
            rows = slice(begin, begin + chunk)
            part = tree_map(lambda x, rows=rows: x[rows].contiguous(), tangents)
            state.restore()
            if host is not None:
                host.restore()
            along = torch.vmap(push, out_dims=(None, 0), randomness="same")  # type: ignore[arg-type]
            values, pushed = along(part)
            parts.append(pushed)
        if len(parts) == 1:
            return values, parts[0]
        return values, tree_map(lambda *x: torch.cat(x), *parts)


def _jvp(function: Callable[..., Any], primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> Any:
    """The value of a function and its tangent, in the type of the value."""
    value, tangent = push_forward(function, primals, tangents)
    # The tangent of 0.5 * x is double where x is a scalar in single precision.
    return value, tree_map(lambda t, v: t.to(v.dtype), tangent, value)


def _pull_back_tangents(z: Sensitivity, vectors: Params, phi: Params) -> Params:
    """Zᵀv, in the shapes and types of φ."""
    products = [z.params[name].flatten(1) @ v.flatten() for name, v in vectors.items()]
    gradient = torch.stack(products).sum(0)
    parts = torch.split(gradient, [m.numel() for m in phi.values()])
    return {
        name: part.reshape(m.shape).to(m)
        for (name, m), part in zip(phi.items(), parts, strict=True)
    }


def _unit_tangents(phi: Params) -> Params:
    """The identity matrix of φ, split into its entries: `{name: [dim φ, *shape]}`."""
    if not phi:
        return {}
    like = next(iter(phi.values()))
    identity = torch.eye(_count(phi), dtype=like.dtype, device=like.device)
    parts = torch.split(identity, [m.numel() for m in phi.values()], dim=1)
    return {
        name: part.reshape(len(part), *m.shape).to(m)
        for part, (name, m) in zip(parts, phi.items(), strict=True)
    }


def _count(tensors: Params) -> int:
    return sum(t.numel() for t in tensors.values())
