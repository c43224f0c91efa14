"""What people hand to tuning_problem and Tuner first, against a plain loop."""

from types import SimpleNamespace

import pytest
import torch
from reported.helpers import INNER, STEPS, assert_same, descend
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from metaimplicit import CG, Implicit, Stream, Tuner, Unrolled, hypergradient, tuning_problem
from metaimplicit.tuning import ClassWeights, ExampleWeights, WeightNetwork

BCE = F.binary_cross_entropy_with_logits


class Classifier(nn.Linear):
    def forward(self, input_ids):  # named as in Hugging Face's models and batches
        return super().forward(input_ids)


def loss_module(case):
    case.loss = nn.CrossEntropyLoss()


def loader_with_index(case):
    case.variable = ExampleWeights(8)
    case.train = (*case.train, torch.arange(8))
    case.weights = lambda meta, losses: meta["example_weights"]


def hugging_face_batch(case):
    case.train = dict(zip(("input_ids", "labels"), case.train, strict=True))


def multi_label_targets(case):
    """An example's loss is the mean over its labels."""
    targets = (torch.randn(8, 3) > 0).double()

    def weights(meta, losses):
        inputs = losses[:, None] * meta["weight_network.in"][:, 0]
        hidden = torch.relu(inputs + meta["weight_network.bias"])
        shift = meta["weight_network.shift"]
        return 2 * torch.sigmoid(hidden @ meta["weight_network.out"] + shift)

    case.loss = BCE
    case.variable = WeightNetwork(hidden=4)
    case.train = case.validation = (case.x, targets)
    case.losses = lambda outputs: BCE(outputs, targets, reduction="none").mean(1)
    case.weights = weights


def mixup_labels(case):
    """An example's weight is that of its classes, in their proportions."""
    soft = torch.randn(8, 3).softmax(1)
    case.train = (case.x, soft)
    case.losses = lambda outputs: F.cross_entropy(outputs, soft, reduction="none")
    case.weights = lambda meta, losses: soft @ meta["class_weights"]


def ignored_labels(case):
    """Examples labelled −100 do not count in m, as in the mean of F.cross_entropy."""
    kept = case.y[2:]
    case.train = (case.x, torch.cat([torch.full((2,), -100), kept]))
    case.losses = lambda outputs: F.cross_entropy(outputs[2:], kept, reduction="none")
    case.weights = lambda meta, losses: meta["class_weights"][kept]


def build(change):
    """Cross-entropy with a weight for each class, and what `change` makes of it.

    `loss`, `variable`, `train` and `validation` are handed over. `losses` and `weights` are ℓᵢ(z)
    and wᵢ(φ, ℓ) of f = (1/m) Σᵢ wᵢ ℓᵢ over the m examples that count.
    """
    x = torch.randn(8, 4)
    y = torch.randint(0, 3, (8,))
    case = SimpleNamespace(
        x=x,
        y=y,
        loss=F.cross_entropy,
        variable=ClassWeights(3),
        train=(x, y),
        validation=(torch.randn(8, 4), y),
        losses=lambda outputs: F.cross_entropy(outputs, y, reduction="none"),
        weights=lambda meta, losses: meta["class_weights"][y],
    )
    change(case)
    return case


@pytest.mark.parametrize(
    "change",
    [
        loss_module,
        loader_with_index,
        hugging_face_batch,
        multi_label_targets,
        mixup_labels,
        ignored_labels,
    ],
)
def test_the_tuner_takes_this_and_has_the_hypergradient_of_a_plain_loop(change):
    model = Classifier(4, 3)
    case = build(change)
    problem, meta, domains = tuning_problem(model, case.loss, [case.variable])
    meta = {name: (m + torch.rand_like(m)).requires_grad_() for name, m in meta.items()}

    def inner_loss(params):
        losses = case.losses(functional_call(model, params, case.x))
        return (case.weights(meta, losses.detach()) * losses).mean()

    inputs, targets = case.validation
    params = descend(inner_loss, dict(model.named_parameters()))[-1]
    outer = case.loss(functional_call(model, params, inputs), targets)
    expected = torch.autograd.grad(outer, list(meta.values()))

    data = Stream(lambda t: case.train if t < STEPS else case.validation)
    result = hypergradient(problem, meta, data, inner=INNER, method=Unrolled())
    for gradient, right in zip(result.grads.values(), expected, strict=True):
        assert_same(gradient, right)

    method = Implicit(CG(max_steps=5), damping=0.1)
    tuner = Tuner(problem, meta, inner=INNER, method=method, domains=domains)
    step = tuner.step(case.train, case.validation)
    assert_same(torch.tensor(step.outer_loss), outer.detach())
