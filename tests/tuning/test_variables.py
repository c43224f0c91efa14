"""Ready-made hyperparameters: their losses by hand, their hypergradients by finite differences."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tasks
from metaimplicit import (
    CG,
    MINRES,
    Dense,
    GradientDescent,
    Implicit,
    Interval,
    Proximal,
    Tuner,
    hypergradient,
    tuning_problem,
)
from metaimplicit.operators import Fisher
from metaimplicit.params import flatten
from metaimplicit.problem import Stream
from metaimplicit.tuning import (
    Augmentation,
    ClassWeights,
    ExampleWeights,
    GroupStructure,
    Scalar,
    SyntheticData,
    WeightDecay,
    WeightNetwork,
)


def network(seed=0, hidden=4):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, hidden), nn.Tanh(), nn.Linear(hidden, 3)).double()


def softmax_regression():
    torch.manual_seed(0)
    return nn.Linear(5, 3).double()


def batch(n, seed):
    draw = torch.Generator().manual_seed(seed)
    inputs = torch.randn(n, 5, generator=draw, dtype=torch.float64)
    targets = torch.arange(n) % 3
    return {"inputs": inputs, "targets": targets, "index": torch.randperm(n, generator=draw)}


TRAIN, VALIDATION = batch(9, 0), batch(6, 1)
DATA = Stream(lambda t: TRAIN if t < 2 else VALIDATION)
MODEL = network()
PARAMS = {name: p.detach() for name, p in MODEL.named_parameters()}
CROSS = [0.3, 0.1, -0.2, 0.5, 0.0, 0.4, -0.1, 0.2, 0.3]
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
}


def difference(problem, meta, inner, direction, h=1e-5):
    def loss(sign):
        moved = {name: m + sign * h * direction[name] for name, m in meta.items()}
        return hypergradient(problem, moved, DATA, inner=inner, method="unrolled").outer_loss.item()

    return (loss(1) - loss(-1)) / (2 * h)


def directions(meta, seed=3):
    draw = torch.Generator().manual_seed(seed)
    return {name: torch.randn(m.shape, generator=draw, dtype=m.dtype) for name, m in meta.items()}


@pytest.mark.parametrize("name", VARIABLES)
def test_hypergradients_agree_with_finite_differences(name):
    problem, meta, _ = tuning_problem(MODEL, F.cross_entropy, VARIABLES[name])
    inner = GradientDescent(steps=2, lr=0.5)
    direction = directions(meta)
    for method in ("unrolled", "forward"):
        found = hypergradient(problem, meta, DATA, inner=inner, method=method)
        along = sum((found.grads[n] * direction[n]).sum().item() for n in meta)
        assert along == pytest.approx(difference(problem, meta, inner, direction), rel=1e-7), method


def difference_of_weights(problem, meta, direction):
    data = Stream(lambda t: TRAIN if t < 1 else VALIDATION)
    inner, h = GradientDescent(steps=1, lr=0.5), 1e-5
    losses = [
        hypergradient(
            problem,
            {n: m + sign * h * direction[n] for n, m in meta.items()},
            data,
            inner=inner,
            method="unrolled",
        ).outer_loss.item()
        for sign in (1, -1)
    ]
    found = hypergradient(problem, meta, data, inner=inner, method="unrolled")
    return (losses[0] - losses[1]) / (2 * h), sum(
        (found.grads[n] * direction[n]).sum().item() for n in meta
    )


@pytest.mark.parametrize("classes", [None, 3])
def test_a_weight_network_agrees_with_finite_differences_over_one_step(classes):
    """The losses it sees are detached, so over one step alone is its derivative whole."""
    problem, meta, _ = tuning_problem(MODEL, F.cross_entropy, [WeightNetwork(6, classes=classes)])
    moved = {
        n: m + 0.3 * d for (n, m), d in zip(meta.items(), directions(meta, 5).values(), strict=True)
    }
    expected, found = difference_of_weights(problem, moved, directions(meta))
    assert found == pytest.approx(expected, rel=1e-7)


def test_weights_multiply_and_losses_are_means():
    tuned = tuning_problem(MODEL, F.cross_entropy, [ExampleWeights(9), ClassWeights(3)])
    meta = {
        "example_weights": torch.tensor(CROSS, dtype=torch.float64).abs() + 0.1,
        "class_weights": torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64),
    }
    losses = F.cross_entropy(MODEL(TRAIN["inputs"]), TRAIN["targets"], reduction="none").detach()
    weights = meta["example_weights"][TRAIN["index"]] * meta["class_weights"][TRAIN["targets"]]
    torch.testing.assert_close(tuned.weights(PARAMS, meta, TRAIN), weights)
    torch.testing.assert_close(
        tuned.problem.inner_loss(PARAMS, meta, TRAIN), (weights * losses).mean()
    )


def test_a_weight_network_starts_at_one_and_sees_losses_and_classes():
    tuned = tuning_problem(MODEL, F.cross_entropy, [WeightNetwork(6, classes=3)])
    torch.testing.assert_close(
        tuned.weights(PARAMS, tuned.meta, TRAIN),
        torch.ones(9, dtype=torch.float64),
        rtol=0,
        atol=1e-15,
    )
    entries = {
        n: m + d
        for (n, m), d in zip(tuned.meta.items(), directions(tuned.meta).values(), strict=True)
    }
    losses = F.cross_entropy(MODEL(TRAIN["inputs"]), TRAIN["targets"], reduction="none").detach()
    for i in range(9):
        one = F.one_hot(TRAIN["targets"][i], 3).double()
        hidden = (
            entries["weight_network.in"] @ torch.cat([losses[i : i + 1], one])
            + entries["weight_network.bias"]
        )
        value = 2 / (
            1
            + (
                -(
                    hidden.clamp(min=0) @ entries["weight_network.out"]
                    + entries["weight_network.shift"]
                )
            ).exp()
        )
        torch.testing.assert_close(tuned.weights(PARAMS, entries, TRAIN)[i], value)


def test_the_weights_of_a_network_are_constants_of_the_inner_gradient():
    problem, meta, _ = tuned = tuning_problem(MODEL, F.cross_entropy, [WeightNetwork(6)])
    meta = {n: m + d for (n, m), d in zip(meta.items(), directions(meta).values(), strict=True)}
    weights = tuned.weights(PARAMS, meta, TRAIN)
    assert weights.std() > 0.1
    theta = {name: p.clone().requires_grad_() for name, p in PARAMS.items()}
    outputs = torch.func.functional_call(MODEL, theta, (TRAIN["inputs"],))
    by_hand = (weights * F.cross_entropy(outputs, TRAIN["targets"], reduction="none")).mean()
    for loss in (by_hand, problem.inner_loss(theta, meta, TRAIN)):
        found = torch.autograd.grad(loss, list(theta.values()))
        if loss is by_hand:
            expected = found
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_classes_of_synthetic_data_are_its_own():
    data = SyntheticData(TRAIN["inputs"][:3], torch.tensor([2, 2, 1]))
    tuned = tuning_problem(MODEL, F.cross_entropy, [data, ClassWeights(3)])
    meta = tuned.meta | {"class_weights": torch.tensor([1.0, 2.0, 3.0])}
    assert tuned.weights(PARAMS, meta, TRAIN).tolist() == [3.0, 3.0, 2.0]


def test_groups_are_penalised_by_a_smoothed_norm():
    w, members = (
        torch.tensor([[3.0, 4.0, 0.0], [0.0, 0.0, 2.0]]),
        torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]),
    )
    penalty = GroupStructure("w", 2, strength=0.5, smoothing=0.1).penalty(
        {"w": w}, {}, {"groups": members}
    )
    by_hand = 0.5 * sum((square + 0.01) ** 0.5 for square in (25.0, 0.0, 0.0, 4.0))
    assert penalty.item() == pytest.approx(by_hand, rel=1e-6)


def test_gauss_newton_sees_the_weights():
    """Of softmax regression it is the Hessian."""
    problem, meta, _ = tuning_problem(
        softmax_regression(),
        F.cross_entropy,
        [ExampleWeights(9)],
        penalty=Proximal(0.1, center="zero"),
    )
    meta = {"example_weights": torch.linspace(0.1, 2.0, 9, dtype=torch.float64)}
    data = Stream(lambda t: TRAIN if t < 20 else VALIDATION)
    found = [
        hypergradient(
            problem,
            meta,
            data,
            inner=GradientDescent(steps=20, lr=0.5),
            method=Implicit(Dense(), curvature=curvature, batch=TRAIN),
        ).grads
        for curvature in ("hessian", "gauss-newton")
    ]
    torch.testing.assert_close(flatten(found[0], 0), flatten(found[1], 0), rtol=1e-10, atol=1e-14)
    assert flatten(found[0], 0).norm() > 1e-3


def test_solvers_know_a_scalar_decay():
    problem, meta, _ = tuning_problem(
        softmax_regression(), F.cross_entropy, [WeightDecay(start=0.25)]
    )
    options = {
        "inner": GradientDescent(steps=2, lr=0.5),
        "method": Implicit(CG(max_steps=50), batch=TRAIN),
    }
    scalar = hypergradient(problem, meta, DATA, **options)
    assert scalar.report.sigma == 0.25
    problem, meta, _ = tuning_problem(
        softmax_regression(), F.cross_entropy, [WeightDecay("element", start=0.25)]
    )
    elements = hypergradient(problem, meta, DATA, **options)
    assert elements.report.sigma == 0.0
    total = sum(g.sum() for g in elements.grads.values())
    torch.testing.assert_close(scalar.grads["weight_decay"], total, rtol=1e-9, atol=0)


def test_decay_from_the_start_leaves_it_alone():
    problem, meta, _ = tuning_problem(
        MODEL, F.cross_entropy, [WeightDecay("tensor", start=2.0, center="start")]
    )
    plain = F.cross_entropy(MODEL(TRAIN["inputs"]), TRAIN["targets"]).detach()
    torch.testing.assert_close(problem.inner_loss(PARAMS, meta, TRAIN), plain, rtol=0, atol=1e-15)
    moved = {name: p + 0.1 for name, p in PARAMS.items()}
    count = sum(p.numel() for p in PARAMS.values())
    cut = {n: torch.zeros_like(m) for n, m in meta.items()}
    penalty = problem.inner_loss(moved, meta, TRAIN) - problem.inner_loss(moved, cut, TRAIN)
    torch.testing.assert_close(penalty, torch.tensor(0.5 * 2.0 * 0.01 * count, dtype=torch.float64))


def test_augmentation_is_a_function_of_the_batch():
    variable = Augmentation(start=0.5)
    meta = {name: torch.full((), 0.5, dtype=torch.float64) for name in variable.meta(PARAMS)}
    before = torch.get_rng_state()
    once, again = variable.inputs(meta, TRAIN), variable.inputs(meta, TRAIN)
    assert torch.equal(once, again)
    assert torch.equal(before, torch.get_rng_state())
    assert not torch.equal(once, variable.inputs(meta, TRAIN | {"index": TRAIN["index"].flip(0)}))
    off = {name: torch.zeros_like(m) for name, m in meta.items()}
    assert torch.equal(variable.inputs(off, TRAIN), TRAIN["inputs"])
    bright = (
        variable.inputs(off | {"augmentation.brightness": torch.tensor(1.0).double()}, TRAIN)
        - TRAIN["inputs"]
    )
    assert (bright - bright[:, :1]).abs().max() < 1e-12
    contrast = variable.inputs(off | {"augmentation.contrast": torch.tensor(1.0).double()}, TRAIN)
    torch.testing.assert_close(contrast.mean(1), TRAIN["inputs"].mean(1))


def test_validation_sees_no_augmentation_and_no_synthetic_data():
    plain = F.cross_entropy(MODEL(VALIDATION["inputs"]), VALIDATION["targets"]).detach()
    for name in ("augmentation", "data", "examples"):
        problem, meta, _ = tuning_problem(MODEL, F.cross_entropy, VARIABLES[name])
        torch.testing.assert_close(problem.outer_loss(PARAMS, meta, VALIDATION), plain)


def test_a_loader_of_pairs_serves():
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(TRAIN["inputs"], TRAIN["targets"]), batch_size=3
    )
    problem, meta, domains = tuning_problem(MODEL, F.cross_entropy, [ClassWeights(3)])
    tuner = Tuner(
        problem, meta, inner=GradientDescent(steps=1, lr=0.1), method="cg", domains=domains
    )
    before = {name: p.clone() for name, p in MODEL.named_parameters()}
    tuner.fit(loader, [(VALIDATION["inputs"], VALIDATION["targets"])], steps=3)
    assert all(torch.equal(p, before[name]) for name, p in MODEL.named_parameters())
    assert not torch.equal(tuner.meta["class_weights"], meta["class_weights"])


def test_frozen_parameters_stay_out():
    model = network()
    model[0].requires_grad_(False)
    problem, _, _ = tuning_problem(model, F.cross_entropy, [ClassWeights(3)])
    assert sorted(problem.init({}, None)) == ["2.bias", "2.weight"]


def implicit(**options):
    problem, meta, _ = tuning_problem(MODEL, F.cross_entropy, [ClassWeights(3)])
    method = Implicit(CG(), batch=TRAIN, damping=0.1, **options)
    return hypergradient(problem, meta, DATA, inner=GradientDescent(steps=2), method=method)


def test_bad_arguments_are_refused():
    def made(*variables, model=MODEL, loss=F.cross_entropy):
        return tuning_problem(model, loss, variables)

    with pytest.raises(ValueError, match="variables: got none"):
        made()
    with pytest.raises(ValueError, match=r"variables: got \['class_weights'\] twice"):
        made(ClassWeights(3), ClassWeights(3))
    with pytest.raises(ValueError, match="variables: got 2 that make the inputs"):
        made(Augmentation(), SyntheticData(TRAIN["inputs"], TRAIN["targets"]))
    with pytest.raises(ValueError, match=r"BatchNorm1d.*tracks running statistics"):
        made(ClassWeights(3), model=nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3)))
    with pytest.raises(ValueError, match="no parameter that requires grad"):
        made(ClassWeights(3), model=network().requires_grad_(False))
    with pytest.raises(ValueError, match="SyntheticData labels: got 2, expected 3"):
        SyntheticData(torch.zeros(3, 5), torch.zeros(2))
    with pytest.raises(
        ValueError, match="scope: got 'layer', expected one of scalar, tensor, element"
    ):
        WeightDecay("layer")
    with pytest.raises(ValueError, match="center: got 'meta'"):
        WeightDecay(center="meta")
    with pytest.raises(ValueError, match="kinds: got 'hue'"):
        Augmentation(kinds=("hue",))
    with pytest.raises(ValueError, match="GroupStructure parameter: got 'w'"):
        made(GroupStructure("w", 2))
    with pytest.raises(ValueError, match="KFAC: got an inner loss with weights"):
        implicit(curvature="kfac")
    with pytest.raises(ValueError, match="Fisher: got an inner loss with weights"):
        implicit(curvature=Fisher)
    with pytest.raises(ValueError, match="a problem without any, expected a variable that weighs"):
        made(WeightDecay()).weights(PARAMS, {}, TRAIN)
    problem, meta, _ = made(ExampleWeights(9))
    with pytest.raises(ValueError, match="ExampleWeights: got a batch without 'index'"):
        problem.inner_loss(PARAMS, meta, (TRAIN["inputs"], TRAIN["targets"]))
    problem, meta, _ = made(ClassWeights(3), loss=lambda z, y, reduction: F.cross_entropy(z, y))
    with pytest.raises(
        ValueError, match=r"weights: got shape \(9,\) for losses \(\), expected \[m\] for both"
    ):
        problem.inner_loss(PARAMS, meta, TRAIN)


def test_an_inner_step_size_asked_of_an_implicit_method_names_those_that_can():
    from metaimplicit import FromMeta

    problem, meta, domains = tuning_problem(MODEL, F.cross_entropy, [Scalar("lr", 0.1)])
    tuner = Tuner(
        problem,
        meta,
        inner=GradientDescent(steps=1, lr=FromMeta("lr")),
        method="cg",
        domains=domains,
    )
    with pytest.raises(ValueError, match=r"cannot give the gradient of meta\['lr'\].*'unrolled'"):
        tuner.step(TRAIN, VALIDATION)


def test_networks_are_taken_by_gauss_newton():
    problem, meta, _ = tuning_problem(MODEL, F.cross_entropy, [ClassWeights(3)])
    inner = GradientDescent(steps=1, lr=0.1)
    assert (
        Tuner(problem, meta, inner=inner).step(TRAIN, VALIDATION).report.curvature == "gauss-newton"
    )
    method = Implicit(MINRES(), curvature="hessian")
    assert (
        Tuner(problem, meta, inner=inner, method=method).step(TRAIN, VALIDATION).report.curvature
        == "hessian"
    )


def test_domains_hold_their_starts():
    problem, meta, domains = tuning_problem(
        MODEL, F.cross_entropy, [Scalar("momentum", 1.0, Interval(0, 1))]
    )
    with pytest.raises(
        ValueError, match=r"meta\['momentum'\].*got 1, expected numbers between 0 and 1"
    ):
        Tuner(problem, meta, inner=GradientDescent(), domains=domains)


def test_batches_of_a_set_name_its_examples():
    examples = tasks.Examples(TRAIN["inputs"], TRAIN["targets"])
    problem, meta, domains = tuning_problem(MODEL, F.cross_entropy, [ExampleWeights(9)])
    tuner = Tuner(
        problem, meta, inner=GradientDescent(steps=1, lr=0.1), method="cg", domains=domains
    )
    result = tuner.step([tasks.Batches(examples, 4, 0)(0)] * 2, VALIDATION)
    moved = (tuner.meta["example_weights"] != 1).nonzero().squeeze(1)
    assert result.applied
    assert moved.tolist() == sorted(tasks.Batches(examples, 4, 0)(0)["index"].tolist())
