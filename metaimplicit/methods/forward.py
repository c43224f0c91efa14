"""Forward mode through the inner loop: the derivative of the whole training state travels with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from metaimplicit.graph import find_dependencies
from metaimplicit.inner import InnerLoop
from metaimplicit.iterate import Iterate, OptimizerState, Sensitivity
from metaimplicit.lifted import LiftedProblem
from metaimplicit.methods.base import (
    Adaptation,
    Dependencies,
    Gradients,
    Method,
    Report,
    retry_under_vmap,
)
from metaimplicit.params import Params, flatten, leaves
from metaimplicit.problem import Stream
from metaimplicit.solvers import SolverState

Tangents = tuple[
    Params, OptimizerState
]  # each tensor with an axis of tangents first, one for every number of φ


@dataclass(frozen=True)
class Forward(Method):
    """(dθ_T/dφ)ᵀ v = Z_Tᵀ v, Z_t = ∂s_t/∂φ = A_t Z_{t−1} + B_t, s_t = (θ_t, the optimiser's state).

    A_t = ∂Φ_t/∂s_{t−1} and B_t = ∂Φ_t/∂φ of the step s_t = Φ_t(s_{t−1}, φ) are never formed: a step is one batched
    Jacobian–vector product (Franceschi et al. 2017, alg. 2). Exact for θ_T, as `Unrolled`; memory is flat in T, but
    dim φ times the state, and so is the time: for few hyperparameters and long loops.

    Args:
        chunk: tangents pushed at a time, to bound memory; None, all.
        carry: where a call goes on from the `end` of another, go on from its Z too, as if φ had never moved: real-time
            tuning (ibid., alg. RTHO), whose partial hypergradient at step t is Z_tᵀ ∂g/∂θ(θ_t). Otherwise the start
            is a constant, Z = 0.
        memory: bytes that Z and the basis of φ may take; more is an error before anything is allocated.

    Raises:
        ValueError: too many hyperparameters for `memory`; a start with the derivative in others.
    """

    chunk: int | None = None
    carry: bool = False
    memory: int = 2**32
    flag = "forward"

    def __post_init__(self) -> None:
        if self.chunk is not None and self.chunk < 1:
            raise ValueError(
                f"Forward chunk: got {self.chunk}, expected at least 1 tangent, or None"
            )

    def adapt(self, problem: LiftedProblem, inner: InnerLoop, meta: Params) -> Adaptation:
        return retry_under_vmap(partial(self._adapt, inner=inner, meta=meta), problem)

    def _adapt(self, problem: LiftedProblem, inner: InnerLoop, meta: Params) -> Adaptation:
        inner.check_captured()
        params, reads = self._start(problem, meta)
        # what only the outer loss reads needs no tangents; a stream may read more later than at its first step
        read = reads.start | reads.loss
        known = {
            name
            for name in meta
            if isinstance(problem.data, Stream) or name in read or inner.reads(name)
        }
        phi = {name: m.detach() for name, m in meta.items() if m.requires_grad and name in known}
        fixed = {name: m.detach() for name, m in meta.items() if name not in phi}
        state: OptimizerState = {} if problem.start is None else problem.start.state
        self._check_size(params, phi)
        basis = _basis(phi)
        z = self._begin(problem, phi, fixed, basis)
        active = torch.ones(
            problem.tasks, dtype=torch.bool, device=next(iter(params.values())).device
        )
        taken, norm = (
            torch.zeros_like(active, dtype=torch.int64),
            torch.zeros_like(active, dtype=torch.float32),
        )
        unused: set[str] = set()
        for t in range(inner.steps):
            if t == 0 or isinstance(problem.data, Stream):
                seen, unused = _look(problem, params, meta, t)
                reads.loss.update(seen)
            step = _Step(problem, inner, fixed, unused, _split(state)[1], active, problem.at(t))
            (params, slots, norm), (z_params, z_slots, _) = self._vmap(
                partial(_jvp, step, (params, _split(state)[0], phi)), (*z, basis)
            )
            z = z_params, z_slots
            state = {name: {**step.after[name], **slots[name]} for name in step.after}
            if inner.tol is not None:
                active = active & ~(norm <= inner.tol)  # a NaN goes on
            taken += active
            if not active.any():
                break
        report = Report(self.flag, taken, norm)

        def pullback(vectors: Params, _: SolverState) -> tuple[Gradients, Report]:
            found: Gradients = dict.fromkeys(meta)
            if phi:
                along = torch.stack(
                    [z[0][name].flatten(1) @ v.flatten() for name, v in vectors.items()]
                ).sum(0)
                parts = torch.split(along, [m.numel() for m in phi.values()])
                found |= {
                    name: part.reshape(m.shape).to(m)
                    for (name, m), part in zip(phi.items(), parts, strict=True)
                }
            return found, report

        return Adaptation(
            params, report, reads, Iterate(params, state, Sensitivity(tuple(phi), *z)), pullback
        )

    @staticmethod
    def _start(problem: LiftedProblem, meta: Params) -> tuple[Params, Dependencies]:
        """θ₀, and the meta-parameters that it and the loss depend on."""
        initial = problem.init(meta)
        reads = Dependencies(
            find_dependencies(initial.values(), meta, [], [problem.problem.init]),
            _look(problem, initial, meta, 0)[0],
        )
        return {name: p.detach().contiguous() for name, p in initial.items()}, reads

    def _check_size(self, params: Params, phi: Params) -> None:
        count, n = _count(phi), sum(p.numel() for p in params.values())
        need = count * (n + count) * max((m.element_size() for m in phi.values()), default=0)
        if need > self.memory:
            raise ValueError(
                f"forward: got {count} hyperparameters for {n} parameters, whose tangents take {need / 2**20:.0f} MiB, "
                f"expected at most {self.memory / 2**20:.0f}; use 'unrolled' or an implicit method, or raise memory="
            )

    def _begin(self, problem: LiftedProblem, phi: Params, fixed: Params, basis: Params) -> Tangents:
        """Z_0: the Jacobian of init; of an inner loop that goes on, 0, or the Z it ended with."""
        start = problem.start
        if start is None:
            return self._vmap(
                partial(_jvp, lambda m: problem.init({**fixed, **m}), (phi,)), (basis,)
            )[1], {}
        if self.carry and start.companion is not None:
            raise ValueError(
                "start: got the end of 'f2sa', expected that of 'forward' or 'real-time'"
            )
        carried = start.sensitivity
        if self.carry and carried is not None:
            if carried.meta != tuple(phi):
                raise ValueError(
                    f"start: got the derivative of {list(carried.meta)}, expected that of {list(phi)}"
                )
            return carried.params, carried.state
        zeros: Tangents = tree_map(
            lambda x: x.new_zeros(_count(phi), *x.shape), (start.params, _split(start.state)[0])
        )
        return zeros

    def _vmap(self, push: Callable[[Any], Any], tangents: Any) -> Any:
        """`push` over the tangents' first axis, `chunk` at a time: the values, once, and the tangents, stacked."""
        count = max((len(x) for x in tree_leaves(tangents)), default=0)
        parts: list[Any] = []
        value: Any = None
        for begin in range(0, max(count, 1), self.chunk or max(count, 1)):
            some = tree_map(
                lambda x, i=begin: x[i : i + (self.chunk or count)].contiguous(), tangents
            )
            value, pushed = torch.vmap(push, out_dims=(None, 0))(some)  # type: ignore[arg-type]
            parts.append(pushed)
        return value, parts[0] if len(parts) == 1 else tree_map(lambda *x: torch.cat(x), *parts)


@dataclass(frozen=True)
class _Step:
    """s_t = Φ_t(s_{t−1}, φ) as a function of tensors; the numbers of the new state are left in `after`."""

    problem: LiftedProblem
    inner: InnerLoop
    fixed: Params
    unused: set[str]
    numbers: OptimizerState
    active: Tensor
    data: Any
    after: OptimizerState = field(default_factory=dict)

    def __call__(
        self, params: Params, slots: OptimizerState, phi: Params
    ) -> tuple[Params, OptimizerState, Tensor]:
        meta = {**self.fixed, **phi}
        gradients = torch.func.grad(lambda p: self.problem.inner(p, meta, self.data).sum())(params)
        state = {name: {**self.numbers.get(name, {}), **slots.get(name, {})} for name in params}
        used = {name: g for name, g in gradients.items() if name not in self.unused}
        stepped, after = self.inner.take_step(params, used, state, meta)
        norm = flatten(gradients).norm(dim=-1)
        if (tol := self.inner.tol) is not None:
            go = self.active & ~(norm.detach() <= tol)
            stepped = {
                n: torch.where(go.reshape(-1, *[1] * (p.dim() - 1)), p, params[n])
                for n, p in stepped.items()
            }
        tensors, numbers = _split(after)
        self.after.update(numbers)
        return stepped, tensors, norm


def _jvp(function: Callable[..., Any], primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> Any:
    found: Any = torch.func.jvp(function, primals, tangents)
    value, tangent = found
    return value, tree_map(
        lambda t, v: t.to(v.dtype), tangent, value
    )  # 0.5 * x of a scalar makes it double


def _look(
    problem: LiftedProblem, params: Params, meta: Params, step: int
) -> tuple[set[str], set[str]]:
    """The meta-parameters that the loss of a step depends on; the parameters that it does not."""
    variables = leaves(params)
    losses = [problem.inner(variables, meta, problem.at(step))]
    reads = find_dependencies(losses, meta, variables.values(), [problem.problem.inner_loss])
    return reads, set(variables) - find_dependencies(losses, variables, meta.values(), None)


def _basis(phi: Params) -> Params:
    """The identity, cut into the entries of φ: `{name: [dim φ, *shape]}`."""
    if not phi:
        return {}
    like = next(iter(phi.values()))
    parts = torch.split(
        torch.eye(_count(phi), dtype=like.dtype, device=like.device),
        [m.numel() for m in phi.values()],
        1,
    )
    return {
        name: part.reshape(-1, *m.shape).to(m)
        for part, (name, m) in zip(parts, phi.items(), strict=True)
    }


def _count(phi: Params) -> int:
    return sum(m.numel() for m in phi.values())


def _split(state: OptimizerState) -> tuple[OptimizerState, OptimizerState]:
    """The tensors of a state, and its numbers."""
    tensors = {
        n: {k: x for k, x in slots.items() if isinstance(x, Tensor)} for n, slots in state.items()
    }
    numbers = {
        n: {k: x for k, x in slots.items() if not isinstance(x, Tensor)}
        for n, slots in state.items()
    }
    return tensors, numbers
