"""The problem that `tuning_problem` makes: its curvature, its use by the tuner, bad arguments."""

import math

import pytest
import torch
import torch.nn.functional as F
from tiny_classification import (
    MODEL,
    PARAMS,
    TRAIN,
    VALIDATION,
    make_problem,
    network,
    random_like,
    softmax_regression,
    stream,
)
from torch import nn
from torch.testing import assert_close

import tasks
from metaimplicit import (
    CG,
    Dense,
    FromMeta,
    GradientDescent,
    Implicit,
    Proximal,
    Tuner,
    hypergradient,
    tuning_problem,
)
from metaimplicit.operators import Fisher
from metaimplicit.params import flatten
from metaimplicit.solvers import MINRES
from metaimplicit.tuning import (
    Augmentation,
    ClassWeights,
    ExampleWeights,
    GroupStructure,
    Interval,
    Scalar,
    SyntheticData,
    WeightDecay,
    WeightNetwork,
)

INNER = GradientDescent(steps=1, lr=0.1)


def make_tuner(*variables, **options):
    problem, meta, domains = make_problem(*variables)
    return Tuner(
        problem,
        meta,
        **{"domains": domains, "inner": INNER, **options},
    )


def test_gauss_newton_and_fisher_see_the_weights():
    """For softmax regression both are the Hessian."""
    penalty = Proximal(0.1, center="zero")
    model = softmax_regression()
    problem, _, _ = make_problem(
        ExampleWeights(9),
        model=model,
        penalty=penalty,
    )
    meta = {"example_weights": torch.linspace(0.1, 2.0, 9, dtype=torch.float64)}
    inner = GradientDescent(steps=20, lr=0.5)
    results = {}
    for curvature in ("hessian", "gauss-newton", Fisher):
        method = Implicit(Dense(), curvature=curvature, batch=TRAIN)
        grads = hypergradient(
            problem,
            meta,
            stream(20),
            inner=inner,
            method=method,
        ).grads
        results[curvature] = flatten(grads, 0)
    for curvature in ("gauss-newton", Fisher):
        assert_close(
            results["hessian"],
            results[curvature],
            rtol=1e-10,
            atol=1e-14,
        )
    assert results["hessian"].norm() > 1e-3


def test_solvers_know_one_scalar_decay_as_a_multiple_of_the_identity():
    inner = GradientDescent(steps=2, lr=0.5)
    method = Implicit(CG(max_steps=50), batch=TRAIN)
    results = {}
    for scope in ("scalar", "element"):
        decay = WeightDecay(scope, start=0.25)
        problem, meta, _ = make_problem(decay, model=softmax_regression())
        results[scope] = hypergradient(problem, meta, stream(2), inner=inner, method=method)
    assert results["scalar"].report.sigma == 0.25
    assert results["element"].report.sigma == 0.0
    total = sum(g.sum() for g in results["element"].grads.values())
    grad = results["scalar"].grads["weight_decay"]
    assert_close(grad, total, rtol=1e-9, atol=0)


def test_beside_another_penalty_a_scalar_decay_is_added_to_it():
    fixed = Proximal(0.3, center="zero")
    decay = WeightDecay(start=0.2)
    problem, meta, _ = make_problem(decay, penalty=fixed)
    squares = sum(p.square().sum() for p in PARAMS.values())
    plain = F.cross_entropy(MODEL(TRAIN["inputs"]), TRAIN["targets"]).detach()
    expected = plain + 0.5 * (0.3 + 0.2) * squares
    assert_close(problem.inner_loss(PARAMS, meta, TRAIN), expected)


def test_a_loader_of_pairs_serves_and_the_model_is_not_changed():
    data = torch.utils.data.TensorDataset(TRAIN["inputs"], TRAIN["targets"])
    loader = torch.utils.data.DataLoader(data, batch_size=3)
    tuner = make_tuner(ClassWeights(3), method="cg")
    start = tuner.meta["class_weights"].clone()
    before = {name: p.clone() for name, p in MODEL.named_parameters()}
    tuner.fit(
        loader,
        [(VALIDATION["inputs"], VALIDATION["targets"])],
        steps=3,
    )
    assert all(torch.equal(p, before[name]) for name, p in MODEL.named_parameters())
    assert not torch.equal(tuner.meta["class_weights"], start)


def test_batches_of_a_task_name_the_examples_whose_weights_move():
    examples = tasks.Examples(TRAIN["inputs"], TRAIN["targets"])
    batch = tasks.Batches(examples, 4, 0)(0)
    tuner = make_tuner(ExampleWeights(9), method="cg")
    assert tuner.step([batch] * 2, VALIDATION).applied
    moved = (tuner.meta["example_weights"] != 1).nonzero().squeeze(1)
    assert moved.tolist() == sorted(batch["index"].tolist())


def test_frozen_parameters_do_not_adapt():
    model = network()
    model[0].requires_grad_(False)
    problem, _, _ = make_problem(ClassWeights(3), model=model)
    assert sorted(problem.init({}, None)) == ["2.bias", "2.weight"]


def test_the_tuner_takes_gauss_newton_for_a_network_unless_a_curvature_is_named():
    default = make_tuner(ClassWeights(3)).step(TRAIN, VALIDATION)
    assert default.report.curvature == "gauss-newton"
    method = Implicit(MINRES(), curvature="hessian")
    named = make_tuner(ClassWeights(3), method=method).step(TRAIN, VALIDATION)
    assert named.report.curvature == "hessian"


def test_an_implicit_method_refuses_an_inner_step_size_and_names_those_that_can():
    inner = GradientDescent(steps=1, lr=FromMeta("lr"))
    tuner = make_tuner(Scalar("lr", 0.1), inner=inner, method="cg")
    with pytest.raises(ValueError, match=r"cannot give the gradient of meta\['lr'\].*'unrolled'"):
        tuner.step(TRAIN, VALIDATION)


def test_a_start_outside_its_domain_is_refused():
    message = r"meta\['momentum'\].*got 1, expected numbers between 0 and 1"
    with pytest.raises(ValueError, match=message):
        make_tuner(Scalar("momentum", 1.0, Interval(0, 1)))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: SyntheticData(torch.zeros(3, 5), torch.zeros(2)),
            "SyntheticData labels: got 2, expected 3",
        ),
        (
            lambda: WeightDecay("layer"),
            "scope: got 'layer', expected one of scalar, tensor, element",
        ),
        (
            lambda: SyntheticData(torch.zeros(1, 5), torch.tensor(0)),
            "SyntheticData labels: got a tensor without axes, expected",
        ),
        (
            lambda: SyntheticData(torch.zeros(2, 5), [0, 1]),
            "SyntheticData labels: got list, expected a tensor",
        ),
        (lambda: WeightDecay(center="meta"), "center: got 'meta'"),
        (lambda: Augmentation(kinds=("hue",)), "kinds: got 'hue'"),
        (lambda: GroupStructure("w", 1), "GroupStructure groups: got 1, expected at least 2"),
        (lambda: GroupStructure("w", math.nan), "GroupStructure groups: got nan"),
        (
            lambda: GroupStructure("w", 2, strength=-1.0),
            "GroupStructure strength: got -1.0, expected a number ≥ 0",
        ),
        (
            lambda: GroupStructure("w", 2, smoothing=0.0),
            "GroupStructure smoothing: got 0.0, expected a number > 0",
        ),
    ],
)
def test_a_bad_variable_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


class Scaling(nn.Module):
    """A model with a parameter that is a single number."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))


BATCH_NORM = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3))
DATA = SyntheticData(TRAIN["inputs"], TRAIN["targets"])


@pytest.mark.parametrize(
    ("variables", "model", "message"),
    [
        ([], MODEL, "variables: got none"),
        ([ClassWeights(3), ClassWeights(3)], MODEL, r"got \['class_weights'\] twice"),
        ([Augmentation(), DATA], MODEL, "variables: got 2 that make the inputs"),
        ([WeightDecay], MODEL, "variables: got .*expected a list of variables, such as"),
        ([GroupStructure("w", 2)], MODEL, "GroupStructure parameter: got 'w'"),
        ([GroupStructure("scale", 2)], Scaling(), "got 'scale', a single number, expected"),
        ([ClassWeights(3)], BATCH_NORM, "BatchNorm1d.*tracks running statistics"),
        ([ClassWeights(3)], network().requires_grad_(False), "no parameter that requires grad"),
    ],
)
def test_a_bad_problem_is_refused(variables, model, message):
    with pytest.raises(ValueError, match=message):
        make_problem(*variables, model=model)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (nn.MSELoss, r"loss: got the class MSELoss, .*make an instance of it, MSELoss\(\)"),
        ("mse", "loss: got 'mse', expected a function"),
    ],
)
def test_a_loss_that_is_no_function_is_refused(loss, message):
    with pytest.raises(ValueError, match=message):
        tuning_problem(MODEL, loss, [ClassWeights(3)])


def test_a_variable_in_the_place_of_a_list_is_refused():
    with pytest.raises(ValueError, match=r"variables: got ExampleWeights.*expected a list"):
        tuning_problem(MODEL, F.cross_entropy, ExampleWeights(9))


@pytest.mark.parametrize(
    ("curvature", "message"),
    [
        ("kfac", "KFAC: got a loss that is −log p of no softmax"),
        (Fisher, "Fisher: got a loss that is −log p of no softmax"),
    ],
)
def test_weights_that_depend_on_the_losses_have_no_likelihood(curvature, message):
    problem, meta, _ = make_problem(WeightNetwork(hidden=3))
    method = Implicit(CG(), batch=TRAIN, damping=0.1, curvature=curvature)
    with pytest.raises(ValueError, match=message):
        hypergradient(
            problem,
            random_like(meta),
            stream(2),
            inner=GradientDescent(steps=2),
            method=method,
        )


def test_bad_batches_and_losses_are_refused():
    without = make_problem(WeightDecay())
    with pytest.raises(ValueError, match="a problem without any, expected a variable that weighs"):
        without.weights(PARAMS, {}, TRAIN)

    problem, meta, _ = make_problem(ExampleWeights(9))
    with pytest.raises(ValueError, match="ExampleWeights: got a batch without 'index'"):
        problem.inner_loss(PARAMS, meta, (TRAIN["inputs"], TRAIN["targets"]))


@pytest.mark.parametrize("loss", ["inner_loss", "outer_loss"])
def test_a_batch_norm_that_comes_to_track_statistics_is_refused(loss):
    model = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3)).double().eval()
    problem, meta, _ = tuning_problem(model, F.cross_entropy, [ClassWeights(3)])
    params = problem.init(meta, None)
    data = (torch.ones(4, 5, dtype=torch.float64), torch.tensor([0, 1, 2, 0]))
    before = getattr(problem, loss)(params, meta, data)
    model.train()
    with pytest.raises(ValueError, match=r"BatchNorm1d.*tracks running statistics"):
        getattr(problem, loss)(params, meta, data)
    assert model[1].running_mean.tolist() == [0.0, 0.0, 0.0]
    model.eval()
    assert torch.equal(getattr(problem, loss)(params, meta, data), before)
