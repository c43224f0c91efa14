"""A tuner that is stopped and resumed, and early stopping."""

import copy
import io
from functools import partial

import pytest
import torch
from oracles import quadratic
from torch import nn
from weighted_logistic import META, POINT, PROBLEM

from metaimplicit import GradientDescent, Positive, TorchOptimizer, Tuner, hypergradient
from metaimplicit.methods import METHODS, known_options, make_method
from metaimplicit.tuning import Box, Real, WeightDecay, tuning_problem

ORACLE = quadratic([[0.5, 1.0, 1.5, 2.0, 3.0]])
DATA = tuple(x[0] for x in ORACLE.data)
ADAM = partial(torch.optim.Adam, lr=0.1)


def make_tuner(steps=4):
    """A tuner of the quadratic problem, under Adam."""
    inner = GradientDescent(steps=steps, lr=0.4)
    return Tuner(ORACLE.problem, ORACLE.meta, inner=inner, optimizer=ADAM)


@pytest.mark.parametrize(
    "method", ["unrolled", "real-time", "cg", "nystrom-cg", "auto", "soba", "sama", "f2sa"]
)
def test_a_killed_run_resumes_to_the_same_bits(method):
    def batch(i):
        rows = torch.arange(6) + i % 7
        return POINT[0][rows], POINT[1][rows], *POINT[2:]

    no_curvature_is_named = getattr(METHODS[method], "curvature", "") is None
    curvature = "hessian" if no_curvature_is_named else None

    def build():
        return Tuner(
            PROBLEM,
            {"decay": META["decay"], "weights": META["weights"][:6]},
            inner=TorchOptimizer(torch.optim.Adam, steps=2, lr=0.05),
            method=make_method(method, **known_options(method, rank=3, curvature=curvature)),
            domains={"decay": Positive(), "weights": Box(0.0)},
        )

    torch.manual_seed(0)
    whole = build()
    whole.fit(batch, lambda i: POINT, steps=2)
    rng = torch.get_rng_state()
    file = io.BytesIO()
    torch.save(whole.state_dict(), file)
    whole.fit(batch, lambda i: POINT, steps=4)

    torch.set_rng_state(rng)
    resumed = build()
    resumed.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    assert resumed.steps == 2
    resumed.fit(batch, lambda i: POINT, steps=4)
    for name in resumed.meta:
        assert torch.equal(resumed.meta[name], whole.meta[name])
    assert torch.equal(resumed.params["w"], whole.params["w"])


def test_early_stopping_returns_to_the_best_measurement():
    tuner = make_tuner(steps=50)
    values = iter([3.0, 1.0, 2.0, 2.0, 0.0])
    measured = []

    def metric(params, meta):
        measured.append((params["theta"], meta["phi"]))
        return next(values)

    assert tuner.fit([DATA], [DATA], steps=100, metric=metric, patience=2) == 1.0
    assert len(measured) == 4
    assert tuner.steps == 4
    assert torch.equal(tuner.params["theta"], measured[1][0])
    assert torch.equal(tuner.meta["phi"], measured[1][1])


def test_the_parameters_that_a_tuner_shows_may_be_changed_in_place():
    ends = []
    for changes in (False, True):
        tuner = make_tuner()
        tuner.fit([DATA], [DATA], steps=2)
        if changes:
            tuner.params["theta"].zero_()
        tuner.fit([DATA], [DATA], steps=3)
        ends.append(tuner.params["theta"])
    assert torch.equal(*ends)


def test_the_patience_that_was_used_up_is_part_of_the_state():
    values = iter([1.0, 2.0, 3.0])
    tuner = make_tuner()
    tuner.fit([DATA], [DATA], steps=2, metric=lambda *_: next(values))
    resumed = make_tuner()
    resumed.load_state_dict(copy.deepcopy(tuner.state_dict()))
    assert resumed.fit([DATA], [DATA], steps=9, metric=lambda *_: next(values), patience=2) == 1.0
    assert resumed.steps == 3


def test_two_tuners_can_load_one_state_in_memory():
    """What is loaded is a copy: the outer optimiser of the first writes its averages in place."""
    whole = make_tuner()
    whole.fit([DATA], [DATA], steps=3)
    state = whole.state_dict()
    ends = []
    for _ in range(2):
        tuner = make_tuner()
        tuner.load_state_dict(state)
        tuner.fit([DATA], [DATA], steps=6)
        ends.append(tuner.meta["phi"])
    assert torch.equal(*ends)


def test_steps_after_the_best_measurement_leave_it_as_it_was():
    """A run returns to it twice, and continues in between."""
    values = iter([1.0, 2.0, 3.0, 4.0])
    tuner = make_tuner()
    tuner.fit(
        [DATA],
        [DATA],
        steps=2,
        metric=lambda *_: next(values),
        patience=9,
    )
    averages = copy.deepcopy(tuner.optimizer.state_dict()["state"])
    tuner.fit(
        [DATA],
        [DATA],
        steps=4,
        metric=lambda *_: next(values),
        patience=9,
    )
    for key, average in tuner.optimizer.state_dict()["state"][0].items():
        assert torch.equal(average, averages[0][key]), key


def make_model_tuner(width=3, dtype=torch.float64, optimizer=ADAM, device="cpu"):
    """A tuner of the weight decay of a small network."""
    model = nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, 2))
    problem, meta, _ = tuning_problem(
        model.to(device, dtype), nn.functional.cross_entropy, [WeightDecay(domain=Real())]
    )
    inner = TorchOptimizer(torch.optim.Adam, steps=2)
    return Tuner(problem, meta, inner=inner, method="unrolled", optimizer=optimizer)


class Centred(nn.Module):
    """A linear layer of x less a running mean of the inputs."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(2, 2, dtype=torch.float64)
        self.register_buffer("mean", torch.zeros(2, dtype=torch.float64))

    def forward(self, x):
        self.mean.lerp_(x.mean(0), 0.1)
        return self.fc(x - self.mean)


def make_centred_tuner(**options):
    """A tuner of the weight decay of a model with a buffer that moves, and the model."""
    torch.manual_seed(0)
    model = Centred()
    problem, meta, domains = tuning_problem(model, nn.functional.cross_entropy, [WeightDecay()])
    inner = GradientDescent(steps=2, lr=0.3)
    return Tuner(problem, meta, domains=domains, inner=inner, method="unrolled", **options), model


def shifted_batch(i):
    x = torch.randn(4, 2, generator=torch.Generator().manual_seed(i)).double()
    return x + 2, torch.tensor([0, 1, 1, 0])


def test_buffers_of_the_model_are_part_of_the_state():
    whole, model = make_centred_tuner()
    whole.fit(shifted_batch, shifted_batch, steps=6)
    stopped, _ = make_centred_tuner()
    stopped.fit(shifted_batch, shifted_batch, steps=3)
    resumed, resumed_model = make_centred_tuner()
    resumed.load_state_dict(stopped.state_dict())
    resumed.fit(shifted_batch, shifted_batch, steps=6)
    assert torch.equal(resumed_model.mean, model.mean)
    assert torch.equal(resumed.params["fc.weight"], whole.params["fc.weight"])
    with pytest.raises(
        ValueError, match=r"got the buffers \[\], expected \['mean'\]; build the mo"
    ):
        resumed.load_state_dict(stopped.state_dict() | {"buffers": {}})


def test_a_buffer_that_is_made_in_a_call_is_no_part_of_the_state():
    """As a table of positions. A model that was not called yet does not have it."""

    class Positions(nn.Linear):
        def forward(self, x):
            self.register_buffer("table", torch.zeros(len(x), 1).to(x), persistent=False)
            return super().forward(x) + self.table

    def make():
        model = Positions(2, 2, dtype=torch.float64)
        problem, meta, domains = tuning_problem(model, nn.functional.cross_entropy, [WeightDecay()])
        inner = GradientDescent(steps=2, lr=0.3)
        return Tuner(problem, meta, domains=domains, inner=inner, method="unrolled")

    tuner = make()
    tuner.step(shifted_batch(0), shifted_batch(1))
    state = tuner.state_dict()
    assert state["buffers"] == {}
    make().load_state_dict(state)


def test_buffers_return_with_the_best_measurement():
    tuner, model = make_centred_tuner()
    values = iter([1.0, 2.0])
    means = []

    def metric(params, meta):
        means.append(model.mean.clone())
        return next(values)

    tuner.fit(shifted_batch, shifted_batch, steps=9, metric=metric, patience=1)
    assert len(means) == 2
    assert torch.equal(model.mean, means[0])


@pytest.mark.filterwarnings("ignore:the meta-gradient of .* is not finite:RuntimeWarning")
@pytest.mark.parametrize("persistent", [True, False])
@pytest.mark.parametrize("on_nonfinite", ["skip", "raise"])
def test_a_batch_of_nan_leaves_the_buffers_as_they_were(on_nonfinite, persistent):
    tuner, model = make_centred_tuner(on_nonfinite=on_nonfinite)
    model.register_buffer("mean", model.mean, persistent=persistent)
    good = shifted_batch(0)
    tuner.step(good, good)
    before = model.mean.clone()
    bad = (good[0] * torch.nan, good[1])
    if on_nonfinite == "skip":
        assert not tuner.step(bad, good).applied
    else:
        with pytest.raises(FloatingPointError, match="nothing was changed"):
            tuner.step(bad, good)
    assert torch.equal(model.mean, before)
    assert tuner.step(good, good).applied


@pytest.mark.parametrize("method", ["unrolled", "real-time", "f2sa"])
def test_another_inner_optimizer_starts_without_the_state_of_the_one_before(method):
    """The averages of Adam, taken for those of RMSprop, would lead far away."""
    x, y = shifted_batch(0)
    model = nn.Linear(2, 2, dtype=torch.float64)
    problem, meta, domains = tuning_problem(
        model, nn.functional.cross_entropy, [WeightDecay(start=1e-9)]
    )

    def build(optimizer, **options):
        inner = TorchOptimizer(optimizer, steps=2, **options)
        return Tuner(problem, meta, domains=domains, inner=inner, method=method)

    tuner = build(torch.optim.Adam, lr=0.05)
    tuner.step((x, y), (x, y))
    state = tuner.state_dict()
    model.load_state_dict(tuner.params)
    optimizer = torch.optim.RMSprop(model.parameters(), lr=0.01, centered=True)
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    tuner.inner = TorchOptimizer(torch.optim.RMSprop, steps=2, lr=0.01, centered=True)
    tuner.step((x, y), (x, y))
    assert torch.allclose(tuner.params["weight"], model.weight, atol=1e-7)
    with pytest.raises(ValueError, match="got that of inner steps of Adam, expected steps of RMSp"):
        build(torch.optim.RMSprop, lr=0.01).load_state_dict(state)
    with pytest.raises(
        ValueError, match="start: got the end of steps of RMSprop, expected steps o"
    ):
        hypergradient(
            problem,
            meta,
            (x, y),
            inner=TorchOptimizer(torch.optim.Adam, steps=2),
            method="unrolled",
            start=tuner.end,
        )


def state_after_a_step():
    tuner = make_model_tuner()
    batch = (torch.randn(4, 2).double(), torch.tensor([0, 1, 1, 0]))
    tuner.step(batch, batch)
    return tuner.state_dict()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 4}, r"float64 \[3, 2\] for the parameter '0.weight', expected .* \[4, 2\]"),
        ({"dtype": torch.float32}, "got torch.float64 .* expected torch.float32"),
        ({"optimizer": lambda free: torch.optim.Adam([{"params": []}, {"params": free}])}, "group"),
        ({"optimizer": torch.optim.RAdam}, "optimizer: got RAdam, expected Adam, whose state"),
    ],
    ids=["another model", "another type", "other groups", "another optimiser"],
)
def test_a_state_of_another_tuner_changes_nothing(changes, message):
    state = state_after_a_step()
    state["free"]["weight_decay"] += 1.0
    tuner = make_model_tuner(**changes)
    before = tuner.meta["weight_decay"]
    with pytest.raises(ValueError, match=message):
        tuner.load_state_dict(state)
    assert torch.equal(tuner.meta["weight_decay"], before)
    assert tuner.steps == 0
    assert tuner.end is None


def test_a_state_goes_to_the_device_of_the_model():
    tuner = make_model_tuner(device="meta")
    tuner.load_state_dict(state_after_a_step())
    assert {p.device.type for p in tuner.params.values()} == {"meta"}
    slots = [x for slots in tuner.end.state.values() for x in slots.values()]
    assert {x.device.type for x in slots if isinstance(x, torch.Tensor)} == {"meta"}


def test_a_state_may_be_taken_and_loaded_within_inference_mode():
    batch = (torch.randn(4, 2).double(), torch.tensor([0, 1, 1, 0]))
    tuner, resumed = make_model_tuner(), make_model_tuner()
    tuner.step(batch, batch)
    with torch.inference_mode():
        resumed.load_state_dict(tuner.state_dict())
    for t in (tuner, resumed):
        t.step(batch, batch)
    assert torch.equal(tuner.meta["weight_decay"], resumed.meta["weight_decay"])


def test_a_method_that_is_set_later_is_the_one_that_the_constructor_takes():
    """That of a model without a curvature takes the Gauss–Newton matrix."""
    x = torch.randn(12, 2, generator=torch.Generator().manual_seed(0)).double()
    batch = (x, torch.arange(12) % 2)
    ends = []
    for at_first in ("cg", "unrolled"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)).double()
        problem, meta, domains = tuning_problem(
            model, nn.functional.cross_entropy, [WeightDecay(start=0.1)]
        )
        tuner = Tuner(
            problem,
            meta,
            domains=domains,
            inner=GradientDescent(steps=2, lr=0.1),
            method=at_first,
            optimizer=partial(torch.optim.SGD, lr=0.1),
        )
        if at_first != "cg":
            tuner.method = "cg"
        tuner.step(batch, batch)
        ends.append(tuner.meta["weight_decay"])
    assert torch.equal(*ends)
