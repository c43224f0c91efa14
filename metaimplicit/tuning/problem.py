"""The bilevel problem of a model whose training has hyperparameters."""

# This module does not import `annotations` from `__future__`. That would turn the types of the
# fields of a NamedTuple into strings that documentation tools cannot resolve.

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from metaimplicit.functions import check_function
from metaimplicit.normalization import reject_running_statistics
from metaimplicit.params import Params
from metaimplicit.problem import BilevelProblem, Composite, Proximal
from metaimplicit.tuning.batches import Batch, batch_entry, split_batch
from metaimplicit.tuning.calls import ModelCall, output_tensor
from metaimplicit.tuning.domains import Domain
from metaimplicit.tuning.example_losses import ExampleLosses, align
from metaimplicit.tuning.losses import SplitLoss
from metaimplicit.tuning.reductions import Loss
from metaimplicit.tuning.variables import Variable
from metaimplicit.wrappers import AVERAGE_HYPERGRADIENTS, reject_distributed

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
        """wᵢ of the examples of a training batch, without a graph.

        Returns:
            `[m]`, or one weight for each label, `[m, *positions]`, if an example has several and a
            variable weighs them (`Variable.weighs_labels`).

        Raises:
            ValueError: No variable of the problem weighs examples.
        """
        loss = self.problem.inner_loss
        if not isinstance(loss, WeightedLoss) or loss.weights is None:
            raise ValueError(
                "weights: got a problem without any, expected a variable that weighs examples"
            )
        with torch.no_grad():
            losses = loss.loss(loss.outputs(params, meta, data), data)
            return loss.weights(meta, losses, data)


@dataclass(frozen=True)
class ModelProblem(BilevelProblem):
    """A bilevel problem whose data are batches of examples, as `split_batch` reads them.

    Example:
        >>> from metaimplicit.tuning import ClassWeights
        >>> tuning = tuning_problem(nn.Linear(2, 3), nn.CrossEntropyLoss(), [ClassWeights(3)])
        >>> isinstance(tuning.problem, ModelProblem)
        True
    """


@dataclass(frozen=True)
class WeightedLoss(Composite):
    """A composite whose loss says how examples count, so that f is the loss itself if w = 1.

    Args:
        loss: `(outputs, data) -> ExampleLosses`.
        weights: `(meta, losses, data) -> w`, `[m]` or shaped as the losses. The `ExampleLosses`
            that it receives are detached.
        reads_losses: Whether the weights may depend on them.

    Example:
        >>> from metaimplicit.tuning import ClassWeights
        >>> tuning = tuning_problem(nn.Linear(2, 3), nn.CrossEntropyLoss(), [ClassWeights(3)])
        >>> isinstance(tuning.problem.inner_loss, WeightedLoss)
        True
    """

    loss: Callable[[Tensor, Any], Any]
    weights: Callable[[Params, Any, Any], Tensor] | None = None
    reads_losses: bool = True

    @property
    def weights_read_losses(self) -> bool:
        """Whether the weights may depend on the losses."""
        return self.reads_losses

    def output_loss(self, outputs: Tensor, meta: Params, data: Any) -> Tensor:
        """The first term of f as a function of the outputs."""
        losses: ExampleLosses = self.loss(outputs, data)
        assert self.weights is not None
        return losses.weighted_mean(self.weights(meta, losses.detach(), data))


@torch.inference_mode(False)
def tuning_problem(
    model: nn.Module,
    loss: Loss,
    variables: Sequence[Variable],
    *,
    penalty: Proximal | None = None,
) -> TuningProblem:
    """The bilevel problem of a model's training loss f and validation loss g.

        f = (1/m) Σᵢ wᵢ ℓ(model(xᵢ), yᵢ) + penalties,    g = (1/m) Σᵢ ℓ(model(xᵢ), yᵢ)

    f is evaluated on training batches and g on validation batches. `Tuner` is given both. The data
    of `hypergradient` is `Stream(lambda t: train if t < T else validation)` for T inner steps, with
    `Implicit(…, batch=train)` if the method is implicit. Else f and g see the same batch.

    A batch is `(inputs, targets)`, `(inputs, targets, index)` or a mapping with an entry `targets`,
    `labels` or the like, such as those of Hugging Face; `split_batch` states the rule.

    m counts as the loss counts: labels that it ignores are left out, and a loss that is a sum, or a
    mean weighed by classes, stays one. With all wᵢ = 1, the first term of f is the loss itself.

    Args:
        model: Its parameters that require grad are θ, and start where they are. They are not
            changed. A buffer that a forward pass writes to moves as in training. The model receives
            several inputs one by one or by their names. It returns what the loss takes, or a tuple,
            mapping or dataclass whose entry `logits`, or first entry, the loss takes.
        loss: Called with the outputs and the targets: a module such as `nn.CrossEntropyLoss()`, or
            a function. Its reduction is its own. Where variables weigh examples, its attribute or
            argument `reduction` is set to `"none"`; a loss that has neither is called with one
            example at a time.
        variables: The hyperparameters. Their weights are multiplied and their penalties added.
        penalty: A penalty that is not a hyperparameter, or reads its strength by `FromMeta`.

    Raises:
        ValueError: There is no hyperparameter, two have one name, two variables make the inputs,
            `variables` holds something else, the loss is no function, no parameter requires grad, a
            batch norm tracks running statistics, or the model is wrapped in
            DistributedDataParallel.

    Example:
        >>> from torch.nn import functional as F
        >>> from metaimplicit.tuning import ClassWeights
        >>> model = nn.Linear(2, 3)
        >>> problem, meta, domains = tuning_problem(model, F.cross_entropy, [ClassWeights(3)])
        >>> meta, domains
        ({'class_weights': tensor([1., 1., 1.])}, {'class_weights': Positive()})
    """
    check_function("loss", loss, "(outputs, targets) -> scalar or losses of examples")
    reject_distributed(model, AVERAGE_HYPERGRADIENTS)
    reject_running_statistics(model)
    start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    if not start:
        raise ValueError(
            "model: got no parameter that requires grad, expected some; call model.requires_grad_()"
        )
    meta, domains = _collect_entries(variables, start)
    losses = _Losses(model, loss, variables)
    total_penalty = _total_penalty(variables, start, penalty)
    inner_loss: Composite
    if losses.weighers:
        inner_loss = WeightedLoss(
            outputs=losses.outputs,
            loss=losses.split,
            penalty=total_penalty,
            module=model,
            weights=losses.weights,
            reads_losses=any(weigher.reads_losses for weigher in losses.weighers),
        )
    else:
        inner_loss = Composite(
            outputs=losses.outputs,
            loss=losses.inner_loss,
            penalty=total_penalty,
            module=model,
        )
    problem = ModelProblem(
        init=lambda meta, data: start,
        inner_loss=inner_loss,
        outer_loss=Composite(outputs=losses.validation_outputs, loss=losses.validation_loss),
    )
    return TuningProblem(problem, meta, domains)


class _Losses:
    """The parts of f and g as functions of the parameters, the meta-parameters and a batch."""

    def __init__(self, model: nn.Module, loss: Loss, variables: Sequence[Variable]) -> None:
        makers = [v for v in variables if v.inputs is not None]
        if len(makers) > 1:
            raise ValueError(
                f"variables: got {len(makers)} that make the inputs, expected at most one"
            )
        self.call = ModelCall(model)
        self.loss = SplitLoss(loss)
        self.maker = makers[0] if makers else None
        self.weighers = [v for v in variables if v.weights is not None]
        self._takes_all_outputs: bool | None = None

    def outputs(self, params: Params, meta: Params, data: Any) -> Any:
        """The outputs at the training inputs."""
        batch = split_batch(data)
        if self.maker is None or self.maker.inputs is None:
            inputs = batch_entry(batch, "inputs")
        else:
            inputs = self.maker.inputs(meta, batch)
        return self._choose(self.call(params, inputs), lambda: self.targets(batch))

    def targets(self, batch: Batch) -> Any:
        """The training targets."""
        if self.maker is None:
            return batch_entry(batch, "targets")
        return self.maker.targets(batch)

    def inner_loss(self, outputs: Any, data: Any) -> Tensor:
        """The training loss without weights, a scalar."""
        return self.loss.value(outputs, self.targets(split_batch(data)))

    def split(self, outputs: Any, data: Any) -> ExampleLosses:
        """The losses of the training examples."""
        return self.loss.split(outputs, self.targets(split_batch(data)))

    def weights(self, meta: Params, losses: ExampleLosses, data: Any) -> Tensor:
        """The product of the variables' weights, `[m]` or shaped as the losses."""
        batch = split_batch(data)
        targets = self.loss.read_targets(self.targets(batch))
        batch |= {"targets": targets, "counted": losses.count.counted}
        if self.maker is not None and self.maker.makes_examples:
            # The losses are those of the examples that were made, not of the real ones.
            batch["index"] = torch.arange(len(losses.losses), device=losses.losses.device)
        factors = []
        for variable in self.weighers:
            assert variable.weights is not None
            seen = losses.losses if variable.weighs_labels else losses.of_examples()
            factors.append(variable.weights(meta, seen, batch))
        dims = max(factor.dim() for factor in factors)
        return reduce(torch.mul, (align(factor, dims) for factor in factors))

    def validation_outputs(self, params: Params, meta: Params, data: Any) -> Any:
        """The outputs at the validation inputs."""
        batch = split_batch(data)
        targets = batch_entry(batch, "targets")
        return self._choose(self.call(params, batch_entry(batch, "inputs")), lambda: targets)

    def validation_loss(self, outputs: Any, data: Any) -> Tensor:
        """The validation loss, a scalar."""
        return self.loss.value(outputs, batch_entry(split_batch(data), "targets"))

    def _choose(self, outputs: Any, targets: Callable[[], Any]) -> Any:
        """What the model returns, if the loss takes it, or else the tensor in it."""
        if isinstance(outputs, Tensor):
            return outputs
        if self._takes_all_outputs is None:
            try:
                self.loss.value(outputs, targets())
                self._takes_all_outputs = True
            except (TypeError, AttributeError):
                self._takes_all_outputs = False
        return outputs if self._takes_all_outputs else output_tensor(outputs)


def _collect_entries(
    variables: Sequence[Variable], start: Params
) -> tuple[Params, dict[str, Domain]]:
    """φ to start from, and the domains of its entries."""
    if not isinstance(variables, Iterable) or not all(isinstance(v, Variable) for v in variables):
        raise ValueError(
            f"variables: got {variables!r}, expected a list of variables, such as [WeightDecay()]"
        )
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
