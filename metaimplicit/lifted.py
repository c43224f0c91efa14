"""A bilevel problem lifted over the task axis: every function returns one result for each task."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from itertools import compress
from numbers import Integral
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_map, tree_unflatten
from torch.utils.weak import WeakIdKeyDictionary

from metaimplicit.compiled import Compiler
from metaimplicit.data import DataEntries
from metaimplicit.iterate import Iterate
from metaimplicit.labels import has_short_integers, long_labels
from metaimplicit.mended import mended_derivatives, without_fast_path
from metaimplicit.params import Params, describe_misfit
from metaimplicit.problem import BilevelProblem, Composite, StartAtMeta, Stream
from metaimplicit.random_state import RandomState, UnfusedDropout, restored_random_state
from metaimplicit.recomputation import mended_recomputation
from metaimplicit.task_axis import count_tasks, map_tensors, new_views, task_of
from metaimplicit.tensors import tensors_in

Vectorize = Literal["vmap", "loop"]

_STARTS = WeakIdKeyDictionary()  # by `init`: the shapes of its parameters
_CENTER = "center: "  # in front of the names of parameters; `LiftedProblem.with_weights_at`


class SeveralOutputsError(ValueError):
    """The outputs of a `Composite` are more than one tensor, and a curvature reads them."""


class LiftedProblem:
    """A `BilevelProblem` bound to its data, with each function lifted over the task axis.

    Parameters carry the task axis first, `{name: [tasks, *shape]}`, and losses are `[tasks]`.
    The summed loss is block-diagonal in the tasks, so one autograd call gives all gradients.

    Args:
        problem: The problem of one task.
        data: Any pytree of tensors, or a `Stream` of such. If `batched`, each tensor carries the
            task axis first. Those that require grad are constants unless φ has them as `entries`.
        batched: Whether `data` is a batch of tasks. If not, there is one task.
        vectorize: `"vmap"`, or `"loop"`: one call per task under one graph, which is faster where
            arithmetic dominates.
        chunk_size: The number of tasks that are vmapped at a time, to bound memory. If None, all.
        start: Where the inner loop continues. If None, it starts at `problem.init`.
        second_derivatives: Whether the functions are differentiated more than once, or in forward
            mode. If not, attention may run by a fused kernel.

    Attributes:
        entries: The tensors of `data` that require grad, as entries of φ.
        objection: Why the tasks are not vmapped, where that was not asked for.
        compiler: It compiles the functions that methods are made of. If None, they run eager.

    Raises:
        ValueError: The tensors of `data` disagree about the number of tasks, or `data` holds arrays
            that cannot be split by task.

    Example:
        >>> problem = BilevelProblem(
        ...     init=lambda meta, data: {"w": torch.zeros(())},
        ...     inner_loss=lambda params, meta, data: (params["w"] - data).square(),
        ...     outer_loss=lambda params, meta, data: params["w"].square(),
        ... )
        >>> lifted = LiftedProblem(problem, torch.tensor([1.0, 2.0]), batched=True)
        >>> lifted.inner(lifted.init({}), {}, lifted.data)
        tensor([1., 4.])
    """

    def __init__(
        self,
        problem: BilevelProblem,
        data: Any,
        *,
        batched: bool,
        vectorize: Vectorize = "vmap",
        chunk_size: int | None = None,
        start: Iterate | None = None,
        second_derivatives: bool = True,
    ) -> None:
        if vectorize not in ("vmap", "loop"):
            raise ValueError(f"vectorize: got {vectorize!r}, expected 'vmap' or 'loop'")
        check_chunk_size(chunk_size)
        self.problem = problem
        self.entries = DataEntries(data)
        self.data = self.entries.constants
        self.batched = batched
        self.vectorize = vectorize
        self.chunk_size = chunk_size
        self.start = start
        self.second_derivatives = second_derivatives
        self.tasks = count_tasks(self.at(0)) if batched else 1
        self._calls_directly = not batched
        self._short_integers: bool | None = None
        self._randomness = "different"
        self._center: Params = {}
        self.objection = ""
        self.compiler: Compiler | None = None

        if not isinstance(start, Iterate | None):
            raise ValueError(
                f"start: got {type(start).__name__}, expected an Iterate, the `end` of a result"
            )
        if start is not None:
            sizes = {len(p) for p in start.params.values()}
            if sizes != {self.tasks}:
                raise ValueError(
                    f"start: got leading sizes {sorted(sizes)}, expected {self.tasks}, "
                    "the number of tasks in the data"
                )

    def vmapped(self) -> LiftedProblem:
        """The same problem under vmap, even where there is one task or a loop was asked for."""
        other = copy(self)
        other.vectorize = "vmap"
        other._calls_directly = False
        return other

    def looped(self, objection: str) -> LiftedProblem:
        """The same problem in a loop over the tasks, for this reason."""
        other = copy(self)
        other.vectorize = "loop"
        other.objection = objection
        return other

    def with_same_randomness(self) -> LiftedProblem:
        """The same problem, whose tasks all draw the same random numbers in a call."""
        other = copy(self)
        other._randomness = "same"
        return other

    def with_compiler(self, compiler: Compiler) -> LiftedProblem:
        """The same problem, whose functions are compiled."""
        other = copy(self)
        other.compiler = compiler
        return other

    def with_weights_at(self, center: Params) -> LiftedProblem:
        """The same problem, for a method that displaces θ from `center` to take differences.

        Weights of examples see the losses as constants. So they see those of the center, which do
        not move with θ.

        Args:
            center: Where the inner loop ended, `{name: [tasks, *shape]}`.
        """
        f = self.problem.inner_loss
        if not isinstance(f, Composite) or not f.weights_read_losses:
            return self
        other = copy(self)
        other._center = {_CENTER + name: p.detach() for name, p in center.items()}
        return other

    def without_data(self) -> LiftedProblem:
        """The same functions of φ, θ and data, without holding on to any tensors of the data."""
        other = copy(self)
        other.entries = self.entries.without_tensors()
        other.data = None
        other.start = None
        other.tasks = 0  # as many as θ has, see `_count`
        other.compiler = None
        return other

    @property
    def tasks_by(self) -> str:
        """How the tasks are batched, for a report. Empty if there is no batch."""
        if not self.batched:
            return ""
        return f"{self.vectorize}: {self.objection}" if self.objection else self.vectorize

    @property
    def _vmaps(self) -> bool:
        return self.vectorize == "vmap" and not self._calls_directly

    def at(self, step: int) -> Any:
        """The data that inner step `step` sees."""
        return self.data.fn(step) if isinstance(self.data, Stream) else self.data

    def arguments(self, meta: Params, data: Any) -> tuple[Params, Any]:
        """φ and the data as the functions of the problem see them.

        The `entries` of φ return to the data, and features take its place, unless `Features` did.
        """
        if any(name in self.entries.tensors for name in meta):
            data = self.entries.restore_in(data, meta)
            meta = self._without_entries(meta)
        if self.problem.features is not None:
            data = self.problem.features(meta, data)
        return meta, data

    def init(self, meta: Params) -> Params:
        """θ₀, `{name: [tasks, *shape]}`, with the graph of `problem.init`.

        If the problem has a `start`, its parameters are returned as constants.

        Raises:
            ValueError: θ₀ is no dict of floating-point tensors, or the `start` has others.
        """
        if self.start is not None:
            self._check_start(self.start.params, meta)
            return {name: p.detach() for name, p in self.start.params.items()}
        params = self._start(meta)
        valid = all(isinstance(p, Tensor) and p.is_floating_point() for p in params.values())
        if not params or not valid:
            got = {name: getattr(p, "dtype", type(p).__name__) for name, p in params.items()}
            raise ValueError(
                f"init: got {got}, expected a non-empty dict of floating-point tensors"
            )
        # A copy, because no two parameters may be one tensor, and none may be the caller's.
        return {name: p.clone() for name, p in params.items()}

    def _check_start(self, start: Params, meta: Params) -> None:
        """Raise ValueError unless the parameters to start from are like those of `problem.init`.

        It is called once for parameters, φ and data of the same names, types and shapes.
        """
        read = [(x.dtype, x.shape) for x in tensors_in([meta, self.at(0)])]
        shapes = (tuple((name, p.dtype, p.shape) for name, p in start.items()), tuple(read))
        try:
            known = _STARTS.setdefault(self.problem.init, set())
        except TypeError:  # an object without weak references
            known = set()
        if shapes in known:
            return
        device = next(iter(start.values())).device
        with torch.no_grad(), restored_random_state(device):
            expected = self._start(meta)
        misfit = describe_misfit(_first_task(start), like=_first_task(expected))
        if misfit:
            raise ValueError(f"start: {misfit}, as init has it")
        known.add(shapes)

    def _start(self, meta: Params) -> Params:
        init = self.problem.init
        if isinstance(init, StartAtMeta):
            entries = init(meta, None)
            return {name: p.expand(self.tasks, *p.shape) for name, p in entries.items()}
        meta, data = self.arguments(meta, self.at(0))
        params: Params = self._lift(lambda _, d: init(meta, d), {}, data)
        return params

    def inner(self, params: Params, meta: Params, data: Any) -> Tensor:
        """The inner loss f for each task, `[tasks]`."""
        meta, data = self.arguments(meta, data)

        def one_task(p: Params, d: Any) -> Any:
            theta, center = _apart(p)
            f = self.problem.inner_loss
            if center:
                assert isinstance(f, Composite)
                f = f.with_weights_at(center)
            return f(theta, meta, d)

        return self._lift_scalar("inner_loss", one_task, params | self._center, data)[0]

    def outer(self, params: Params, meta: Params, data: Any) -> tuple[Tensor, Any]:
        """The outer loss g for each task, `[tasks]`, and the aux it returned (None without one)."""
        meta, data = self.arguments(meta, data)

        def one_task(p: Params, d: Any) -> Any:
            result = self.problem.outer_loss(p, meta, d)
            if not isinstance(result, tuple):
                return result
            loss, aux = result
            return loss if aux is None else (loss, tree_map(_aux_tensor, aux))

        return self._lift_scalar("outer_loss", one_task, params, data)

    def outputs(self, composite: Composite, params: Params, meta: Params, data: Any) -> Tensor:
        """The outputs of a `Composite` for each task, `[tasks, …]`."""
        meta, data = self.arguments(meta, data)
        outputs = self._lift(lambda p, d: composite.outputs(p, meta, d), params, data)
        if not isinstance(outputs, Tensor):
            raise SeveralOutputsError(
                f"outputs: got {type(outputs).__name__}, expected one tensor; "
                "use curvature='hessian', or a model that returns one tensor"
            )
        return outputs

    def output_loss(self, composite: Composite, outputs: Tensor, meta: Params, data: Any) -> Tensor:
        """The loss of a `Composite` as a function of its outputs, `[tasks]`."""
        meta, data = self.arguments(meta, data)

        def one_task(z: Params, d: Any) -> Any:
            return composite.output_loss(z["outputs"], meta, d)

        return self._lift_scalar("loss", one_task, {"outputs": outputs}, data)[0]

    def unpenalised(self, composite: Composite, params: Params, meta: Params, data: Any) -> Tensor:
        """The first term of a `Composite` for each task, `[tasks]`, in one pass over each task."""
        meta, data = self.arguments(meta, data)

        def one_task(p: Params, d: Any) -> Any:
            theta, center = _apart(p)
            f = composite.with_weights_at(center) if center else composite
            return f.output_loss(f.outputs(theta, meta, d), meta, d)

        return self._lift_scalar("loss", one_task, params | self._center, data)[0]

    def penalty(
        self, function: Callable[[Params, Params], Tensor], params: Params, meta: Params
    ) -> Tensor:
        """A penalty for each task, `[tasks]`."""
        meta = self._without_entries(meta)
        return self._lift_scalar("penalty", lambda p, _: function(p, meta), params, None)[0]

    def apply(
        self, function: Callable[[Params, Any], Any], params: Params, data: Any = None
    ) -> Any:
        """`function(params, data)` of one task, lifted. `data` is the problem's by default."""
        return self._lift(function, params, self.at(0) if data is None else data)

    def _without_entries(self, meta: Params) -> Params:
        return {name: m for name, m in meta.items() if name not in self.entries.tensors}

    def _lift_scalar(
        self, name: str, function: Callable[..., Any], params: Params, data: Any
    ) -> tuple[Tensor, Any]:
        with long_labels(self._has_short_integers(data)):
            result = self._lift(function, params, data)
        loss, aux = result if isinstance(result, tuple) else (result, None)
        tasks = self._count(params)
        if not isinstance(loss, Tensor) or loss.shape != (tasks,):
            shaped = isinstance(loss, Tensor)
            got = f"shape {tuple(loss.shape[1:])}" if shaped else type(loss).__name__
            raise ValueError(
                f"{name}: got {got} per task, expected a scalar tensor; "
                "reduce it, e.g. with .mean()"
            )
        return loss, aux

    def _has_short_integers(self, data: Any) -> bool:
        """Whether the data hold short integers, which is looked up once for data that stay."""
        if data is not self.data:
            return has_short_integers(data)
        if self._short_integers is None:
            self._short_integers = has_short_integers(data)
        return self._short_integers

    def _lift(self, function: Callable[[Any, Any], Any], params: Params, data: Any) -> Any:
        if torch.compiler.is_compiling():
            return self._map(function, params, data)
        is_mended = self.second_derivatives or self._vmaps
        with mended_recomputation, mended_derivatives if is_mended else without_fast_path:
            return self._map(function, params, data)

    def _count(self, params: Params) -> int:
        """The number of tasks, which θ says where the problem holds no data."""
        return self.tasks or len(next(iter(params.values())))

    def _map(self, function: Callable[[Any, Any], Any], params: Params, data: Any) -> Any:
        if not self.batched and (self._calls_directly or not params):
            single = {name: p.squeeze(0) for name, p in params.items()}
            return map_tensors(lambda x: x.unsqueeze(0), function(single, new_views(data)))
        if not self.batched:
            data = map_tensors(lambda x: x.unsqueeze(0), data)
        if self.vectorize == "loop":
            if self._randomness == "same":
                function = _repeating_random_numbers(function, (params, data))
            count = self._count(params)
            results = [function(task_of(params, i), task_of(data, i)) for i in range(count)]
            return tree_map(lambda *x: torch.stack(x), *results)
        return self._vmap(function, params, data)

    def _vmap(self, function: Callable[[Any, Any], Any], params: Params, data: Any) -> Any:
        # Only tensors pass through `torch.vmap`, which walks nested arguments several times.
        leaves, structure = self.entries.flatten(data)
        is_tensor = [isinstance(x, Tensor) for x in leaves]

        def of_tensors(*tensors: Tensor) -> Any:
            remaining = iter(tensors)
            theta = {name: next(remaining) for name in params}
            task = [
                next(remaining) if tensor else x
                for x, tensor in zip(leaves, is_tensor, strict=True)
            ]
            return function(theta, tree_unflatten(task, structure))

        lifted = torch.vmap(of_tensors, randomness=self._randomness, chunk_size=self.chunk_size)
        return lifted(*params.values(), *compress(leaves, is_tensor))


def _first_task(params: Params) -> Params:
    return {name: p[0] for name, p in params.items()}


def _apart(params: Params) -> tuple[Params, Params]:
    """θ, and the center that was put beside it, each by the names of the parameters."""
    theta = {name: p for name, p in params.items() if not name.startswith(_CENTER)}
    center = {
        name.removeprefix(_CENTER): p for name, p in params.items() if name.startswith(_CENTER)
    }
    return theta, center


def _aux_tensor(leaf: Any) -> Tensor:
    """A leaf of aux as a tensor, which can be stacked over the tasks."""
    if isinstance(leaf, (bool, int, float)):
        return torch.as_tensor(leaf)
    if not isinstance(leaf, Tensor):
        raise ValueError(
            f"aux: got {type(leaf).__name__}, expected a pytree of tensors and numbers, which are "
            "stacked over the tasks"
        )
    return leaf


def _repeating_random_numbers(function: Callable[..., Any], inputs: Any) -> Callable[..., Any]:
    """The same function, of which every call draws the random numbers that come next now."""
    tensors = tensors_in(inputs)
    device = tensors[0].device if tensors else torch.device("cpu")
    state = RandomState.read(device)

    def repeating(*args: Any) -> Any:
        state.restore()
        if device.type == "cpu":  # its dropout is not fused
            return function(*args)
        with UnfusedDropout():  # type: ignore[no-untyped-call]
            return function(*args)

    return repeating


def check_chunk_size(chunk_size: int | None) -> None:
    """Raise ValueError unless it is a number of tasks or None.

    Example:
        >>> check_chunk_size(0)
        Traceback (most recent call last):
        ...
        ValueError: chunk_size: got 0, expected a number of tasks ≥ 1, or None for all
    """
    if chunk_size is None:
        return
    is_whole = isinstance(chunk_size, Integral) and not isinstance(chunk_size, bool)
    if not is_whole or chunk_size < 1:
        raise ValueError(
            f"chunk_size: got {chunk_size!r}, expected a number of tasks ≥ 1, or None for all"
        )
