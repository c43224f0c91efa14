"""Small functions that torch compiles once, and that Python calls again and again."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor

from metaimplicit.stance import compiled_functions
from metaimplicit.unsupported import shorten

Compile = bool | Literal["auto"]
MOST_TIMES = 8
Value = TypeVar("Value")
Key = TypeVar("Key")


class CannotCompileError(RuntimeError):
    """Why torch cannot compile a function, which then runs eager."""


class ChangedError(RuntimeError):
    """A function was compiled again, so the losses may read other values than when it was made."""


@dataclass
class Said:
    """What the user was told already.

    Attributes:
        reasons: Why something runs eager.
        again: Whether functions were compiled again.
    """

    reasons: set[str] = field(default_factory=set)
    again: bool = False


class Compiler:
    """The compiled functions of one problem, for data of one shape.

    Each is compiled at its first call (`torch.compile`, in one graph). What the losses read is
    found out once, and holds as long as torch compiles nothing again.

    Args:
        said: What the user was told already. If None, nothing.

    Attributes:
        has_failed: Whether torch could not compile a function, so that all run eager.
        compiled: How often torch has compiled.
        calls: How often compiled functions were called.

    Example:
        >>> compiler = Compiler()
        >>> compiler.remember("answer", lambda: 42), compiler.remember("answer", lambda: 43)
        (42, 42)
    """

    def __init__(self, said: Said | None = None) -> None:
        self.has_failed = False
        self.compiled = 0
        self.calls = 0
        self._functions: dict[Hashable, _CompiledFunction] = {}
        self._values: dict[Hashable, Any] = {}
        self._said = Said() if said is None else said
        self._is_looking = True
        self._looks = 0
        self._sessions = 0
        self._session = 0
        self._without_guards: Any = None

    def remember(self, key: Hashable, compute: Callable[[], Value]) -> Value:
        """What `compute()` returned at the first call with this key."""
        if key not in self._values:
            self._values[key] = compute()
        return cast(Value, self._values[key])

    def call(
        self, name: str, variant: Hashable, make: Callable[[], Callable[..., Any]], *args: Any
    ) -> Any:
        """The function that `make()` returned at its first call, compiled, of `args`.

        Args:
            name: What messages call the function.
            variant: What else tells it from others.
            make: It returns a pure function of pytrees of tensors.
            args: Its arguments, without a graph.

        Raises:
            CannotCompileError: torch cannot compile it.
            ChangedError: torch compiled it again.
        """
        function = self._functions.get((name, variant))
        if function is None:
            function = self._functions[name, variant] = _CompiledFunction(make())
        self.calls += 1
        if function.session != self._session:
            self._check_guards(True)
            function.session = self._session
        elif self._session:
            self._check_guards(False)
        before = function.graphs
        try:
            result = function(*args)
        except RuntimeError as error:
            # Torch says that it had to compile, which it does not do without guards.
            if "skip_guard_eval_unsafe" not in str(error):
                raise
            self._check_guards(True)
            result = function(*args)
        if function.graphs > before:
            self.compiled += 1
            if before > 0 and not self._is_looking:
                self.warn_of_another(name)
                raise ChangedError(name)
        return result

    def begin(self) -> None:
        """Begin a computation. If nothing is compiled yet, it finds out what the losses read."""
        self._is_looking = not self._functions

    def look_again(self) -> None:
        """Drop what is compiled and what the losses were found to read, or give up."""
        self._looks += 1
        if self._looks > MOST_TIMES:
            self.fail("the losses read other values again and again")
        self._functions.clear()
        self._values.clear()

    @contextmanager
    def session(self) -> Iterator[None]:
        """A block in which nothing changes that a function reads beside its arguments.

        Torch then checks once that each function still reads what it was compiled for, in the place
        of once a call, and that its arguments still have the same shapes.
        """
        self._sessions += 1
        self._session = self._sessions
        try:
            yield
        finally:
            self._check_guards(True)
            self._session = 0

    def _check_guards(self, check: bool) -> None:
        if check and self._without_guards is not None:
            self._without_guards.__exit__(None, None, None)
            self._without_guards = None
        if not check and self._without_guards is None:
            self._without_guards = compiled_functions("unguarded")
            self._without_guards.__enter__()

    def fail(self, reason: str) -> None:
        """Say why nothing can be compiled, and drop what was."""
        self.has_failed = True
        self._functions.clear()
        self.explain(reason)

    def explain(self, reason: str) -> None:
        """Say in a warning why the problem runs eager. The same reason is given once."""
        if reason not in self._said.reasons:
            self._said.reasons.add(reason)
            warnings.warn(f"compile: {reason}; it runs eager", RuntimeWarning, stacklevel=4)

    def warn_of_another(self, name: str) -> None:
        """Say that a function was compiled again. This is said once."""
        if self._said.again:
            return
        self._said.again = True
        warnings.warn(
            f"compile: {name} was compiled again, because its tensors have other shapes or "
            "strides, or the losses read other values than before; give all batches one shape, or "
            "say compile=False. TORCH_LOGS=recompiles shows each reason",
            RuntimeWarning,
            stacklevel=3,
        )


class _CompiledFunction:
    """A function that torch compiles.

    Attributes:
        graphs: How often it was compiled.
        session: The session in which it was last called. 0 if that has none.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        # Torch keeps what it has compiled by the code of a function. Closures share theirs.
        template = cast(FunctionType, function)
        own = FunctionType(
            template.__code__.replace(),
            template.__globals__,
            template.__name__,
            template.__defaults__,
            template.__closure__,
        )
        self.graphs = 0
        self.session = 0
        self._compiled = torch.compile(own, fullgraph=True, dynamic=False)

        # To import them takes a second, which is spent by whoever compiles.
        from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
        from torch._dynamo.utils import counters
        from torch._inductor.exc import InvalidCxxCompiler

        self._statistics = counters["stats"]
        self._impossible = (TorchDynamoException, InvalidCxxCompiler)
        self._too_often = FailOnRecompileLimitHit

    def __call__(self, *args: Any) -> Any:
        before = self._statistics["unique_graphs"]
        try:
            with torch.no_grad():
                result = self._compiled(*args)
        except self._impossible as error:
            raise CannotCompileError(f"torch cannot compile it ({_explain(error)})") from error
        except self._too_often as error:
            raise CannotCompileError("it was compiled too often, for other shapes") from error
        self.graphs += self._statistics["unique_graphs"] - before
        return result


def _explain(error: BaseException) -> str:
    """What an error of torch's compiler says, in one line."""
    context = re.search(r"Developer debug context: (.+)", str(error))
    return f"{shorten(error)}: {context[1]}" if context else shorten(error)


def in_one_layout(tensors: Mapping[Key, Tensor]) -> dict[Key, Tensor]:
    """The tensors, with strides that depend on their shapes alone.

    Torch compiles again for other strides.

    Example:
        >>> in_one_layout({"w": torch.ones(3, 2).T})["w"].stride()
        (3, 1)
    """
    return {key: _in_one_layout(x) for key, x in tensors.items()}


def _in_one_layout(x: Tensor) -> Tensor:
    if torch.compiler.is_compiling() or not x.is_contiguous():
        return x.clone(memory_format=torch.contiguous_format)
    # An axis of length 1 may have any stride, even in what a compiled function returns.
    return x.view(-1).view(x.shape) if 1 in x.shape else x


def missing_compiler(device: torch.device) -> str:
    """What torch lacks to compile for a device. Empty if it lacks nothing.

    Example:
        >>> missing_compiler(torch.device("cuda"))
        ''
    """
    if device.type != "cpu":
        return ""
    from torch._inductor import cpp_builder
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        cpp_builder.get_cpp_compiler()
    except InvalidCxxCompiler:
        return "torch compiles for the CPU by a C++ compiler, and there is none; install g++"
    return ""
