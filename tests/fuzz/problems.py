"""A case as a bilevel problem in plain torch, in float64, one task at a time."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy, deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd import grad

from fuzz.case import Case
from fuzz.losses import build_loss, curved_loss, draw_targets
from fuzz.models import build_model, draw_inputs, plain_batch_norm

Values = dict[str, Tensor]


@dataclass(frozen=True)
class Task:
    """The data of one task."""

    inputs: Tensor
    targets: Tensor
    query_inputs: Tensor
    query_targets: Tensor


def draw_data(case: Case) -> Task:
    """Support and query sets of all tasks, float64 (rounded to the case's dtype) and int64."""
    generator = torch.Generator().manual_seed(1_000_003 * case.seed + case.index)
    parts = []
    for _ in range(2):
        inputs = draw_inputs(case, generator)
        parts += [inputs, draw_targets(case, generator)]
    dtype = getattr(torch, case.dtype)
    return Task(*(p.to(dtype).double() if p.is_floating_point() else p for p in parts))


def initial_meta(case: Case, model: nn.Module) -> Values:
    """φ by name: what the case differentiates with respect to."""
    trainable = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    number = next(iter(trainable.values())).new_tensor
    numbers = {
        "start": {},
        "lr": {"log_lr": number(case.lr).log()},
        "proximal": {"log_proximal": number(case.proximal or 1.0).log()},
        "decay": {"log_decay": number(case.proximal or 1.0).log()},
        "gain": {"gain": number(1.3)},
    }[case.meta]
    starts = case.door == "learner" or case.meta == "start"
    return {**(trainable if starts else {}), **numbers}


class Plain:
    """f, g and θ₀ of a case as functions of (θ, φ) for one task.

    Attributes:
        case: the case.
        model: the network, float64.
        tasks: the data, one entry a task.
        meta: φ.
        adapted: the names in θ.
    """

    def __init__(self, case: Case) -> None:
        self.case = case
        self.model = build_model(case, torch.float64, plain_batch_norm)
        self.meta = initial_meta(case, self.model)
        data = draw_data(case)
        rows = zip(data.inputs, data.targets, data.query_inputs, data.query_targets, strict=True)
        self.tasks = [Task(*row) for row in rows]
        trainable = {n: p.detach() for n, p in self.model.named_parameters() if p.requires_grad}
        self.adapted = [n for n in trainable if case.adapt == "all" or is_head(n)]
        self._fixed = {name: trainable[name] for name in self.adapted}
        self._loss = build_loss(case, torch.float64)
        self._curved = curved_loss(case, torch.float64)

    def start(self, phi: Values) -> Values:
        """θ₀."""
        return {name: phi.get(name, fixed) for name, fixed in self._fixed.items()}

    def lr(self, phi: Values) -> float | Tensor:
        return phi["log_lr"].exp() if "log_lr" in phi else self.case.lr

    def inner(self, theta: Values, phi: Values, task: Task) -> Tensor:
        """f, its penalty included; the inner optimiser's weight decay is not."""
        outputs = self.outputs(theta, phi, task.inputs)
        return self._loss(outputs, task.targets) + self.penalty(theta, phi)

    def outer(self, theta: Values, phi: Values, task: Task) -> Tensor:
        """g."""
        return self._loss(self.outputs(theta, phi, task.query_inputs), task.query_targets)

    def outputs(self, theta: Values, phi: Values, inputs: Tensor) -> Tensor:
        return self._gain(phi) * self._call(self.model, theta, phi, inputs)

    def scores(self, theta: Values, phi: Values, inputs: Tensor) -> Tensor:
        """The outputs before a log-softmax."""
        values = {n.removeprefix("body."): v for n, v in {**phi, **theta}.items()}
        return self._gain(phi) * self._call(self.model.body, values, {}, inputs)

    def output_hessian(self, scores: Tensor, task: Task) -> Tensor:
        """The Hessian of f less its penalty in the scores, `[m·d, m·d]` by their flat layout."""
        z = scores.detach().clone().requires_grad_()
        (slope,) = grad(self._curved(z, task.targets), z, create_graph=True)
        if not slope.requires_grad:
            return torch.zeros(z.numel(), z.numel(), dtype=torch.float64)
        rows = [grad(s, z, retain_graph=True)[0].flatten() for s in slope.flatten()]
        return torch.stack(rows)

    def strength(self, phi: Values) -> float | Tensor:
        """λ."""
        for name in ("log_proximal", "log_decay"):
            if name in phi:
                return phi[name].exp()
        return self.case.proximal

    def penalty(self, theta: Values, phi: Values) -> float | Tensor:
        """λ/2 ‖θ − c‖², c = φ where φ holds the start and 0 elsewhere."""
        shifts = [p - phi[name] if name in phi else p for name, p in theta.items()]
        squares = [shift.square().sum() for shift in shifts]
        return 0.5 * self.strength(phi) * torch.stack(squares).sum()

    def with_start_moved(self, distance: float) -> Plain:
        """The same problem from another fixed θ₀."""
        other = copy(self)
        size = sum(p.numel() for p in self._fixed.values()) ** 0.5
        other._fixed = {name: p + distance / size for name, p in self._fixed.items()}
        return other

    def copy_with(self, phi: Values) -> tuple[nn.Module, Callable[[Task], Tensor]]:
        """A copy of the model that holds θ₀, and f as a function of its present parameters."""
        model = deepcopy(self.model)
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_({**phi, **self.start(phi)}.get(name, p))

        def loss(task: Task) -> Tensor:
            theta = {n: p for n, p in model.named_parameters() if n in self.adapted}
            outputs = self._gain(phi) * model(task.inputs)
            return self._loss(outputs, task.targets) + self.penalty(theta, phi)

        return model, loss

    @staticmethod
    def _gain(phi: Values) -> float | Tensor:
        return phi.get("gain", 1.0)

    @staticmethod
    def _call(model: nn.Module, theta: Values, phi: Values, inputs: Tensor) -> Tensor:
        names = dict(model.named_parameters())
        values = {n: v for n, v in {**phi, **theta}.items() if n in names}
        return torch.func.functional_call(model, values, (inputs,))


def is_head(name: str) -> bool:
    """Whether a parameter belongs to the last layer, by its name in the model."""
    return name.startswith(("body.head.", "body.4.", "body.weight", "body.bias"))
