"""`torch.set_default_device` changes nothing: draws of seeded generators stay on the CPU."""

import pytest
import torch
import torch.nn.functional as F
from second_order import LABELS, OPTIMIZERS, X, closure_for, tanh_network, vector
from tower_network import TOWERS, network, train

import tasks
from metaimplicit import GradientDescent, Hyperoptimizer, MetaLearner, check_hypergradient
from metaimplicit.hypergradient import hypergradient
from metaimplicit.methods import METHODS
from metaimplicit.tuning import GroupStructure, Tuner, WeightDecay, WeightNetwork, tuning_problem
from tasks.cache import load_or_build

# Tensors on it hold no numbers, so what is made there without need ends in an error.
ELSEWHERE = torch.device("meta")


def here_and_elsewhere(compute):
    """What a function computes by itself, and with another default device."""
    torch.manual_seed(0)
    expected = compute()
    torch.manual_seed(0)
    with ELSEWHERE:
        return expected, compute()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_second_order_optimizers(name):
    ends = []
    models = [tanh_network(), tanh_network()]

    def run():
        model = models.pop()
        optimizer = OPTIMIZERS[name](model)
        for _ in range(2):
            optimizer.step(closure_for(name, model))
        ends.append(vector(model))

    here_and_elsewhere(run)
    assert torch.equal(*ends)


@pytest.mark.parametrize("name", TOWERS)
def test_towers(name):
    model, other = network(), network()
    train(other, Hyperoptimizer(other.parameters(), TOWERS[name]), 2)
    with ELSEWHERE:
        optimizer = Hyperoptimizer(model.parameters(), TOWERS[name])
        optimizer.load_state_dict(optimizer.state_dict())
    train(model, optimizer, 2)
    assert torch.equal(vector(model), vector(other))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("method", sorted(set(METHODS) - {"first-order", "reptile"}))
def test_methods(method):
    problem, meta, _ = tuning_problem(tanh_network(), F.cross_entropy, [WeightDecay(start=0.5)])
    inner = GradientDescent(steps=2, lr=0.1)

    def compute():
        return hypergradient(problem, meta, (X, LABELS), inner=inner, method=method).grads

    expected, got = here_and_elsewhere(compute)
    assert torch.equal(got["weight_decay"], expected["weight_decay"])


@pytest.mark.parametrize(
    "variable",
    [WeightNetwork(5, classes=4), GroupStructure("0.weight", groups=2)],
    ids=["weight network", "groups"],
)
def test_a_tuner_of_a_network(variable):
    models = [tanh_network(), tanh_network()]
    batch = (X, LABELS)

    def run():
        variables = [variable, WeightDecay(start=0.5)]
        problem, meta, domains = tuning_problem(models.pop(), F.cross_entropy, variables)
        inner = GradientDescent(steps=2, lr=0.1)
        tuner = Tuner(
            problem,
            meta,
            inner=inner,
            domains=domains,
            optimizer=lambda free: torch.optim.SGD(free, lr=0.1),
        )
        tuner.step(batch, batch)
        return tuner.meta, problem, meta, inner

    (expected, *_), (got, problem, meta, inner) = here_and_elsewhere(run)
    assert all(torch.equal(got[name], value) for name, value in expected.items())
    with ELSEWHERE:
        check = check_hypergradient(
            problem, meta, batch, inner=inner, method="unrolled", directions=1
        )
    assert check.verdict.startswith("Right")


def test_a_learner_with_a_head():
    bodies = [tanh_network(), tanh_network()]
    task = (X.unsqueeze(0), LABELS.unsqueeze(0))

    def run():
        learner = MetaLearner(bodies.pop(), F.cross_entropy, head="ridge", vectorize="vmap")
        return learner.backward((task, task)).loss

    assert torch.equal(*here_and_elsewhere(run))


@pytest.mark.parametrize("workers", [0, 1])
def test_the_batches_of_a_sampler(workers):
    def draw():
        sampler = tasks.EpisodeSampler(tasks.load("sinusoid", shots=5).train, tasks=2)
        return next(sampler.batches(1, workers=workers)).support

    for got, expected in zip(*here_and_elsewhere(draw), strict=True):
        assert torch.equal(got, expected)


def test_the_batches_of_augmented_images():
    images = torch.randint(256, (20, 3, 8, 8), dtype=torch.uint8)
    pool = tasks.ImagePool.from_sorted(images, [10, 10], ["cat", "dog"])
    family = tasks.Augmented(tasks.FewShot(pool, ways=2, shots=1, queries=2, name="pets"))

    def draw():
        return tasks.EpisodeSampler(family, tasks=2)[0].support

    for got, expected in zip(*here_and_elsewhere(draw), strict=True):
        assert torch.equal(got, expected)


def test_data_that_are_built_for_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with ELSEWHERE:
        arrays = load_or_build("ones", lambda: {"ones": torch.ones(3).numpy()})
    assert arrays["ones"].tolist() == [1.0] * 3
