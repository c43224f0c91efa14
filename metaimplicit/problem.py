"""The bilevel problem min_φ g(θ*(φ), φ) with θ*(φ) = argmin_θ f(θ, φ), and its parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from metaimplicit.params import Params

Loss = Callable[[Params, Params, Any], Tensor]


@dataclass(frozen=True)
class FromMeta:
    """A number of an inner loop or penalty that is read from φ and differentiated.

    Args:
        name: The entry of `meta` to read. `meta[name]` serves every parameter: it is a scalar or
            broadcasts against each of them. If `meta` holds `f"{name}.{parameter}"` instead, that
            parameter has its own number (per tensor, or per element as in Meta-SGD).
        transform: Applied to the entry, for example `torch.exp` to keep a step size positive.

    Example:
        >>> lr = FromMeta("log_lr", torch.exp)
        >>> lr({"log_lr": torch.tensor(0.0)})
        tensor(1.)
    """

    name: str
    transform: Callable[[Tensor], Tensor] | None = None

    def __call__(self, meta: Params, parameter: str | None = None) -> Tensor:
        """The transformed entry: that of `parameter` if `meta` has one, else the shared one.

        Raises:
            ValueError: `meta` has neither.
        """
        key = f"{self.name}.{parameter}"
        if parameter is None or key not in meta:
            key = self.name
        if key not in meta:
            raise ValueError(
                f"FromMeta({self.name!r}): meta has no such entry; it has {sorted(meta)}"
            )
        return meta[key] if self.transform is None else self.transform(meta[key])

    def reads(self, key: str) -> bool:
        """Whether this reference can resolve to the meta-parameter `key`."""
        return key == self.name or key.startswith(f"{self.name}.")


Number = float | Tensor | FromMeta


def resolve(number: Any, meta: Params, parameter: str | None = None) -> Any:
    """The value of a float, tensor or `FromMeta`, or of a tuple of them, for one parameter."""
    if isinstance(number, tuple):
        return tuple(resolve(part, meta, parameter) for part in number)
    return number(meta, parameter) if isinstance(number, FromMeta) else number


@dataclass(frozen=True)
class Proximal:
    """The penalty λ/2 ‖θ − c‖². Its Hessian is λI, a multiple of the identity that solvers know.

    Args:
        strength: λ ≥ 0, a scalar.
        center: With `"meta"`, c holds the entries of `meta` that have the parameters' names
            (Rajeswaran et al. 2019, eq. 3). With `"zero"`, c = 0: ridge, or weight decay.

    Example:
        >>> decay = Proximal(0.5, center="zero")
        >>> decay({"w": torch.tensor([2.0])}, {})
        tensor(1.)
    """

    strength: Number
    center: Literal["meta", "zero"] = "meta"

    def __post_init__(self) -> None:
        if self.center not in ("meta", "zero"):
            raise ValueError(f"Proximal center: got {self.center!r}, expected 'meta' or 'zero'")
        if isinstance(self.strength, (int, float)) and not self.strength >= 0:
            raise ValueError(f"Proximal strength: got {self.strength}, expected a number ≥ 0")

    def __call__(self, params: Params, meta: Params) -> Tensor:
        """The penalty at `params`, a scalar.

        Raises:
            ValueError: `meta` lacks an entry of the center or the strength.
        """
        missing = sorted(set(params) - set(meta))
        if self.center == "meta" and missing:
            raise ValueError(
                f"Proximal center: meta has no entry {missing[0]!r}, "
                "expected one for each parameter"
            )
        squares = []
        for name, p in params.items():
            distance = p - meta[name] if self.center == "meta" else p
            squares.append(distance.square().sum())
        value: Tensor = 0.5 * resolve(self.strength, meta) * torch.stack(squares).sum()
        return value

    def known_multiple(self, meta: Params) -> float:
        """λ, the Hessian's known multiple of the identity."""
        return _as_float(resolve(self.strength, meta))


def _as_float(number: float | Tensor) -> float:
    return float(number.detach() if isinstance(number, Tensor) else number)


@dataclass(frozen=True)
class Decay:
    """½ Σ_j λ_j θ_j²: what the weight decay of an inner optimiser adds to the inner loss.

    Args:
        strengths: λ_j ≥ 0 by parameter, a number or a tensor that broadcasts against θ_j.

    Example:
        >>> Decay({"w": 0.5})({"w": torch.tensor([2.0])}, {})
        tensor(1.)
    """

    strengths: dict[str, float | Tensor]

    def __call__(self, params: Params, meta: Params) -> Tensor:
        """The penalty at `params`, a scalar."""
        parts = [
            (strength * params[name].square()).sum() for name, strength in self.strengths.items()
        ]
        return 0.5 * torch.stack(parts).sum()

    def known_multiple(self, meta: Params) -> float | None:
        """λ if all parameters share one number, else None."""
        numbers = list(self.strengths.values())
        if any(isinstance(number, Tensor) and number.dim() for number in numbers):
            return None
        values = {_as_float(number) for number in numbers}
        return values.pop() if len(values) == 1 else None


@dataclass(frozen=True)
class Composite:
    """An inner objective whose parts are visible: f = ℓ(outputs(θ, φ, data), data) + penalty(θ, φ).

    Gauss–Newton needs the split into outputs and loss. A `Proximal` penalty tells solvers the
    multiple of the identity in A.

    Args:
        outputs: `(params, meta, data) -> Tensor`, of one problem.
        loss: `(outputs, data) -> scalar`, of one problem.
        penalty: `(params, meta) -> scalar`. If None, there is no penalty.
        module: The model that `outputs` calls with parameters of these names. Curvature that looks
            into layers (K-FAC) needs it.
        weights: `(meta, losses, data) -> [m]`. If given, `loss` returns one loss for each of the
            m examples, and the first term of f is (1/m) Σᵢ wᵢ ℓᵢ. The `losses` that `weights`
            receives are detached (Shu et al. 2019), so w depends on φ alone.
        checked: What a curvature has found out about `loss`, so that it looks once. Objects that
            are built again and again for one loss share one dict.

    Example:
        >>> fit = Composite(
        ...     outputs=lambda params, meta, data: data * params["w"],
        ...     loss=lambda z, data: z.square().mean(),
        ...     penalty=Proximal(2.0, center="zero"),
        ... )
        >>> fit({"w": torch.tensor(3.0)}, {}, torch.ones(4))
        tensor(18.)
    """

    outputs: Callable[[Params, Params, Any], Tensor]
    loss: Callable[[Tensor, Any], Tensor]
    penalty: Callable[[Params, Params], Tensor] | None = None
    module: nn.Module | None = None
    weights: Callable[[Params, Tensor, Any], Tensor] | None = None
    checked: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    def __call__(self, params: Params, meta: Params, data: Any) -> Tensor:
        """The inner loss at `params`, a scalar."""
        value = self.output_loss(self.outputs(params, meta, data), meta, data)
        return value if self.penalty is None else value + self.penalty(params, meta)

    def with_outputs(self, outputs: Callable[[Params, Params, Any], Tensor]) -> Composite:
        """The same objective of other outputs."""
        other = copy(self)  # `replace` would call the constructor, which subclasses change
        object.__setattr__(other, "outputs", outputs)
        return other

    @property
    def weights_read_losses(self) -> bool:
        """Whether the weights may depend on the losses."""
        return self.weights is not None

    def with_weights_at(self, center: Params) -> Composite:
        """The same objective, whose weights see the losses at θ = `center`, wherever θ is."""
        given = self.weights
        assert given is not None

        def weights(meta: Params, _: Any, data: Any) -> Tensor:
            with torch.no_grad():
                losses = self.loss(self.outputs(center, meta, data), data)
            return given(meta, losses.detach(), data)

        other = copy(self)
        object.__setattr__(other, "weights", weights)
        return other

    def output_loss(self, outputs: Tensor, meta: Params, data: Any) -> Tensor:
        """The first term of f as a function of the outputs."""
        losses = self.loss(outputs, data)
        if self.weights is None:
            return losses
        weights = self.weights(meta, losses.detach(), data)
        if losses.dim() != 1 or weights.shape != losses.shape:
            raise ValueError(
                f"weights: got shape {tuple(weights.shape)} for losses {tuple(losses.shape)}, "
                "expected [m] for both; with weights, loss returns one number for each example "
                "(reduction='none')"
            )
        return (weights * losses).mean()


@dataclass(frozen=True)
class StartAtMeta:
    """An `init` that starts every task at entries of φ. It needs no vmap.

    Args:
        names: Their names, which are those of the parameters.

    Example:
        >>> StartAtMeta(["w"])({"w": torch.ones(2), "decay": torch.zeros(())}, data=None)
        {'w': tensor([1., 1.])}
    """

    names: Sequence[str]

    def __call__(self, meta: Params, data: Any) -> Params:
        """θ₀ of one task."""
        return {name: meta[name] for name in self.names}


@dataclass(frozen=True)
class BilevelProblem:
    """min_φ g(θ*(φ), φ) with θ*(φ) = argmin_θ f(θ, φ).

    Every function but `features` is written for ONE problem, without a task axis.

    Args:
        init: `(meta, data) -> params`, where the inner loop starts. The names in `params` are the
            parameters that adapt.
        inner_loss: f, `(params, meta, data) -> scalar`, a function or a `Composite`.
        outer_loss: g, `(params, meta, data) -> scalar`, or `(scalar, aux)` where aux is a pytree of
            tensors that `hypergradient` hands back.
        features: c, `(meta, data) -> pytree of tensors`, what the losses need of φ and the data
            apart from θ, such as the outputs of layers that do not adapt. The three functions
            above receive it in the place of `data`. It is computed for the whole batch, once for
            each hypergradient, so its tensors carry the task axis if those of `data` do.

    Raises:
        TypeError: One of them is no function.

    Example:
        >>> problem = BilevelProblem(
        ...     init=lambda meta, data: {"w": torch.zeros(())},
        ...     inner_loss=lambda params, meta, data: (params["w"] - meta["target"]).square(),
        ...     outer_loss=lambda params, meta, data: params["w"].square(),
        ... )
    """

    init: Callable[[Params, Any], Params]
    inner_loss: Loss | Composite
    outer_loss: Callable[[Params, Params, Any], Any]
    features: Callable[[Params, Any], Any] | None = None

    def __post_init__(self) -> None:
        functions = {
            "init": "(meta, data) -> params, such as lambda meta, data: params",
            "inner_loss": "(params, meta, data) -> scalar",
            "outer_loss": "(params, meta, data) -> scalar",
        }
        if self.features is not None:
            functions["features"] = "(meta, data) -> pytree of tensors, or None"
        for name, signature in functions.items():
            value = getattr(self, name)
            if not callable(value):
                raise TypeError(
                    f"{name}: got {type(value).__name__}, expected a function {signature}"
                )


@dataclass(frozen=True)
class Stream:
    """Data that changes along the inner loop: inner step t = 0 … T−1 sees `fn(t)`.

    `init` sees `fn(0)` and the outer loss sees `fn(T)`. What the curvature of an implicit method
    sees is `Implicit(batch=…)`.

    Args:
        fn: The step's number to its data. It must return the same data whenever it is asked.

    Example:
        >>> steps = 2
        >>> data = Stream(lambda t: f"training batch {t}" if t < steps else "validation batch")
        >>> [data.fn(t) for t in range(steps + 1)]
        ['training batch 0', 'training batch 1', 'validation batch']
    """

    fn: Callable[[int], Any]


def check_problem(problem: Any) -> None:
    """Raise ValueError unless this is a `BilevelProblem`.

    Example:
        >>> check_problem(None)
        Traceback (most recent call last):
        ...
        ValueError: problem: got NoneType, expected a BilevelProblem
    """
    if not isinstance(problem, BilevelProblem):
        holds_one = isinstance(getattr(problem, "problem", None), BilevelProblem)
        hint = "; pass its .problem" if holds_one else ""
        raise ValueError(f"problem: got {type(problem).__name__}, expected a BilevelProblem{hint}")
