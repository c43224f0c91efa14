"""Batches of unusual types against a plain loop, and what cannot be read in the tuner's words."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from tuning_loop import INDEX, INNER, C, Y, draw, moved, plain_hypergradient

from metaimplicit import Tuner, tuning_problem
from metaimplicit.tuning import (
    ClassWeights,
    ExampleWeights,
    SyntheticData,
    WeightDecay,
    WeightNetwork,
)
from metaimplicit.tuning.batches import split_batch


def in_inference_mode(x):
    with torch.inference_mode():
        return x.clone()


def read_only(x):
    array = x.numpy().copy()
    array.flags.writeable = False
    return array


CONVERSIONS = {
    "arrays": lambda x: x.numpy(),
    "arrays that are read only": read_only,
    "arrays that run backwards": lambda x: np.flip(x.flip(0).numpy(), 0),
    "tensors of inference mode": in_inference_mode,
    "index and labels of 8 bits": lambda x: x if x.is_floating_point() else x.to(torch.uint8),
    "index and labels of 32 bits": lambda x: x if x.is_floating_point() else x.int(),
    "unsigned index and labels": lambda x: x if x.is_floating_point() else x.to(torch.uint16),
    "arrays of another byte order": lambda x: x.numpy().astype(x.numpy().dtype.newbyteorder()),
}


def assert_step_is_that_of_the_plain_loop(convert, mode=nullcontext):
    with mode():
        case = draw()
        tuned = tuning_problem(case.model, F.cross_entropy, [ExampleWeights(20)])
        start = moved({name: m.clone() for name, m in tuned.meta.items()})
        train = tuple(map(convert, (case.x, Y, INDEX)))
        validation = tuple(map(convert, (case.x_valid, Y)))
        meta = {name: m.detach() for name, m in start.items()}
        tuner = Tuner(tuned.problem, meta, inner=INNER, method="unrolled")
        step = tuner.step(list((train,) * 3), validation)

    case = draw()

    def mean(params, x, weights):
        losses = F.cross_entropy(x @ params["weight"].T + params["bias"], Y, reduction="none")
        return (weights * losses).mean()

    _, [expected] = plain_hypergradient(
        case.model,
        moved({"example_weights": torch.ones(20, dtype=torch.float64)}),
        inner_loss=lambda params, meta: mean(params, case.x, meta["example_weights"][INDEX]),
        outer_loss=lambda params: mean(params, case.x_valid, 1.0),
    )
    assert step.norm == pytest.approx(expected.norm().item(), rel=1e-10)


@pytest.mark.parametrize("name", CONVERSIONS)
def test_a_batch_of_these_types_is_that_of_tensors(name):
    assert_step_is_that_of_the_plain_loop(CONVERSIONS[name])


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_a_step_is_the_same_in_any_mode_of_autograd(mode):
    assert_step_is_that_of_the_plain_loop(lambda x: x, mode)


def test_synthetic_data_may_be_made_in_inference_mode():
    case, norms = draw(), []
    for convert in (lambda x: x, in_inference_mode):
        tuned = tuning_problem(
            case.model, F.cross_entropy, [SyntheticData(convert(case.x), convert(Y))]
        )
        tuner = Tuner(tuned.problem, tuned.meta, inner=INNER, method="unrolled")
        norms.append(tuner.step((case.x, Y), (case.x_valid, Y)).norm)
    assert norms[0] == norms[1] > 0


def test_arrays_of_text_stay_as_they_are():
    text = np.array(["one", "two"])
    batch = split_batch({"inputs": torch.ones(2), "targets": torch.ones(2), "text": text})
    assert batch["text"] is text


class Masked(nn.Linear):
    def forward(self, x, mask):
        return super().forward(x * mask)


X = torch.randn(8, 5)
REFUSALS = {
    "three parts, of which the last is no index": (
        Masked(5, C),
        (X, Y, torch.ones(8, 5)),
        ValueError,
        r"got torch.float32 of shape \(8, 5\) as its index.*\(\(first, second\), targets\)",
    ),
    "three parts, of which the last looks like an index": (
        Masked(5, C),
        (X, torch.ones(8, 5), Y),
        ValueError,
        r"got Tensor as the inputs of a model that takes \['x', 'mask'\]; write several inputs as "
        r"\(\(first, second\), targets\)",
    ),
    "another precision": (
        nn.Linear(5, C),
        (X.double(), Y),
        ValueError,
        "got inputs of torch.float64 for a model of torch.float32.*convert the inputs",
    ),
    "another precision in a convolution": (
        nn.Sequential(nn.Unflatten(1, (1, 5)), nn.Conv1d(1, C, 5), nn.Flatten()),
        (X.double(), Y),
        ValueError,
        "got inputs of torch.float64 for a model of torch.float32.*convert the inputs",
    ),
    "an index that is a mask": (nn.Linear(5, C), (X, Y, Y > 0), ValueError, "got torch.bool of"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_cannot_be_read_is_refused_with_what_to_do(name):
    model, batch, kind, message = REFUSALS[name]
    problem, meta, domains = tuning_problem(model, F.cross_entropy, [WeightDecay()])
    tuner = Tuner(problem, meta, domains=domains, inner=INNER, method="unrolled")
    with pytest.raises(kind, match=message):
        tuner.step(batch, batch)


@pytest.mark.parametrize(
    ("variable", "message"),
    [
        (ExampleWeights(4), "ExampleWeights: got numbers from 1 to 15, expected 0 to 3"),
        (ClassWeights(2), "ClassWeights: got numbers from 0 to 2, expected 0 to 1"),
        (WeightNetwork(3, classes=2), "WeightNetwork: got numbers from 0 to 2, expected 0 to 1"),
    ],
)
def test_a_number_without_a_weight_is_named(variable, message):
    case = draw()
    problem, meta, _ = tuning_problem(case.model, F.cross_entropy, [variable])
    with pytest.raises(IndexError, match=message):
        problem.inner_loss(problem.init(meta, None), meta, (case.x, Y, INDEX))


def test_a_type_error_of_the_model_itself_passes_unchanged():
    class Broken(nn.Linear):
        def forward(self, x):
            return super().forward(x) + "text"

    problem, meta, _ = tuning_problem(Broken(5, C), F.cross_entropy, [WeightDecay()])
    with pytest.raises(TypeError, match="unsupported operand"):
        problem.inner_loss(problem.init(meta, None), meta, (X, Y))
