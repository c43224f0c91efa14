"""The bilevel problem of a model that is trained with some ready-made hyperparameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from metaimplicit.normalization import reject_running_statistics
from metaimplicit.params import Params
from metaimplicit.problem import BilevelProblem, Composite, Proximal
from metaimplicit.tuning.domains import Domain
from metaimplicit.tuning.variables import Batch, Variable


class TuningProblem(NamedTuple):
    """What `Tuner(problem, meta, domains=domains, …)` takes."""

    problem: BilevelProblem
    meta: Params
    domains: dict[str, Domain]

    def weights(self, params: Params, meta: Params, data: Any) -> Tensor:
        """wᵢ of a training batch, `[m]`; ValueError where nothing weighs."""
        f = self.problem.inner_loss
        if not isinstance(f, Composite) or f.weights is None:
            raise ValueError(
                "weights: got a problem without any, expected a variable that weighs examples"
            )
        with torch.no_grad():
            return f.weights(meta, f.loss(f.outputs(params, meta, data), data), data)


def tuning_problem(
    model: nn.Module,
    loss: Callable[..., Tensor],
    variables: Sequence[Variable],
    *,
    penalty: Proximal | None = None,
) -> TuningProblem:
    """The bilevel problem of a model's training and validation losses.

        f = (1/m) Σᵢ wᵢ ℓ(model(xᵢ), yᵢ) + penalties on a training batch,  g = mean ℓ on a validation batch

    A batch is a dict with "inputs", "targets" and, for variables that need it, "index", as `tasks.Batches` gives; or a
    loader's (inputs, targets).

    Args:
        model: θ are its parameters that require grad, starting where they are; it is not changed.
        loss: ℓ, called as `torch.nn.functional`'s are: (outputs, targets, reduction="none" or "mean").
        variables: what φ consists of; weights multiply, penalties add up.
        penalty: a fixed one, whose multiple of the identity solvers then know.

    Raises:
        ValueError: no variable, or two of one name; no parameter to train; batch-norm that tracks running statistics.
    """
    reject_running_statistics(model)
    start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    if not start:
        raise ValueError(
            "model: got no parameter that requires grad, expected some; call model.requires_grad_()"
        )
    meta: Params = {}
    domains: dict[str, Domain] = {}
    for variable in variables:
        entries = variable.meta(start)
        if twice := sorted(set(entries) & set(meta)):
            raise ValueError(f"variables: got {twice} twice, expected each hyperparameter once")
        meta |= entries
        domains |= variable.domains(list(entries))
    if not meta:
        raise ValueError("variables: got none, expected at least one hyperparameter")
    shaped = [v for v in variables if type(v).inputs is not Variable.inputs]
    if len(shaped) > 1:
        raise ValueError(f"variables: got {len(shaped)} that make the inputs, expected at most one")

    def call(params: Params, inputs: Tensor) -> Tensor:
        fixed = {name: p.detach() for name, p in model.named_parameters() if name not in params}
        outputs: Tensor = torch.func.functional_call(model, fixed | params, (inputs,))
        return outputs

    def outputs(params: Params, meta: Params, data: Any) -> Tensor:
        batch = _batch(data)
        return call(params, shaped[0].inputs(meta, batch) if shaped else batch["inputs"])

    def targets(data: Any) -> Tensor:
        batch = _batch(data)
        return shaped[0].targets(batch) if shaped else batch["targets"]

    def weights(meta: Params, losses: Tensor, data: Any) -> Tensor:
        batch = _batch(data) | {"targets": targets(data)}
        found = [v.weights(meta, losses, batch) for v in weighing]
        return torch.stack([w for w in found if w is not None]).prod(0)

    weighing = [v for v in variables if type(v).weights is not Variable.weights]
    parts = [v for v in variables if type(v).penalty is not Variable.penalty]
    known = penalty
    if penalty is None and len(parts) == 1 and parts[0].proximal is not None:
        known, parts = parts[0].proximal, []

    def penalties(params: Params, meta: Params) -> Tensor:
        found = [part.penalty(params, start, meta) for part in parts] + (
            [] if known is None else [known(params, meta)]
        )
        return torch.stack([value for value in found if value is not None]).sum()

    return TuningProblem(
        BilevelProblem(
            init=lambda meta, data: start,
            inner_loss=Composite(
                outputs,
                lambda z, data: loss(z, targets(data), reduction="none" if weighing else "mean"),
                penalties if parts else known,
                model,
                weights if weighing else None,
            ),
            outer_loss=lambda params, meta, data: loss(
                call(params, _batch(data)["inputs"]), _batch(data)["targets"], reduction="mean"
            ),
        ),
        meta,
        domains,
    )


def _batch(data: Any) -> Batch:
    if isinstance(data, dict):
        return data
    inputs, targets = data
    return {"inputs": inputs, "targets": targets}
