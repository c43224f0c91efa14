"""The bilevel problem min_φ mean_tasks g(θ*(φ), φ), θ*(φ) = argmin_θ f(θ, φ), and its lift over the task axis."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from metaimplicit.params import Params

Loss = Callable[[Params, Params, Any], Tensor]
OptimizerState = dict[str, dict[str, Any]]  # by parameter: slots, tensors and numbers
Vectorize = Literal["vmap", "loop"]


@dataclass(frozen=True)
class FromMeta:
    """A number of an inner loop or penalty that is read from the meta-parameters, and so is differentiated.

    Args:
        name: `meta[name]` serves every tensor (a scalar, or a shape that broadcasts against each of them); if `meta`
            holds `f"{name}.{parameter}"` instead, each parameter has its own (per tensor, or per element: Meta-SGD).
        transform: applied to the entry, e.g. `torch.exp` to keep a step size positive.
    """

    name: str
    transform: Callable[[Tensor], Tensor] | None = None

    def __call__(self, meta: Params, parameter: str | None = None) -> Tensor:
        key = (
            f"{self.name}.{parameter}"
            if parameter is not None and f"{self.name}.{parameter}" in meta
            else self.name
        )
        if key not in meta:
            raise ValueError(
                f"FromMeta({self.name!r}): meta has no such entry; it has {sorted(meta)}"
            )
        return meta[key] if self.transform is None else self.transform(meta[key])

    def reads(self, key: str) -> bool:
        """Whether the meta-parameter `key` is one that this reference resolves to."""
        return key == self.name or key.startswith(f"{self.name}.")


Number = float | Tensor | FromMeta


def resolve(number: Any, meta: Params, parameter: str | None = None) -> Any:
    """The value of a float, tensor or `FromMeta`, or of a tuple of them, for one parameter."""
    if isinstance(number, tuple):
        return tuple(resolve(part, meta, parameter) for part in number)
    return number(meta, parameter) if isinstance(number, FromMeta) else number


@dataclass(frozen=True)
class Proximal:
    """The penalty λ/2 ‖θ − c‖², whose Hessian is the known multiple λI of the identity.

    Args:
        strength: λ ≥ 0, scalar.
        center: `"meta"`, c = the entries of `meta` named as the parameters (Rajeswaran et al. 2019, eq. 3), or
            `"zero"`, ridge / weight decay.
    """

    strength: Number
    center: Literal["meta", "zero"] = "meta"

    def __post_init__(self) -> None:
        if self.center not in ("meta", "zero"):
            raise ValueError(f"Proximal center: got {self.center!r}, expected 'meta' or 'zero'")
        if isinstance(self.strength, (int, float)) and not self.strength >= 0:
            raise ValueError(f"Proximal strength: got {self.strength}, expected a number ≥ 0")

    def __call__(self, params: Params, meta: Params) -> Tensor:
        if self.center == "meta" and (missing := sorted(set(params) - set(meta))):
            raise ValueError(
                f"Proximal center: meta has no entry {missing[0]!r}, expected one for each parameter"
            )
        squares = [
            ((p - meta[name]) if self.center == "meta" else p).square().sum()
            for name, p in params.items()
        ]
        value: Tensor = 0.5 * resolve(self.strength, meta) * torch.stack(squares).sum()
        return value


@dataclass(frozen=True)
class Composite:
    """An inner objective with its parts visible: f = loss(outputs(params, meta, data), data) + penalty(params, meta).

    Gauss–Newton needs the split into outputs and loss; a `Proximal` penalty lets solvers know the multiple of I in A.

    Args:
        outputs, loss, penalty: as above, each of one problem.
        module: the model that `outputs` calls with parameters of these names, for curvature that looks into its layers.
        weights: `(meta, losses, data) -> [m]`; then `loss` returns one loss for each of the m examples, and its part of
            f is (1/m) Σᵢ wᵢ ℓᵢ. The `losses` it is given are detached (Shu et al. 2019): w depends on φ alone.
    """

    outputs: Callable[[Params, Params, Any], Tensor]
    loss: Callable[[Tensor, Any], Tensor]
    penalty: Callable[[Params, Params], Tensor] | None = None
    module: nn.Module | None = None
    weights: Callable[[Params, Tensor, Any], Tensor] | None = None

    def __call__(self, params: Params, meta: Params, data: Any) -> Tensor:
        value = self.of_outputs(self.outputs(params, meta, data), meta, data)
        return value if self.penalty is None else value + self.penalty(params, meta)

    def of_outputs(self, outputs: Tensor, meta: Params, data: Any) -> Tensor:
        """f less its penalty, a function of the outputs."""
        losses = self.loss(outputs, data)
        if self.weights is None:
            return losses
        weights = self.weights(meta, losses.detach(), data)
        if losses.dim() != 1 or weights.shape != losses.shape:
            raise ValueError(
                f"weights: got shape {tuple(weights.shape)} for losses {tuple(losses.shape)}, expected [m] for both; "
                "with weights, loss returns one number for each example (reduction='none')"
            )
        return (weights * losses).mean()


@dataclass(frozen=True)
class BilevelProblem:
    """min_φ g(θ*(φ), φ) with θ*(φ) = argmin_θ f(θ, φ); every function is written for ONE problem, without a task axis.

    Args:
        init: `(meta, data) -> params`, where the inner loop starts; the names of `params` are those that adapt.
        inner_loss: f, `(params, meta, data) -> scalar`, a function or a `Composite`.
        outer_loss: g, `(params, meta, data) -> scalar`, or `(scalar, aux)` with aux a pytree of tensors to hand back.
    """

    init: Callable[[Params, Any], Params]
    inner_loss: Loss | Composite
    outer_loss: Callable[[Params, Params, Any], Any]


@dataclass(frozen=True)
class Stream:
    """Data that changes along the inner loop: inner step t sees `fn(t)`, t = 0 … T−1, and `fn` is pure in t.

    `init` sees `fn(0)`, the outer loss `fn(T)`; what an implicit method's curvature sees is `Implicit(batch=…)`.
    """

    fn: Callable[[int], Any]


@dataclass(frozen=True)
class Iterate:
    """s_t, all that an inner loop goes on from: hand it to the next call instead of starting at `init`.

    Attributes:
        params: θ_t, `{name: [tasks, *shape]}`, task axis first whether or not the problem is batched.
        state: the optimiser's, by parameter.
        carried: what the method takes along: `Forward` its derivative, `ValueFunction` its second iterate.
    """

    params: Params
    state: OptimizerState = field(default_factory=dict)
    carried: Any = None

    @property
    def single(self) -> Params:
        """θ_t of one problem, without the task axis, `{name: [*shape]}`."""
        return {name: p.squeeze(0) for name, p in self.params.items()}

    def detach(self) -> Iterate:
        """The same without a graph."""
        cut = tree_map(
            lambda x: x.detach() if isinstance(x, Tensor) else x,
            (self.params, self.state, self.carried),
        )
        return Iterate(*cut)


class LiftedProblem:
    """A `BilevelProblem` bound to its data, each function lifted over the task axis and returning `[tasks]`.

    Args:
        data: any pytree of tensors; with `batched`, each carries the task axis first. Or a `Stream` of such.
        vectorize: `"vmap"`, or `"loop"`, one call per task under one graph (faster where arithmetic dominates).
        chunk_size: vmap this many tasks at a time, to bound memory.
        start: where the inner loop goes on from; None, at `init`.
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
    ) -> None:
        if vectorize not in ("vmap", "loop"):
            raise ValueError(f"vectorize: got {vectorize!r}, expected 'vmap' or 'loop'")
        self.problem, self.data, self.batched = problem, data, batched
        self.vectorize, self.chunk_size = vectorize, chunk_size
        self.tasks, self._alone = _count(self.at(0)) if batched else 1, not batched
        self.start = start
        if start is not None and (got := {len(p) for p in start.params.values()}) != {self.tasks}:
            raise ValueError(
                f"start: got leading sizes {sorted(got)}, expected {self.tasks}, the tasks of the data"
            )

    def vmapped(self) -> LiftedProblem:
        """The same, vmapped over its tasks even where there is one, or a loop was asked for."""
        other = copy(self)
        other.vectorize, other._alone = "vmap", False
        return other

    def at(self, step: int) -> Any:
        """The data that inner step `step` sees."""
        return self.data.fn(step) if isinstance(self.data, Stream) else self.data

    def init(self, meta: Params) -> Params:
        """θ₀, `{name: [tasks, *shape]}`, carrying init's graph; where `start` is given, its parameters, a constant."""
        if self.start is not None:
            return {name: p.detach() for name, p in self.start.params.items()}
        data = self.at(0)
        params: Params = self._lift(lambda _, d: self.problem.init(meta, d), {}, data)
        if not params or not all(
            isinstance(p, Tensor) and p.is_floating_point() for p in params.values()
        ):
            raise ValueError(
                f"init: got {params!r}, expected a non-empty dict of floating-point tensors"
            )
        return {
            name: p.clone() for name, p in params.items()
        }  # no two of them one tensor, none of them the caller's

    def inner(self, params: Params, meta: Params, data: Any) -> Tensor:
        return self._scalars(
            "inner_loss", lambda p, d: self.problem.inner_loss(p, meta, d), params, data
        )[0]

    def outer(self, params: Params, meta: Params, data: Any) -> tuple[Tensor, Any]:
        """g for each task, and the aux it returned (None without one)."""
        return self._scalars(
            "outer_loss", lambda p, d: self.problem.outer_loss(p, meta, d), params, data
        )

    def outputs(self, composite: Composite, params: Params, meta: Params, data: Any) -> Tensor:
        out = self._lift(lambda p, d: composite.outputs(p, meta, d), params, data)
        if not isinstance(out, Tensor):
            raise ValueError(
                f"outputs: got {type(out).__name__}, expected one tensor; leave the others to the loss"
            )
        return out

    def output_loss(self, composite: Composite, outputs: Tensor, meta: Params, data: Any) -> Tensor:
        return self._scalars(
            "loss",
            lambda z, d: composite.of_outputs(z["outputs"], meta, d),
            {"outputs": outputs},
            data,
        )[0]

    def penalty(
        self, function: Callable[[Params, Params], Tensor], params: Params, meta: Params
    ) -> Tensor:
        return self._scalars("penalty", lambda p, _: function(p, meta), params, None)[0]

    def apply(
        self, function: Callable[[Params, Any], Any], params: Params, data: Any = None
    ) -> Any:
        """`function(params, data)` of one task, lifted over the task axis; on the problem's data unless given."""
        return self._lift(function, params, self.at(0) if data is None else data)

    def _scalars(
        self, name: str, function: Callable[..., Any], params: Params, data: Any
    ) -> tuple[Tensor, Any]:
        out = self._lift(function, params, data)
        loss, aux = out if isinstance(out, tuple) else (out, None)
        if not isinstance(loss, Tensor) or loss.shape != (self.tasks,):
            got = (
                f"shape {tuple(loss.shape[1:])}"
                if isinstance(loss, Tensor)
                else type(loss).__name__
            )
            raise ValueError(
                f"{name}: got {got} per task, expected a scalar tensor; reduce it, e.g. with .mean()"
            )
        return loss, aux

    def _lift(self, function: Callable[[Any, Any], Any], params: Params, data: Any) -> Any:
        if not self.batched and not self._alone and params:
            data = tree_map(lambda x: x.unsqueeze(0) if isinstance(x, Tensor) else x, data)
        elif not self.batched:
            out = function({name: p.squeeze(0) for name, p in params.items()}, data)
            return tree_map(lambda x: x.unsqueeze(0) if isinstance(x, Tensor) else x, out)
        if self.vectorize == "loop":
            each = [function(_index(params, i), _index(data, i)) for i in range(self.tasks)]
            return tree_map(lambda *x: torch.stack(x), *each)
        return torch.vmap(
            function,
            in_dims=tree_map(lambda x: 0 if isinstance(x, Tensor) else None, (params, data)),
            randomness="different",
            chunk_size=self.chunk_size,
        )(params, data)


def _index(tree: Any, i: int) -> Any:
    return tree_map(lambda x: x[i] if isinstance(x, Tensor) else x, tree)


def _count(data: Any) -> int:
    if foreign := [x for x in tree_leaves(data) if _holds_tensors(x)]:
        raise ValueError(
            f"data: got {type(foreign[0]).__name__}, which is not told apart by task, expected tensors, in dicts, "
            "lists, tuples or classes that torch.utils._pytree knows; use torch.as_tensor for arrays"
        )
    sizes = {x.shape[0] if x.dim() else None for x in tree_leaves(data) if isinstance(x, Tensor)}
    if len(sizes) != 1 or None in sizes or 0 in sizes:
        raise ValueError(
            f"data: got leading sizes {sorted(map(str, sizes))}, expected every tensor to carry one task axis of the "
            "same size ≥ 1 first; without a task axis, pass batched=False"
        )
    return int(sizes.pop() or 0)


def _holds_tensors(leaf: Any) -> bool:
    if isinstance(leaf, Tensor):
        return False
    parts = [
        *getattr(leaf, "__dict__", {}).values(),
        *(leaf.values() if isinstance(leaf, Mapping) else ()),
    ]
    return isinstance(leaf, np.ndarray) or any(
        isinstance(part, (Tensor, np.ndarray)) for part in parts
    )
