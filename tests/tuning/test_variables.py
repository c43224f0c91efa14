"""Ready-made and user-made hyperparameters: losses by hand, hypergradients by differences."""

import pytest
import torch
import torch.nn.functional as F
from tiny_classification import (
    MODEL,
    PARAMS,
    TRAIN,
    VALIDATION,
    difference_quotient,
    make_problem,
    moved,
    random_like,
    slope,
    stream,
)
from torch.testing import assert_close

from metaimplicit import CG, GradientDescent, Implicit, hypergradient
from metaimplicit.tuning import (
    Augmentation,
    ClassWeights,
    ExampleWeights,
    GroupStructure,
    SyntheticData,
    Variable,
    WeightDecay,
    WeightNetwork,
)

EXAMPLE_WEIGHTS = torch.tensor([0.4, 0.2, 0.3, 0.6, 0.1, 0.5, 0.2, 0.3, 0.4]).double()


class Tempering(Variable):
    """A user's weights: wᵢ = exp(−τ ℓᵢ)."""

    def meta(self, params):
        return {"tau": torch.tensor(0.5, dtype=torch.float64)}

    def weights(self, meta, losses, batch):
        return (-meta["tau"] * losses).exp()


class Ridge(Variable):
    """A user's penalty: λ ‖θ − θ₀ + 0.1‖² with the parameters θ₀ of the model."""

    def meta(self, params):
        return {"ridge": params["0.weight"].new_tensor(0.2)}

    def penalty(self, params, start, meta):
        moves = [p - start[name] + 0.1 for name, p in params.items()]
        return meta["ridge"] * sum(move.square().sum() for move in moves)


class Scaling(Variable):
    """A user's inputs: xᵢ times a number for each feature."""

    def meta(self, params):
        return {"scale": torch.ones(5, dtype=torch.float64)}

    def inputs(self, meta, batch):
        return batch["inputs"] * meta["scale"]


VARIABLES = {
    "examples": [ExampleWeights(9)],
    "classes": [ClassWeights(3)],
    "both": [ExampleWeights(9, start=0.5), ClassWeights(3, start=2.0)],
    "decay": [WeightDecay(start=0.1)],
    "decay of tensors": [WeightDecay("tensor", start=0.1)],
    "decay of elements, from the start": [WeightDecay("element", start=0.1, center="start")],
    "groups": [GroupStructure("0.weight", 2)],
    "augmentation": [Augmentation()],
    "data": [SyntheticData(TRAIN["inputs"][:6], TRAIN["targets"][:6])],
    "examples and decay": [ExampleWeights(9), WeightDecay("tensor", start=0.1)],
    "a user's penalty": [Ridge()],
    "a user's inputs": [Scaling()],
    "a user's inputs and penalty, and decay": [Scaling(), Ridge(), WeightDecay(start=0.1)],
}


@pytest.mark.parametrize("name", VARIABLES)
def test_hypergradients_agree_with_finite_differences(name):
    problem, meta, _ = make_problem(*VARIABLES[name])
    inner = GradientDescent(steps=2, lr=0.5)
    direction = random_like(meta)
    expected = difference_quotient(problem, meta, inner, direction)
    for method in ("unrolled", "forward"):
        grads = hypergradient(
            problem,
            meta,
            stream(2),
            inner=inner,
            method=method,
        ).grads
        assert slope(grads, direction) == pytest.approx(expected, rel=1e-7), method


@pytest.mark.parametrize(
    "variable",
    [WeightNetwork(6), WeightNetwork(6, classes=3), Tempering()],
    ids=["network of the loss", "network of the loss and class", "a user's weights"],
)
def test_weights_of_losses_agree_with_finite_differences_over_one_step(variable):
    """The losses that they see are detached, so the derivative is whole over one step alone."""
    problem, meta, _ = make_problem(variable)
    meta = moved(meta, random_like(meta, seed=5), 0.3)
    inner = GradientDescent(steps=1, lr=0.5)
    direction = random_like(meta)
    grads = hypergradient(
        problem,
        meta,
        stream(1),
        inner=inner,
        method="unrolled",
    ).grads
    expected = difference_quotient(problem, meta, inner, direction)
    assert slope(grads, direction) == pytest.approx(expected, rel=1e-7)


def test_differences_leave_the_weights_of_a_network_as_second_derivatives_do():
    """Those are held against dense algebra in `test_weights_of_losses.py`."""
    problem, meta, _ = make_problem(WeightNetwork(6), WeightDecay(start=0.5))
    meta = moved(meta, random_like(meta, seed=5), 0.3) | {"weight_decay": meta["weight_decay"]}
    grads = [
        hypergradient(
            problem,
            meta,
            stream(20),
            inner=GradientDescent(steps=20, lr=0.5),
            method=Implicit(CG(max_steps=60), "hessian", batch=TRAIN, products=products),
        ).grads
        for products in ("double-backward", "finite-differences")
    ]
    for name, g in grads[0].items():
        assert_close(grads[1][name], g, rtol=1e-5, atol=1e-7, msg=name)


def plain_losses(data=TRAIN):
    """ℓᵢ of the model, `[m]`."""
    outputs = MODEL(data["inputs"]).detach()
    return F.cross_entropy(outputs, data["targets"], reduction="none")


def test_the_three_functions_of_a_user_enter_the_training_loss():
    tuned = make_problem(Tempering(), Ridge(), Scaling())
    meta = tuned.meta | {"scale": torch.linspace(0.5, 2.0, 5).double()}
    losses = plain_losses(TRAIN | {"inputs": TRAIN["inputs"] * meta["scale"]})
    weighed = ((-0.5 * losses).exp() * losses).mean()
    penalty = 0.2 * sum(p.numel() for p in PARAMS.values()) * 0.1**2
    assert_close(tuned.problem.inner_loss(PARAMS, meta, TRAIN), weighed + penalty)


def test_weights_multiply_and_the_loss_is_a_mean():
    tuned = make_problem(ExampleWeights(9), ClassWeights(3))
    class_weights = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    meta = {"example_weights": EXAMPLE_WEIGHTS, "class_weights": class_weights}
    weights = EXAMPLE_WEIGHTS[TRAIN["index"]] * class_weights[TRAIN["targets"]]
    assert_close(tuned.weights(PARAMS, meta, TRAIN), weights)
    expected = (weights * plain_losses()).mean()
    assert_close(tuned.problem.inner_loss(PARAMS, meta, TRAIN), expected)


def test_weights_of_synthetic_examples_go_by_their_own_numbers():
    labels = TRAIN["targets"][:9].flip(0)
    tuned = make_problem(SyntheticData(TRAIN["inputs"].flip(0), labels), ExampleWeights(9))
    meta = tuned.meta | {"example_weights": EXAMPLE_WEIGHTS}
    batch = TRAIN | {"index": torch.arange(9).flip(0)}
    losses = plain_losses({"inputs": TRAIN["inputs"].flip(0), "targets": labels})
    assert_close(tuned.weights(PARAMS, meta, batch), EXAMPLE_WEIGHTS)
    expected = (EXAMPLE_WEIGHTS * losses).mean()
    assert_close(tuned.problem.inner_loss(PARAMS, meta, batch), expected)


def test_a_weight_network_starts_at_one():
    tuned = make_problem(WeightNetwork(6, classes=3))
    ones = torch.ones(9, dtype=torch.float64)
    weights = tuned.weights(PARAMS, tuned.meta, TRAIN)
    assert_close(weights, ones, rtol=0, atol=1e-15)


def test_a_weight_network_is_a_function_of_the_loss_and_the_class():
    tuned = make_problem(WeightNetwork(6, classes=3))
    meta = moved(tuned.meta, random_like(tuned.meta))
    weights = tuned.weights(PARAMS, meta, TRAIN)
    for i, example_loss in enumerate(plain_losses()):
        one_hot = F.one_hot(TRAIN["targets"][i], 3).double()
        features = torch.cat([example_loss[None], one_hot])
        hidden = meta["weight_network.in"] @ features + meta["weight_network.bias"]
        output = hidden.clamp(min=0) @ meta["weight_network.out"] + meta["weight_network.shift"]
        assert_close(weights[i], 2 / (1 + (-output).exp()))


@pytest.mark.parametrize("classes", [None, 3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_weight_network_takes_losses_of_another_type(classes, dtype):
    variable = WeightNetwork(6, classes=classes)
    meta = moved(variable.meta(PARAMS), random_like(variable.meta(PARAMS)))
    losses = plain_losses().detach().to(dtype)
    expected = variable.weights(meta, losses.double(), TRAIN)
    assert_close(variable.weights(meta, losses, TRAIN), expected)


def test_the_weights_of_a_network_are_constants_of_the_inner_gradient():
    tuned = make_problem(WeightNetwork(6))
    meta = moved(tuned.meta, random_like(tuned.meta))
    weights = tuned.weights(PARAMS, meta, TRAIN)
    assert weights.std() > 0.1
    theta = {name: p.clone().requires_grad_() for name, p in PARAMS.items()}
    outputs = torch.func.functional_call(MODEL, theta, (TRAIN["inputs"],))
    losses = F.cross_entropy(outputs, TRAIN["targets"], reduction="none")
    expected = torch.autograd.grad((weights * losses).mean(), list(theta.values()))
    inner_loss = tuned.problem.inner_loss(theta, meta, TRAIN)
    gradient = torch.autograd.grad(inner_loss, list(theta.values()))
    assert_close(gradient, expected, rtol=1e-12, atol=1e-14)


def test_class_weights_of_synthetic_data_are_those_of_its_labels():
    data = SyntheticData(TRAIN["inputs"][:3], torch.tensor([2, 2, 1]))
    tuned = make_problem(data, ClassWeights(3))
    meta = tuned.meta | {"class_weights": torch.tensor([1.0, 2.0, 3.0])}
    assert tuned.weights(PARAMS, meta, TRAIN).tolist() == [3.0, 3.0, 2.0]


def test_synthetic_data_do_not_look_at_the_training_batch():
    data = SyntheticData(TRAIN["inputs"][:6], TRAIN["targets"][:6])
    problem, meta, _ = make_problem(data)
    expected = plain_losses({name: x[:6] for name, x in TRAIN.items()}).mean()
    assert_close(problem.inner_loss(PARAMS, meta, {}), expected)


def test_groups_are_penalised_by_a_smoothed_norm():
    w = torch.tensor([[3.0, 4.0, 0.0], [0.0, 0.0, 2.0]])
    members = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    structure = GroupStructure("w", 2, strength=0.5, smoothing=0.1)
    penalty = structure.penalty({"w": w}, {}, {"groups": members})
    expected = 0.5 * sum((square + 0.01) ** 0.5 for square in (25.0, 0.0, 0.0, 4.0))
    assert penalty.item() == pytest.approx(expected, rel=1e-6)


def test_decay_around_the_start_is_zero_there_and_quadratic_around_it():
    decay = WeightDecay("tensor", start=2.0, center="start")
    problem, meta, _ = make_problem(decay)
    plain = plain_losses().mean()
    assert_close(
        problem.inner_loss(PARAMS, meta, TRAIN),
        plain,
        rtol=0,
        atol=1e-15,
    )
    other = {name: p + 0.1 for name, p in PARAMS.items()}
    without = {name: torch.zeros_like(m) for name, m in meta.items()}
    with_decay = problem.inner_loss(other, meta, TRAIN)
    penalty = with_decay - problem.inner_loss(other, without, TRAIN)
    count = sum(p.numel() for p in PARAMS.values())
    expected = torch.tensor(0.5 * 2.0 * 0.01 * count, dtype=torch.float64)
    assert_close(penalty, expected)


def test_augmentation_is_a_function_of_the_index_of_the_batch():
    variable = Augmentation(start=0.5)
    meta = {name: torch.tensor(0.5).double() for name in variable.meta(PARAMS)}
    rng = torch.get_rng_state()
    augmented = variable.inputs(meta, TRAIN)
    assert torch.equal(augmented, variable.inputs(meta, TRAIN))
    assert torch.equal(rng, torch.get_rng_state())
    reordered = TRAIN | {"index": TRAIN["index"].flip(0)}
    assert not torch.equal(augmented, variable.inputs(meta, reordered))


def test_each_kind_of_augmentation_has_its_strength():
    variable = Augmentation()
    off = {name: torch.zeros((), dtype=torch.float64) for name in variable.meta(PARAMS)}
    one = torch.ones((), dtype=torch.float64)
    x = TRAIN["inputs"]
    assert torch.equal(variable.inputs(off, TRAIN), x)
    change = variable.inputs(off | {"augmentation.brightness": one}, TRAIN) - x
    assert (change - change[:, :1]).abs().max() < 1e-12
    contrast = variable.inputs(off | {"augmentation.contrast": one}, TRAIN)
    assert_close(contrast.mean(1), x.mean(1))
    alone = Augmentation(kinds=("noise",)).inputs({"augmentation.noise": one}, TRAIN)
    assert torch.equal(alone, variable.inputs(off | {"augmentation.noise": one}, TRAIN))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
@pytest.mark.parametrize("kind", ["noise", "brightness", "contrast"])
def test_augmentation_of_integers_is_refused(kind, dtype):
    variable = Augmentation(kinds=(kind,))
    batch = {"inputs": torch.full((2, 4), 100, dtype=dtype), "index": torch.arange(2)}
    with pytest.raises(ValueError, match=r"Augmentation: got inputs of .*expected real numbers"):
        variable.inputs(variable.meta(PARAMS), batch)


def test_augmentation_takes_the_number_of_one_example_in_any_shape():
    variable = Augmentation()
    meta = variable.meta(PARAMS)
    alone, in_a_row = (
        variable.inputs(meta, {"inputs": torch.zeros(1, 4), "index": index})
        for index in (torch.tensor(3), torch.tensor([3]))
    )
    assert torch.equal(alone, in_a_row)
    assert alone.any()


def test_augmentation_of_an_example_with_a_negative_number_is_refused():
    variable = Augmentation()
    batch = {"inputs": torch.zeros(2, 4), "index": torch.tensor([3, -1])}
    with pytest.raises(ValueError, match="Augmentation: got the number -1, expected numbers ≥ 0"):
        variable.inputs(variable.meta(PARAMS), batch)


@pytest.mark.parametrize("name", ["augmentation", "data", "examples"])
def test_validation_sees_the_plain_data_and_loss(name):
    problem, meta, _ = make_problem(*VARIABLES[name])
    plain = plain_losses(VALIDATION).mean()
    assert_close(problem.outer_loss(PARAMS, meta, VALIDATION), plain)


def test_decays_of_both_scopes_add_up():
    """A shared strength beside one for each tensor: each is read from its own entry."""
    variables = [WeightDecay(start=0.5, center="start"), WeightDecay("tensor", start=0.1)]
    problem, meta, _ = make_problem(*variables)
    start = problem.init(meta, TRAIN)
    params = moved(start, random_like(start, seed=3))
    expected = sum(
        0.25 * (p - start[name]).square().sum() + 0.05 * p.square().sum()
        for name, p in params.items()
    )
    outputs = torch.func.functional_call(MODEL, params, (TRAIN["inputs"],))
    loss = F.cross_entropy(outputs, TRAIN["targets"])
    assert_close(problem.inner_loss(params, meta, TRAIN), loss + expected)
