"""The losses of a problem on slices of its examples, for memory that falls with the slice."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten
from torch.utils.weak import WeakIdKeyDictionary

from metaimplicit.counts import check_count
from metaimplicit.mended import mended_derivatives
from metaimplicit.methods.examples import count_examples, map_rows, rows
from metaimplicit.methods.linearize import reject_random_numbers
from metaimplicit.methods.recompute import recomputed
from metaimplicit.operators import GGN, CurvatureClass, Hessian, Products, find_curvature
from metaimplicit.params import Params
from metaimplicit.problem import BilevelProblem, Composite
from metaimplicit.task_axis import new_views
from metaimplicit.tensors import is_transformed, tensors_in, with_known_types
from metaimplicit.unsupported import UnsupportedOperationError, shorten

Join = Callable[[Sequence[Any], Sequence[int]], Any]


def in_microbatches(problem: BilevelProblem, size: int | None, *, batched: bool) -> BilevelProblem:
    """The same problem, whose losses are evaluated on slices of at most `size` examples.

    With slices of m₁ + m₂ + … = m examples, a loss that is a plain function is

        f = Σ_k (m_k/m) f(slice k),

    so it has to be a mean over the examples, plus terms that do not depend on the data. Of a
    `Composite`, only the outputs are evaluated slice by slice. Its loss receives the outputs of all
    examples, so it may be anything, if the outputs of an example depend on no other example. The
    first call checks either on a few of the examples, and so does a call in another mode of the
    model, or with labels that may be masked.

    The examples are the first axis of every tensor of the data that has an axis. Derivatives of
    every order evaluate a slice again and free it, so memory holds one slice at a time.

    Args:
        problem: The problem of one task. `init` and `features` see all examples at once.
        size: m_k at most. If None, the problem stays as it is.
        batched: Whether the data are a batch of tasks, which is refused.

    Raises:
        ValueError: The data are a batch of tasks. On evaluating: the tensors of the data disagree
            about the number of examples, the loss is no mean, the outputs of an example depend on
            others, the outer loss returns more than a scalar, or random numbers are drawn.

    Example:
        >>> x = torch.arange(5.0)
        >>> problem = BilevelProblem(
        ...     init=lambda meta, data: {"w": torch.zeros(())},
        ...     inner_loss=lambda params, meta, data: (params["w"] - data).square().mean(),
        ...     outer_loss=lambda params, meta, data: params["w"],
        ... )
        >>> sliced = in_microbatches(problem, size=2, batched=False)
        >>> sliced.inner_loss({"w": torch.tensor(1.0)}, {}, x)  # of 2, 2 and 1 examples
        tensor(3.)
    """
    if size is None:
        return problem
    if batched:
        raise ValueError(
            "microbatch: got batched=True, expected one problem; chunk_size bounds the memory of a "
            "batch of tasks"
        )
    return replace(
        problem,
        inner_loss=_sliced(problem.inner_loss, size, "inner loss"),
        outer_loss=_sliced(problem.outer_loss, size, "outer loss"),
    )


def check_size(size: int | None) -> None:
    """Raise ValueError if no slice can have so many examples.

    Example:
        >>> check_size(1)
    """
    if size is not None:
        check_count("microbatch", size, unit=" example, or None for all")


def check_curvature(
    curvature: str | CurvatureClass,
    products: Products,
    preconditioner: str | CurvatureClass | None,
) -> None:
    """Raise ValueError for parts of an implicit method that need all examples at once.

    Example:
        >>> check_curvature("kfac", "double-backward", None)
        Traceback (most recent call last):
        ...
        ValueError: microbatch: got curvature 'kfac', expected 'hessian' or 'gauss-newton'
    """
    kind, _ = find_curvature(curvature)
    if kind not in (Hessian, GGN):
        name = repr(curvature) if isinstance(curvature, str) else kind.__name__
        raise ValueError(f"microbatch: got curvature {name}, expected 'hessian' or 'gauss-newton'")
    if preconditioner is not None:
        raise ValueError(
            "microbatch: got a preconditioner, which looks into the layers at all examples; leave "
            "it out, or use NystromCG"
        )
    if products == "forward-over-reverse":
        raise ValueError(
            f"microbatch: got products={products!r}, expected 'double-backward' or "
            "'finite-differences'"
        )


def _sliced(loss: Any, size: int, name: str) -> Any:
    if isinstance(loss, Composite):
        outputs = f"outputs of the {name}"
        return loss.with_outputs(_Slices(loss.outputs, size, outputs, _concatenate))
    return _Slices(loss, size, name, _mean)


@dataclass(frozen=True)
class _Slices:
    """A function of one problem, evaluated on slices of its data.

    Attributes:
        function: `(params, meta, data) -> pytree`.
        size: The number of examples in a slice at most.
        name: What errors call it.
        join: Makes the result for all examples of those for the slices and their sizes.
    """

    function: Callable[[Params, Params, Any], Any]
    size: int
    name: str
    join: Join

    def __call__(self, params: Params, meta: Params, data: Any) -> Any:
        """The function at all examples."""
        count = count_examples(data)
        if count <= self.size:
            return self.function(params, meta, data)
        data = with_known_types(data)
        self._check_once(params, meta, data, count=count)
        slices = [(start, min(start + self.size, count)) for start in range(0, count, self.size)]
        results = [self._evaluate(params, meta, rows(data, *ends)) for ends in slices]
        return self.join(results, [end - start for start, end in slices])

    def _evaluate(self, params: Params, meta: Params, data: Any) -> Any:
        """The function at one slice, as a node that keeps no graph."""
        leaves, structure = tree_flatten((params, meta, data))
        structures: list[Any] = []

        def of_leaves(at: Sequence[Any]) -> list[Any]:
            params, meta, data = tree_unflatten(at, structure)
            with mended_derivatives:
                result = self.function(params, meta, new_views(data))
            outputs, of_result = tree_flatten(result)
            structures[:] = [of_result]
            return outputs

        return tree_unflatten(recomputed(of_leaves, leaves), structures[0])

    def _check_once(self, params: Params, meta: Params, data: Any, *, count: int) -> None:
        masked = _masked_examples(data, count) if self.join is _mean else None
        passed: _Passed | None = _CHECKED.get(self.function)
        if passed is not None and passed.holds(masked):
            return
        called: list[nn.Module] = []
        handle = register_module_forward_pre_hook(lambda module, _: called.append(module))
        try:
            self._check(params, meta, data, count=count, masked=masked)
        finally:
            handle.remove()
        modes = [(ref(module), module.training) for module in called]
        with suppress(TypeError):  # an object without weak references is not remembered
            _CHECKED[self.function] = _Passed(modes, masked is not None)

    @torch.no_grad()
    def _check(
        self, params: Params, meta: Params, data: Any, *, count: int, masked: Tensor | None
    ) -> None:
        """Raise ValueError if the results for slices do not make up that for all examples.

        At most two slices of examples are looked at, from all over the data, since neighbours may
        be alike (of one class). Those that may be masked are in the first.
        """
        seen = min(count, 2 * self.size)
        first = max(1, seen // 3)
        chosen = torch.arange(seen, device="cpu") * count // seen
        if masked is not None:
            chosen = _beside_masked(masked, count, seen=seen, few=(first + 1) // 2)
        data = map_rows(lambda x: x[chosen.to(x.device)], data)
        parts = [data, rows(data, 0, first), rows(data, first, seen)]
        # What holds at θ may hold by chance there, as where all outputs are zero.
        for at in (params, {name: _moved(p) for name, p in params.items()}):
            whole, *halves = self._trial(at, meta, parts)
            joined = self.join(halves, [first, seen - first])
            error = _relative_error(tree_leaves(joined), tree_leaves(whole))
            if error > 0:
                raise ValueError(self._refusal(error, first, seen))

    def _trial(self, params: Params, meta: Params, parts: Sequence[Any]) -> list[Any]:
        """The values on parts of the data. Random numbers are refused."""
        run = reject_random_numbers(
            lambda p: [self.function(p, meta, part) for part in parts], self.name
        )
        try:
            return run(params)
        except (UnsupportedOperationError, torch.OutOfMemoryError):
            raise
        except (RuntimeError, IndexError) as error:
            raise ValueError(
                f"microbatch: the {self.name} cannot be evaluated on a part of the examples "
                f"({shorten(error)}); every tensor of the data has to carry the examples first, "
                "and what serves all of them belongs in meta or in a closure"
            ) from error

    def _refusal(self, error: float, first: int, seen: int) -> str:
        parts = f"of {first} and {seen - first} of them (relative difference {error:.0e})"
        if self.join is _mean:
            return (
                f"microbatch: the {self.name} of {seen} examples is not the mean of those {parts}, "
                "expected a mean over examples, without sums, weights of classes or batch "
                "statistics; a Composite allows any loss of the outputs"
            )
        return (
            f"microbatch: the {self.name} at {seen} examples are not those {parts}, expected a "
            "model that treats every example by itself; switch batch normalisation to evaluation "
            "mode, or use another norm"
        )


@dataclass(frozen=True)
class _Passed:
    """A check that a function passed.

    Attributes:
        modes: The modules that it calls, and whether they were in training.
        masked: Whether the data had labels that may be masked.
    """

    modes: list[tuple[ref[nn.Module], bool]]
    masked: bool

    def holds(self, masked: Tensor | None) -> bool:
        """Whether the function would pass again."""
        if masked is not None and not self.masked:
            return False
        modules = ((module(), training) for module, training in self.modes)
        return all(module is None or module.training == mode for module, mode in modules)


_CHECKED = WeakIdKeyDictionary()  # the functions that passed their check: `_Passed`


def _beside_masked(masked: Tensor, count: int, *, seen: int, few: int) -> Tensor:
    """The numbers of examples to look at: a few masked ones, others from all over, and the rest.

    Args:
        masked: The numbers of the examples that may be masked, int64 `[k]`.
        count: The number of examples.
        seen: How many are looked at.
        few: How many masked ones come first, so that they are in one slice with others.

    Returns:
        int64 `[seen]`, without repetition.
    """
    others = torch.ones(count, dtype=torch.bool, device="cpu").scatter(0, masked, False)
    others = others.nonzero().flatten()
    taken = min(len(others), seen - len(masked[:few]))
    spread = others[torch.arange(taken, device="cpu") * len(others) // max(taken, 1)]
    return torch.cat([masked[:few], spread, masked[few:]])[:seen]


def _masked_examples(data: Any, count: int) -> Tensor | None:
    """The numbers of the examples with negative integers, which losses ignore, int64 `[k]`.

    None if there are none.
    """
    negative = torch.zeros(count, dtype=torch.bool, device="cpu")
    for x in tensors_in(data):
        is_label = x.dtype in (torch.int64, torch.int32, torch.int16, torch.int8)
        if is_label and x.dim() and len(x) == count and not is_transformed(x):
            negative |= (x < 0).reshape(count, -1).any(1).cpu()
    masked = negative.nonzero().flatten()
    return masked if len(masked) else None


def _mean(values: Sequence[Any], sizes: Sequence[int]) -> Any:
    """The mean of a scalar over slices, each weighed by its examples."""
    if not isinstance(values[0], Tensor):
        raise ValueError(
            f"microbatch: got a loss that returns a {type(values[0]).__name__}, expected a scalar "
            "tensor alone, without aux"
        )
    total = sum(sizes)
    return torch.stack([v * (m / total) for v, m in zip(values, sizes, strict=True)]).sum(0)


def _concatenate(results: Sequence[Any], sizes: Sequence[int]) -> Any:
    """Outputs of all examples, of those of slices."""

    def join(*parts: Any) -> Any:
        shapes = [len(p) if isinstance(p, Tensor) and p.dim() else None for p in parts]
        if shapes == list(sizes):
            return torch.cat(parts)
        if all(part is None for part in parts):
            return None
        raise ValueError(
            f"microbatch: got outputs with leading sizes {shapes} for {list(sizes)} examples, "
            "expected outputs that carry the examples first"
        )

    return tree_map(join, *results)


def _moved(p: Tensor) -> Tensor:
    """Another point, at a distance of a tenth, in a direction without a pattern."""
    direction = torch.cos(1 + torch.arange(p.numel(), device=p.device).double().square())
    return p + 0.1 * (1 + p.square().mean().sqrt()) * direction.to(p).reshape(p.shape)


def _relative_error(actual: Sequence[Any], expected: Sequence[Any]) -> float:
    """The largest relative distance beyond round-off, 0 if there is none."""
    largest = 0.0
    if any(_is_lost(a, b) for a, b in zip(actual, expected, strict=True)):
        return math.inf
    for a, b in _finite_pairs(actual, expected):
        size = max(float(a.abs().max()), float(b.abs().max()))
        error = float((a - b).abs().max()) / size if size > 0 else 0.0
        if error > _tolerance(b):
            largest = max(largest, error)
    return largest


def _is_lost(actual: Any, expected: Any) -> bool:
    """Whether there are no numbers where there should be some."""
    is_number = isinstance(expected, Tensor) and expected.is_floating_point()
    return is_number and bool((expected.isfinite() & ~actual.isfinite()).any())


def _finite_pairs(actual: Sequence[Any], expected: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
    for a, b in zip(actual, expected, strict=True):
        is_number = isinstance(b, Tensor) and b.is_floating_point() and b.numel()
        if is_number and a.isfinite().all() and b.isfinite().all():
            yield a, b


def _tolerance(like: Tensor) -> float:
    """√ε of the coarsest type that a loss may compute in where `like` is."""
    eps = torch.finfo(like.dtype).eps
    device = like.device.type
    if torch.is_autocast_enabled(device):
        eps = max(eps, torch.finfo(torch.get_autocast_dtype(device)).eps)
    if like.is_cuda and (torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32):
        eps = max(eps, 2.0**-11)
    return math.sqrt(eps)
