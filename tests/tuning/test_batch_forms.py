"""Batches of every form, and models that take several inputs and return more than a tensor."""

from collections import UserDict, namedtuple
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tuning_loop import assert_tunes

from metaimplicit import GradientDescent, Tuner, tuning_problem
from metaimplicit.tuning import HOAG, Augmentation, ExampleWeights, WeightDecay
from metaimplicit.tuning.batches import split_batch

M = 7
torch.manual_seed(0)
X = torch.randn(M, 4, dtype=torch.float64)
GATE = torch.rand(M, 4, dtype=torch.float64)
Y = torch.randint(0, 3, (M,))
INDEX = torch.tensor([3, 0, 9, 2, 5, 1, 6])
X_VALID = torch.randn(5, 4, dtype=torch.float64)
Y_VALID = torch.randint(0, 3, (5,))


class Gated(nn.Module):
    """A model of one input, or of two."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3).double()

    def forward(self, input_ids, attention_mask=None):
        return self.linear(input_ids if attention_mask is None else input_ids * attention_mask)


class Example(NamedTuple):
    label: Tensor  # the order of the fields does not matter
    image: Tensor
    index: Tensor


@dataclass
class Item:
    idx: Tensor
    input_ids: Tensor
    attention_mask: Tensor
    y: Tensor


class Encoding(UserDict):
    """Behaves as the batches of Hugging Face: a mapping that is no dict."""


Pair = namedtuple("Pair", "first second third")

# The batch, and whether it has the second input.
FORMS = {
    "a triple": ((X, Y, INDEX), False),
    "a list of three": ([X, Y, INDEX], False),
    "a dict of ours": ({"inputs": X, "targets": Y, "index": INDEX}, False),
    "a dict with more": ({"inputs": X, "targets": Y, "index": INDEX, "labels": None}, False),
    "one input of any name": ({"pixel_values": X, "labels": Y, "idx": INDEX}, False),
    "inputs by name": (
        {"attention_mask": GATE, "input_ids": X, "labels": Y, "index": INDEX},
        True,
    ),
    "a mapping": (
        Encoding({"attention_mask": GATE, "input_ids": X, "label": Y, "idx": INDEX}),
        True,
    ),
    "two inputs": (((X, GATE), Y, INDEX), True),
    "a list of two inputs": ([[X, GATE], Y, INDEX], True),
    "a dict of inputs": (({"attention_mask": GATE, "input_ids": X}, Y, INDEX), True),
    "a named tuple": (Example(image=X, label=Y, index=INDEX), False),
    "a named tuple by position": (Pair(X, Y, INDEX), False),
    "a dataclass": (Item(idx=INDEX, input_ids=X, attention_mask=GATE, y=Y), True),
    "int32 numbers": ((X, Y, INDEX.int()), False),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_batch_of_any_form_has_the_hypergradient_of_a_plain_loop(form):
    batch, has_gate = FORMS[form]
    torch.manual_seed(1)
    model = Gated()
    x = X * GATE if has_gate else X

    def inner_loss(params, meta):
        logits = x @ params["linear.weight"].T + params["linear.bias"]
        total = 0.0
        for i in range(M):
            loss = logits[i].logsumexp(0) - logits[i, Y[i]]
            total = total + meta["example_weights"][INDEX[i]] * loss
        return total / M

    def outer_loss(params):
        logits = X_VALID @ params["linear.weight"].T + params["linear.bias"]
        return (logits.logsumexp(1) - logits[range(5), Y_VALID]).mean()

    assert_tunes(
        model,
        F.cross_entropy,
        [ExampleWeights(10)],
        batch,
        (X_VALID, Y_VALID),
        inner_loss=inner_loss,
        outer_loss=outer_loss,
    )


def test_one_batch_as_a_list_is_no_list_of_batches():
    """K = 1 wants two batches, which [inputs, targets] is not."""
    steps = {}
    for name, batch in {"tuple": (X, Y), "list": [X, Y]}.items():
        torch.manual_seed(0)
        problem, meta, domains = tuning_problem(Gated(), F.cross_entropy, [WeightDecay(start=0.1)])
        tuner = Tuner(problem, meta, domains=domains, inner=GradientDescent(steps=1))
        steps[name] = tuner.step(batch, batch)
        expected = tuner.step([batch, batch], batch)
        assert expected.applied
    assert steps["list"].outer_loss == steps["tuple"].outer_loss
    assert steps["list"].norm == steps["tuple"].norm


def test_a_model_of_one_dict_or_tuple_receives_it_whole():
    class OfPair(nn.Linear):
        def forward(self, pair):
            return super().forward(pair[0] + pair[1])

    class OfDict(nn.Linear):
        def forward(self, batch):
            return super().forward(batch["a"])

    for model, inputs in ((OfPair(4, 3), (X, GATE)), (OfDict(4, 3), {"a": X})):
        model.double()
        problem, meta, _ = tuning_problem(model, F.cross_entropy, [WeightDecay(start=0.0)])
        params = dict(model.named_parameters())
        expected = F.cross_entropy(model(inputs), Y)
        for batch in ((inputs, Y), {"inputs": inputs, "targets": Y}):
            torch.testing.assert_close(problem.outer_loss(params, meta, batch), expected)


def test_augmentation_finds_the_one_input_under_its_name():
    variable = Augmentation()
    meta = {name: torch.tensor(0.3).double() for name in variable.meta({"w": X})}
    batch = split_batch({"pixel_values": X, "labels": Y, "index": INDEX})
    expected = variable.inputs(meta, split_batch((X, Y, INDEX)))
    assert torch.equal(variable.inputs(meta, batch)["pixel_values"], expected)
    with pytest.raises(ValueError, match="Augmentation: got tuple as inputs, expected a tensor"):
        variable.inputs(meta, split_batch(((X, GATE), Y, INDEX)))


def test_augmentation_of_inputs_that_are_single_numbers_has_no_contrast():
    """Their mean is the number itself, so the other two draws are all that is added."""
    x = X[:, 0]
    variable = Augmentation()
    meta = {name: torch.tensor(0.3).double() for name in variable.meta({"w": X})}
    one_by_one = variable.inputs(meta, split_batch((x, Y, INDEX)))
    without = variable.inputs(
        meta | {"augmentation.contrast": torch.tensor(9.0)}, split_batch((x, Y, INDEX))
    )
    assert torch.equal(one_by_one, without)
    assert not torch.equal(one_by_one, x)


class Returning(nn.Linear):
    """A linear model that returns its logits in some structure."""

    def __init__(self, wrap):
        super().__init__(4, 3)
        self.double()
        self.wrap = wrap

    def forward(self, x):
        return self.wrap(super().forward(x), x)


@dataclass
class Output:
    loss: None
    logits: Tensor
    hidden: Tensor


@dataclass
class Scores:
    scores: Tensor
    hidden: Tensor


Both = namedtuple("Both", "hidden logits")

RETURNS = {
    "a tuple": lambda z, x: (z, x),
    "a list": lambda z, x: [z, x],
    "a named tuple with logits": lambda z, x: Both(x, z),
    "a dict with logits": lambda z, x: {"hidden": x, "logits": z},
    "a dict without": lambda z, x: {"scores": z, "hidden": x},
    "a mapping": lambda z, x: Encoding({"loss": None, "logits": z}),
    "a dataclass with logits": lambda z, x: Output(None, z, x),
    "a dataclass without": lambda z, x: Scores(z, x),
}


@pytest.mark.parametrize(
    ("returned", "method"),
    [*((name, "unrolled") for name in RETURNS), ("a tuple", "cg"), ("a dict with logits", "cg")],
)
def test_the_outputs_are_the_logits_or_the_first_part(returned, method):
    steps = []
    for wrap in (RETURNS[returned], lambda z, x: z):
        torch.manual_seed(2)
        model = Returning(wrap)
        problem, meta, domains = tuning_problem(model, nn.CrossEntropyLoss(), [ExampleWeights(10)])
        inner = GradientDescent(steps=2, lr=0.3)
        tuner = Tuner(problem, meta, domains=domains, inner=inner, method=method)
        steps.append((tuner.step((X, Y, INDEX), (X_VALID, Y_VALID)), tuner.meta))
    assert steps[0][0].outer_loss == steps[1][0].outer_loss
    assert steps[0][0].norm == steps[1][0].norm > 0


@pytest.mark.parametrize("weighed", [False, True])
def test_a_loss_that_takes_all_outputs_receives_them(weighed):
    """Its part of the hidden layer would be missing otherwise."""
    torch.manual_seed(3)
    model = Returning(lambda z, x: (z, z.square()))

    def loss(outputs, targets, reduction="mean"):
        logits, penalty = outputs
        losses = F.cross_entropy(logits, targets, reduction="none") + penalty.sum(1)
        return losses if reduction == "none" else losses.mean()

    def inner_loss(params, meta):
        z = X @ params["weight"].T + params["bias"]
        losses = z.logsumexp(1) - z[range(M), Y] + z.square().sum(1)
        if weighed:
            return (meta["example_weights"][INDEX] * losses).mean()
        squares = sum(p.square().sum() for p in params.values())
        return losses.mean() + 0.5 * meta["weight_decay"] * squares

    def outer_loss(params):
        z = X_VALID @ params["weight"].T + params["bias"]
        return (z.logsumexp(1) - z[range(5), Y_VALID] + z.square().sum(1)).mean()

    assert_tunes(
        model,
        loss,
        [ExampleWeights(10) if weighed else WeightDecay()],
        (X, Y, INDEX),
        (X_VALID, Y_VALID),
        inner_loss=inner_loss,
        outer_loss=outer_loss,
    )


def problem_of(model):
    return tuning_problem(model, F.cross_entropy, [ExampleWeights(10)])


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (X, "batch: got a Tensor, expected .inputs, targets."),
        (None, "batch: got a NoneType"),
        ((X,), "batch: got a tuple of 1"),
        ((X, GATE, Y, INDEX), r"batch: got a tuple of 4.*write several inputs as \(\(first, sec"),
        ((X, GATE, X), r"got torch.float64 of shape \(7, 4\) as its index, expected the numbers"),
        ((X, Y, [1, 2]), "batch: got list as its index"),
        ({"x": X}, "one with the entries .'inputs'., expected one with targets; its name is one"),
        ({"labels": Y}, "with the entries .'targets'., expected one with inputs"),
        ({"x": X, "y": Y, "label": Y}, r"got the entries \['label', 'y'\], of which each may be"),
        (
            {"input_ids": X, "mask": GATE, "labels": Y},
            r"got the inputs \['input_ids', 'mask'\] for a model that takes "
            r"\['input_ids', 'attention_mask'\]",
        ),
        ((X, Y), "ExampleWeights: got a batch without 'index'.*third part of a tuple"),
    ],
)
def test_a_batch_that_cannot_be_read_is_refused(batch, message):
    problem, meta, _ = problem_of(Gated())
    params = problem.init(meta, None)
    with pytest.raises(ValueError, match=message):
        problem.inner_loss(params, meta, batch)


def test_a_model_that_returns_no_tensor_is_refused():
    model = Returning(lambda z, x: ("logits", z))
    problem, meta, _ = problem_of(model)
    with pytest.raises(ValueError, match="model: got a call that returns tuple, expected a tensor"):
        problem.inner_loss(problem.init(meta, None), meta, (X, Y, INDEX))


def test_a_list_of_another_length_says_how_one_batch_is_written():
    problem, meta, domains = problem_of(Gated())
    tuner = Tuner(problem, meta, domains=domains, inner=GradientDescent(steps=3))
    with pytest.raises(ValueError, match=r"train: got a list of 2 batches, expected 4.*a tuple"):
        tuner.step([(X, Y, INDEX)] * 2, (X, Y))


@pytest.mark.parametrize("meta", [{}, {"depth": torch.tensor(3)}])
@pytest.mark.parametrize(
    "build",
    [
        lambda problem, meta: HOAG(problem, meta, (X, Y), (X, Y)),
        lambda problem, meta: Tuner(problem, meta, inner=GradientDescent(steps=1)),
    ],
    ids=["HOAG", "Tuner"],
)
def test_hyperparameters_without_a_real_number_are_refused(build, meta):
    problem, _, _ = problem_of(Gated())
    with pytest.raises(ValueError, match=r"meta: got .*expected at least one floating-point tens"):
        build(problem, meta)
