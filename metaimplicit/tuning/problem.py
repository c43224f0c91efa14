"""The bilevel problem of a model whose training has hyperparameters."""

# This module does not import `annotations` from `__future__`. That would turn the types of the
# fields of a NamedTuple into strings that documentation tools cannot resolve.

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from metaimplicit.normalization import reject_running_statistics
from metaimplicit.params import Params
from metaimplicit.problem import BilevelProblem, Composite, Proximal
from metaimplicit.tuning.domains import Domain
from metaimplicit.tuning.variables import Batch, Variable

Penalty = Callable[[Params, Params], Tensor]


class TuningProblem(NamedTuple):
    """What `tuning_problem` returns: `Tuner(problem, meta, domains=domains, …)`.

    Attributes:
        problem: The inner and outer loss.
        meta: φ to start from, `{name: tensor}`.
        domains: The domains of the entries of φ that are not `Real`, by name.

    Example:
        >>> from metaimplicit.tuning import ClassWeights
        >>> model = nn.Linear(2, 3)
        >>> tuning = tuning_problem(model, nn.functional.cross_entropy, [ClassWeights(3)])
        >>> tuning.meta
        {'class_weights': tensor([1., 1., 1.])}
        >>> batch = (torch.randn(2, 2), torch.tensor([0, 2]))
        >>> tuning.weights(dict(model.named_parameters()), tuning.meta, batch)
        tensor([1., 1.])
    """

    problem: BilevelProblem
    meta: Params
    domains: dict[str, Domain]

    def weights(self, params: Params, meta: Params, data: Any) -> Tensor:
        """wᵢ of the examples of a training batch, `[m]`, without a graph.

        Raises:
            ValueError: No variable of the problem weighs examples.
        """
        loss = self.problem.inner_loss
        if not isinstance(loss, Composite) or loss.weights is None:
            raise ValueError(
                "weights: got a problem without any, expected a variable that weighs examples"
            )
        with torch.no_grad():
            losses = loss.loss(loss.outputs(params, meta, data), data)
            return loss.weights(meta, losses, data)


def tuning_problem(
    model: nn.Module,
    loss: Callable[..., Tensor],
    variables: Sequence[Variable],
    *,
    penalty: Proximal | None = None,
) -> TuningProblem:
    """The bilevel problem of a model's training loss f and validation loss g.

        f = (1/m) Σᵢ wᵢ ℓ(model(xᵢ), yᵢ) + penalties,    g = (1/m) Σᵢ ℓ(model(xᵢ), yᵢ)

    f is evaluated on training batches and g on validation batches. A batch is a pair
    `(inputs, targets)`, as a loader gives, or a dict with the entries `"inputs"`, `"targets"` and,
    for variables that need the numbers of the examples, `"index"`.

    Args:
        model: Its parameters that require grad are θ, and start where they are. The model itself is
            not changed.
        loss: ℓ, called as the losses of `torch.nn.functional`: with the outputs, the targets, and
            `reduction`, which is `"none"` for [m] losses or `"mean"` for their mean.
        variables: The hyperparameters. Their weights are multiplied and their penalties added.
        penalty: A penalty that is not a hyperparameter, or reads its strength by `FromMeta`.

    Raises:
        ValueError: There is no hyperparameter, two have one name, two variables make the inputs, no
            parameter requires grad, or a batch norm tracks running statistics.

    Example:
        >>> from torch.nn import functional as F
        >>> from metaimplicit.tuning import ClassWeights
        >>> model = nn.Linear(2, 3)
        >>> problem, meta, domains = tuning_problem(model, F.cross_entropy, [ClassWeights(3)])
        >>> meta, domains
        ({'class_weights': tensor([1., 1., 1.])}, {'class_weights': Positive()})
    """
    reject_running_statistics(model)
    start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    if not start:
        raise ValueError(
            "model: got no parameter that requires grad, expected some; call model.requires_grad_()"
        )
    meta, domains = _collect_entries(variables, start)
    losses = _make_losses(model, loss, variables)
    inner_loss = Composite(
        outputs=losses.outputs,
        loss=losses.inner_loss,
        penalty=_total_penalty(variables, start, penalty),
        module=model,
        weights=losses.weights if losses.weight_factors else None,
    )
    problem = BilevelProblem(
        init=lambda meta, data: start,
        inner_loss=inner_loss,
        outer_loss=losses.outer_loss,
    )
    return TuningProblem(problem, meta, domains)


@dataclass(frozen=True)
class _Losses:
    """The parts of f and g as functions of the parameters, the meta-parameters and a batch."""

    model: nn.Module
    loss: Callable[..., Tensor]
    make_inputs: Callable[[Params, Batch], Tensor]
    make_targets: Callable[[Batch], Tensor]
    weight_factors: tuple[Callable[[Params, Tensor, Batch], Tensor], ...]

    def outputs(self, params: Params, meta: Params, data: Any) -> Tensor:
        return self._call(params, self.make_inputs(meta, _as_dict(data)))

    def inner_loss(self, outputs: Tensor, data: Any) -> Tensor:
        """The losses of the examples, `[m]`, if they are weighed, else their mean."""
        targets = self.make_targets(_as_dict(data))
        reduction = "none" if self.weight_factors else "mean"
        return self.loss(outputs, targets, reduction=reduction)

    def weights(self, meta: Params, losses: Tensor, data: Any) -> Tensor:
        batch = _as_dict(data)
        batch = batch | {"targets": self.make_targets(batch)}
        factors = [weights(meta, losses, batch) for weights in self.weight_factors]
        return torch.stack(factors).prod(0)

    def outer_loss(self, params: Params, meta: Params, data: Any) -> Tensor:
        batch = _as_dict(data)
        outputs = self._call(params, batch["inputs"])
        return self.loss(outputs, batch["targets"], reduction="mean")

    def _call(self, params: Params, inputs: Tensor) -> Tensor:
        frozen = {
            name: p.detach() for name, p in self.model.named_parameters() if name not in params
        }
        outputs: Tensor = torch.func.functional_call(self.model, frozen | params, (inputs,))
        return outputs


def _make_losses(
    model: nn.Module,
    loss: Callable[..., Tensor],
    variables: Sequence[Variable],
) -> _Losses:
    makers = [v for v in variables if v.inputs is not None]
    if len(makers) > 1:
        raise ValueError(f"variables: got {len(makers)} that make the inputs, expected at most one")
    make_inputs = makers[0].inputs if makers else None
    return _Losses(
        model=model,
        loss=loss,
        make_inputs=make_inputs or (lambda meta, batch: batch["inputs"]),
        make_targets=makers[0].targets if makers else (lambda batch: batch["targets"]),
        weight_factors=tuple(v.weights for v in variables if v.weights is not None),
    )


def _collect_entries(
    variables: Sequence[Variable], start: Params
) -> tuple[Params, dict[str, Domain]]:
    """φ to start from, and the domains of its entries."""
    meta: Params = {}
    domains: dict[str, Domain] = {}
    for variable in variables:
        entries = variable.meta(start)
        twice = sorted(set(entries) & set(meta))
        if twice:
            raise ValueError(f"variables: got {twice} twice, expected each hyperparameter once")
        meta |= entries
        domains |= variable.domains(list(entries))
    if not meta:
        raise ValueError("variables: got none, expected at least one hyperparameter")
    return meta, domains


def _total_penalty(
    variables: Sequence[Variable],
    start: Params,
    fixed: Proximal | None,
) -> Penalty | None:
    """The sum of all penalties; a `Proximal`, which solvers know, if it is the only one."""
    penalties = [v.penalty for v in variables if v.penalty is not None]
    if not penalties:
        return fixed
    if fixed is None and len(penalties) == 1:
        known = next(v.proximal for v in variables if v.penalty is not None)
        if known is not None:
            return known

    def total(params: Params, meta: Params) -> Tensor:
        values = [penalty(params, start, meta) for penalty in penalties]
        if fixed is not None:
            values.append(fixed(params, meta))
        return torch.stack(values).sum()

    return total


def _as_dict(data: Any) -> Batch:
    """A batch as a dict; a pair becomes its `"inputs"` and `"targets"`."""
    if isinstance(data, dict):
        return data
    inputs, targets = data
    return {"inputs": inputs, "targets": targets}
