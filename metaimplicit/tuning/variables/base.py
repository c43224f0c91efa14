"""What a hyperparameter of a model's training is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from metaimplicit.params import Params
from metaimplicit.problem import Proximal
from metaimplicit.tuning.batches import Batch, batch_entry
from metaimplicit.tuning.domains import Domain, Positive


class Variable(ABC):
    """A hyperparameter: its values to start from, its domains and its part in the training loss.

        f = (1/m) Σᵢ wᵢ ℓ(model(xᵢ), yᵢ) + penalty

    A subclass implements `meta`, and one or more of the three functions below. All three are None
    by default, which says that the variable has no such part.

    Attributes:
        inputs: `(meta, batch) -> xᵢ`, `[m, *shape]`, what the model is trained on. At most one
            variable of a problem has it.
        makes_examples: Says that what `inputs` returns are examples of its own, which have the
            numbers 0 … m − 1 for `weights`, and not those of the batch.
        weights: `(meta, losses, batch) -> wᵢ`, `[m]`, given the losses ℓᵢ, `[m]`, detached. The
            weights of several variables are multiplied.
        reads_losses: Says whether `weights` may depend on the losses. If False, methods that take
            differences in θ need not hold the losses where they are.
        weighs_labels: Says what `weights` weighs if an example has several labels, `[m,
            *positions]` (the words of a sentence, the pixels of an image, several answers). If
            False, it receives the mean loss of each example and returns `[m]`. If True, it receives
            the loss of each label and returns their weights, shaped as the losses.
        penalty: `(params, start, meta) -> scalar`, where `start` are the parameters with which the
            model came. The penalties of several variables are added.

    `batch` is a dict with `"inputs"` and `"targets"`, and `"index"` if the loader gives the numbers
    of the examples. `weights` also finds `"counted"` there: which losses count, bool, shaped as the
    losses of labels, or None if all do.

    Example:
        >>> import torch
        >>> class Tempering(Variable):
        ...     def meta(self, params):
        ...         return {"temperature": torch.tensor(2.0)}
        ...
        ...     def weights(self, meta, losses, batch):
        ...         return (-losses / meta["temperature"]).exp()
        >>> tempering = Tempering()
        >>> tempering.penalty is None
        True
        >>> tempering.weights(tempering.meta({}), torch.zeros(2), {})
        tensor([1., 1.])
    """

    inputs: Callable[[Params, Batch], Any] | None = None
    makes_examples: bool = False
    weights: Callable[[Params, Tensor, Batch], Tensor] | None = None
    reads_losses: bool = True
    weighs_labels: bool = False
    penalty: Callable[[Params, Params, Params], Tensor] | None = None

    @abstractmethod
    def meta(self, params: Params) -> Params:
        """Its entries of φ to start from, given the parameters of the model."""

    def domains(self, names: Iterable[str]) -> dict[str, Domain]:
        """The domains of its entries, whose names are given; by default all are real numbers."""
        return {}

    def targets(self, batch: Batch) -> Any:
        """yᵢ, `[m]`. It is asked only of the variable that has `inputs`."""
        return batch_entry(batch, "targets")

    @property
    def proximal(self) -> Proximal | None:
        """The penalty as a `Proximal`, if it is one.

        Where it is the only penalty of a problem, it stands in its place, so that solvers know the
        multiple of the identity in the curvature.
        """
        return None


@dataclass(frozen=True)
class Scalar(Variable):
    """A number that the inner loop reads by `FromMeta(name)`, such as a step size or a momentum.

    Args:
        name: The name of its entry of φ.
        start: Its value to start from.
        domain: Its domain: `Positive()` for a step size, `Interval(0, 1)` for a momentum.

    Example:
        >>> import torch
        >>> Scalar("lr", 0.1).meta({"w": torch.zeros(3)})
        {'lr': tensor(0.1000)}
    """

    name: str
    start: float
    domain: Domain = Positive()

    def meta(self, params: Params) -> Params:
        """`{name: start}`, a scalar."""
        return {self.name: prototype(params).new_tensor(self.start)}

    def domains(self, names: Iterable[str]) -> dict[str, Domain]:
        """`{name: domain}`."""
        return {self.name: self.domain}


def prototype(params: Params) -> Tensor:
    """The first parameter, whose dtype and device the entries of φ take."""
    return next(iter(params.values()))


def example_index(variable: Variable, batch: Batch) -> Tensor:
    """The numbers of the examples of a batch in the training set, int64 `[m]`.

    Raises:
        ValueError: The batch does not have them.
    """
    if "index" not in batch:
        raise ValueError(
            f"{type(variable).__name__}: got a batch without 'index', expected the numbers of its "
            "examples, int64 [m], as the third part of a tuple or as an entry of that name"
        )
    index: Tensor = batch["index"]
    return index


def select_entries(variable: Variable, values: Tensor, index: Tensor) -> Tensor:
    """The entries of `values`, `[n, …]`, with these numbers.

    Raises:
        IndexError: A number is negative, or n or more.
    """
    try:
        # `index_select` refuses a negative number, which an index would count from the end.
        return values.index_select(0, index)
    except IndexError as error:
        low, high = (int(bound) for bound in index.aminmax())
        raise IndexError(
            f"{type(variable).__name__}: got numbers from {low} to {high}, expected 0 to "
            f"{len(values) - 1}"
        ) from error


def check_choice(name: str, got: str, known: tuple[str, ...]) -> None:
    """Raise ValueError unless `got` is one of the known words."""
    if got not in known:
        raise ValueError(f"{name}: got {got!r}, expected one of {', '.join(known)}")
