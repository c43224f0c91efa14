"""The inner step and its pull, compiled."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import fields, is_dataclass, replace
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from metaimplicit.compiled import CannotCompileError, Compiler, in_one_layout
from metaimplicit.inner import InnerLoop
from metaimplicit.iterate import Iterate
from metaimplicit.lifted import LiftedProblem
from metaimplicit.methods.base import Dependencies, Gradients
from metaimplicit.methods.inner_step import read_by_loss, take_inner_step
from metaimplicit.methods.linearize import reject_random_numbers
from metaimplicit.methods.shared import initial_dependencies
from metaimplicit.methods.step_functions import (
    Cotangents,
    EagerSteps,
    Slot,
    StepFunctions,
    slot_tensors,
)
from metaimplicit.params import Params, detached
from metaimplicit.problem import Stream

SlotTensors = dict[Slot, Tensor]


def make_steps(
    problem: LiftedProblem, inner: InnerLoop, meta: Params, initial: Params
) -> StepFunctions:
    """The step functions of a loop that starts at `initial`, compiled if the problem says so.

    Raises:
        CannotCompileError: They cannot be compiled.
    """
    if problem.compiler is None:
        dependencies = initial_dependencies(problem, inner, initial, meta)
        return EagerSteps(problem, inner, meta, dependencies)
    return CompiledSteps(problem.compiler, problem, inner, meta, initial=initial)


class CompiledSteps(StepFunctions):
    """The step and its pull as two functions that torch compiles, whatever the number of steps.

    What the optimiser's state holds beside tensors, such as a count of steps, is a tensor here, so
    that all steps but the first share their code.

    Args:
        compiler: It holds the functions between calls.
        problem: The problem, lifted over the task axis.
        inner: The inner loop.
        meta: φ, leaves of autograd.
        initial: θ_0, with its graph to φ.

    Raises:
        CannotCompileError: The inner loss draws random numbers.
    """

    def __init__(
        self,
        compiler: Compiler,
        problem: LiftedProblem,
        inner: InnerLoop,
        meta: Params,
        *,
        initial: Params,
    ) -> None:
        self.problem = problem
        self.inner = inner
        self.meta = meta
        self._compiler = compiler
        self._key = settings_of(inner)
        self.dependencies, read = compiler.remember(
            ("dependencies", self._key),
            lambda: _find_dependencies(
                problem,
                inner,
                initial,
                meta,
            ),
        )
        constants = detached(meta)
        self._phi = {name: m for name, m in constants.items() if name in read}
        self._fixed = {name: m for name, m in constants.items() if name not in read}
        self._numbers: set[Slot] = set()
        self._ends: dict[tuple[Slot, ...], SlotTensors] = {}

    def step(self, at: Iterate, t: int) -> tuple[Iterate, Tensor]:
        """Take the step."""
        arguments = self._arguments(at, t)
        ends, numbers, norm = self._compiler.call(
            "the inner step",
            self._variant(arguments),
            self._make_step,
            *arguments,
        )
        self._numbers |= set(numbers)
        ends = in_one_layout(ends)
        self._ends[tuple(arguments[0])] = ends
        # The first step returns plain numbers, the others return tensors.
        counts = {slot: torch.as_tensor(x, dtype=torch.float64) for slot, x in numbers.items()}
        return _as_iterate(ends | counts), norm

    def pull(self, at: Iterate, t: int, cotangents: Cotangents) -> tuple[Cotangents, Gradients]:
        """Pull λ back through the step."""
        arguments = self._arguments(at, t)
        known = {}
        for slot, end in self._ends[tuple(arguments[0])].items():
            v = cotangents.get(slot)
            known[slot] = torch.zeros_like(end) if v is None else v
        of_state, of_phi = self._compiler.call(
            "the pull of a step",
            self._variant(arguments),
            self._make_pull,
            *arguments,
            known,
        )
        return in_one_layout(of_state), {**dict.fromkeys(self.meta), **of_phi}

    def start(self, at: Iterate) -> Iterate:
        """The start of the loop as the compiled functions expect it."""
        tensors = slot_tensors(at)
        for name, slots in at.state.items():
            for key, x in slots.items():
                if not isinstance(x, Tensor):
                    tensors[name, key] = torch.tensor(float(x), dtype=torch.float64, device="cpu")
                    self._numbers.add((name, key))
        return _as_iterate(in_one_layout(tensors))

    def finish(self, end: Iterate) -> Iterate:
        """The end of the loop as other loops expect it, with plain numbers."""
        state = {
            name: {key: x.item() if (name, key) in self._numbers else x for key, x in slots.items()}
            for name, slots in end.state.items()
        }
        return Iterate(end.params, state)

    def _arguments(self, at: Iterate, t: int) -> tuple[Any, ...]:
        tensors = slot_tensors(at)
        numbers = {slot: tensors.pop(slot) for slot in list(tensors) if slot in self._numbers}
        return tensors, numbers, self._phi, self._fixed, self.problem.at(t)

    def _variant(self, arguments: tuple[Any, ...]) -> Hashable:
        """The first step starts from an empty state, and so is another function."""
        tensors, numbers, *_ = arguments
        return (self._key, tuple(tensors), tuple(numbers))

    def _make_step(self) -> Any:
        problem = self.problem.without_data()
        inner = self.inner if self.inner.tol is None else self.inner.updated(tol=None)
        unread = self.dependencies.idle

        def take_step(
            tensors: SlotTensors, numbers: SlotTensors, phi: Params, fixed: Params, data: Any
        ) -> Any:
            # Torch before 2.9 cannot trace the union of dicts by `|`, here and in what is called.
            at = _as_iterate({**tensors, **numbers})
            params, state, norm = take_inner_step(
                at.params,
                at.state,
                phi,
                problem=problem,
                inner=inner,
                fixed=fixed,
                unread=unread,
                data=data,
            )
            ends = {(name, ""): p for name, p in params.items()}
            counts = {}
            for name, slots in state.items():
                for key, x in slots.items():
                    if isinstance(x, Tensor) and (name, key) not in numbers:
                        ends[name, key] = x
                    else:
                        counts[name, key] = x
            return in_one_layout(ends), counts, norm

        return take_step

    def _make_pull(self) -> Any:
        take_step = self._make_step()

        def pull(
            tensors: SlotTensors,
            numbers: SlotTensors,
            phi: Params,
            fixed: Params,
            data: Any,
            cotangents: SlotTensors,
        ) -> Any:
            def ends(tensors: SlotTensors, phi: Params) -> Any:
                return take_step(tensors, numbers, phi, fixed, data)[0]

            pull_back = torch.func.vjp(ends, tensors, phi)[1]
            of_state, of_phi = pull_back(cotangents)
            return in_one_layout(of_state), of_phi

        return pull


def settings_of(value: Any) -> Any:
    """What tells a loop from others, apart from the number of its steps: a hashable value.

    Tensors count by identity, and so do functions that hold values of their own.

    Example:
        >>> from metaimplicit import GradientDescent
        >>> settings_of(GradientDescent(steps=1)) == settings_of(GradientDescent(steps=5))
        True
    """
    if is_dataclass(value) and not isinstance(value, type):
        named = [(f.name, settings_of(getattr(value, f.name))) for f in fields(value)]
        return (type(value), *(pair for pair in named if pair[0] != "steps"))
    if isinstance(value, Mapping):
        return tuple((key, settings_of(entry)) for key, entry in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(settings_of(entry) for entry in value)
    if isinstance(value, FunctionType):
        held = (value.__closure__, value.__defaults__, value.__kwdefaults__)
        if not any(held):  # a lambda that is written again in a loop is the same
            return (value.__code__, id(value.__globals__))
    is_known = isinstance(value, Hashable) and not isinstance(value, Tensor)
    return value if is_known else id(value)


def _find_dependencies(
    problem: LiftedProblem, inner: InnerLoop, initial: Params, meta: Params
) -> tuple[Dependencies, set[str]]:
    """What θ depends on, and the entries of φ that a step may read, by one eager evaluation."""
    dependencies = initial_dependencies(problem, inner, initial, meta)
    in_loss, unread = read_by_loss(problem, initial, meta, data=problem.at(0))
    dependencies.loss.update(in_loss)
    dependencies.idle.update(unread)
    try:
        with torch.no_grad():
            reject_random_numbers(lambda p: problem.inner(p, meta, problem.at(0)))(initial)
    except ValueError as error:
        raise CannotCompileError("the inner loss draws random numbers") from error
    # The compiler remembers what is returned, which should keep no tensor.
    in_loop = dependencies.in_loop()
    dependencies = replace(dependencies, in_loop=lambda: in_loop)
    variable = {name for name, m in meta.items() if m.requires_grad}
    if isinstance(problem.data, Stream):  # a later step may read more
        return dependencies, variable
    read = {name for name in variable if dependencies.routes(name) & {"loss", "loop"}}
    return dependencies, read


def _as_iterate(tensors: SlotTensors) -> Iterate:
    """The tensors of s in their places."""
    params = {name: x for (name, key), x in tensors.items() if key == ""}
    state: dict[str, dict[str, Any]] = {name: {} for name in params}
    for (name, key), x in tensors.items():
        if key != "":
            state[name][key] = x
    return Iterate(params, state)
