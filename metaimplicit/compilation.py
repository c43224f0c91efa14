"""`compile=`: whether the functions of a method are compiled, and what keeps them from that."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch.utils.weak import WeakIdKeyDictionary

from metaimplicit.compiled import (
    MOST_TIMES,
    CannotCompileError,
    ChangedError,
    Compile,
    Compiler,
    Said,
    missing_compiler,
)
from metaimplicit.inner import InnerLoop
from metaimplicit.lifted import LiftedProblem
from metaimplicit.mended import mended_derivatives
from metaimplicit.methods import Method
from metaimplicit.methods.compiled_steps import settings_of
from metaimplicit.params import Params, floating_entry
from metaimplicit.problem import Stream
from metaimplicit.random_state import RandomState
from metaimplicit.tensors import tensors_in

Result = TypeVar("Result")


def run_compiled(
    attempt: Callable[[LiftedProblem], Result],
    problem: LiftedProblem,
    *,
    compile: Compile,
    inner: InnerLoop,
    method: Method,
    meta: Params,
    owner: Any,
) -> Result:
    """`attempt(problem)`, by compiled functions if `compile` says so and torch can.

    Where it cannot, a warning says why, once, and the functions run eager.

    Args:
        attempt: The computation. The compiler of the problem that it receives compiles for it.
        problem: The lifted problem.
        compile: As for `hypergradient`.
        inner: The inner loop.
        method: The method.
        meta: φ.
        owner: The object to which the compiled functions belong.

    Raises:
        ValueError: `compile` is none of its values, or it is True and there is no C++ compiler.
    """
    if not isinstance(compile, bool) and compile != "auto":
        raise ValueError(f"compile: got {compile!r}, expected True, False or 'auto'")
    if compile is False:
        return attempt(problem)
    device = floating_entry(meta).device
    missing = missing_compiler(device)
    if missing and compile is True:
        raise ValueError(f"compile: got True, but {missing}, or say compile='auto'")
    compiler = _compiler_of(owner, problem, inner, method, meta)
    objection = missing or method.compile_objection(inner) or _objection_to_loop(problem)
    if objection:
        compiler.explain(objection)
    if objection or compiler.has_failed:
        return attempt(problem)
    # Between two steps, nothing of the caller runs but the function of a `Stream`.
    same_functions = not isinstance(problem.data, Stream)
    state = RandomState.read(device)
    while not compiler.has_failed:
        compiler.begin()
        try:
            # Torch cannot trace the entry of this block, so it stands outside of the functions.
            with mended_derivatives, compiler.session() if same_functions else nullcontext():
                return attempt(problem.with_compiler(compiler))
        except ChangedError:
            state.restore()
            compiler.look_again()
        except CannotCompileError as error:
            state.restore()
            compiler.fail(str(error))
    return attempt(problem)


@dataclass
class _Family:
    """The compilers of one computation, by the shapes of its data and meta-parameters."""

    by_shapes: dict[Hashable, Compiler] = field(default_factory=dict)
    said: Said = field(default_factory=Said)

    def compiler(self, shapes: Hashable) -> Compiler:
        if shapes not in self.by_shapes:
            compiler = Compiler(self.said)
            if self.by_shapes:
                compiler.warn_of_another("a meta-step")
            if len(self.by_shapes) >= MOST_TIMES:
                compiler.fail("it was compiled too often, for other shapes")
            self.by_shapes[shapes] = compiler
        return self.by_shapes[shapes]


_FAMILIES = WeakIdKeyDictionary()  # by owner, and then by what is compiled


def _compiler_of(
    owner: Any, problem: LiftedProblem, inner: InnerLoop, method: Method, meta: Params
) -> Compiler:
    by_settings: dict[Hashable, _Family] = {}
    with suppress(TypeError):  # an object without weak references is not remembered
        by_settings = _FAMILIES.setdefault(owner, by_settings)
    way = (problem.batched, problem.vectorize, problem.chunk_size)
    names = tuple(problem.entries.tensors)
    key = (type(method), settings_of(inner), way, names)
    data = None if isinstance(problem.data, Stream) else problem.data
    shapes = tuple((x.shape, x.dtype) for x in tensors_in((meta, data)))
    return by_settings.setdefault(key, _Family()).compiler(shapes)


def _objection_to_loop(problem: LiftedProblem) -> str:
    if problem.vectorize == "loop" and problem.tasks > 1:
        reason = f" ({problem.objection})" if problem.objection else ""
        return f"the tasks run in a loop{reason}"
    return ""
