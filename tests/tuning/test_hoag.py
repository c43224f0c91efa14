"""HOAG on ridge regression, whose hypergradient is known; its line search; L-BFGS."""

import math

import pytest
import torch
from oracles import quadratic, relative_error, ridge
from torch import nn

from metaimplicit import (
    LBFGS,
    BilevelProblem,
    Composite,
    Dense,
    FromMeta,
    Nystrom,
    Positive,
    Proximal,
    ProximalGradient,
    hypergradient,
)
from metaimplicit.inner import GradientDescent, L1Norm, Newton, Ridge, TorchOptimizer
from metaimplicit.tuning import HOAG, Box, GroupStructure, Real, WeightDecay, tuning_problem
from metaimplicit.tuning.free_meta import FreeMeta
from metaimplicit.tuning.line_search import LineSearch, Trial

X, Y, X_VALIDATION, Y_VALIDATION = (x[0] for x in ridge(tasks=1, m=12, n=8, seed=3).data)
EYE = torch.eye(8, dtype=torch.float64)
RIDGE = BilevelProblem(
    init=lambda meta, data: {"w": torch.zeros(8, dtype=torch.float64)},
    inner_loss=Composite(
        outputs=lambda params, meta, data: data[0] @ params["w"],
        loss=lambda z, data: 0.5 * (z - data[1]).square().mean(),
        penalty=Proximal(FromMeta("decay"), center="zero"),
    ),
    outer_loss=lambda params, meta, data: 0.5 * (data[0] @ params["w"] - data[1]).square().mean(),
)
START = {"decay": torch.tensor(0.01, dtype=torch.float64)}


def exact(decay):
    """(g, dg/d log λ) of ridge regression in closed form."""
    a = X.T @ X / 12 + decay * EYE
    w = torch.linalg.solve(a, X.T @ Y / 12)
    residual = X_VALIDATION @ w - Y_VALIDATION
    v = X_VALIDATION.T @ residual / 12
    return 0.5 * residual.square().mean(), -decay * w @ torch.linalg.solve(a, v)


def run(steps, **options):
    """HOAG in log λ, and what its first steps did."""
    options = {"domains": {"decay": Positive()}, **options}
    hoag = HOAG(
        RIDGE,
        START,
        train=(X, Y),
        validation=(X_VALIDATION, Y_VALIDATION),
        **options,
    )
    return hoag, [hoag.step() for _ in range(steps)]


@pytest.mark.parametrize("steps", [0, 7], ids="after {} steps".format)
def test_a_run_resumes_from_its_file_to_the_same_bits(steps, tmp_path):
    hoag, _ = run(steps)
    torch.save(hoag.state_dict(), tmp_path / "hoag.pt")
    resumed, _ = run(2)  # another state, which is replaced
    resumed.load_state_dict(torch.load(tmp_path / "hoag.pt", weights_only=True))
    for _ in range(3):
        mine, theirs = resumed.step(), hoag.step()
        assert (mine.outer_loss, mine.norm, mine.tolerance, mine.lipschitz, mine.accepted) == (
            *(theirs.outer_loss, theirs.norm, theirs.tolerance),
            *(theirs.lipschitz, theirs.accepted),
        )
    assert torch.equal(resumed.meta["decay"], hoag.meta["decay"])


def test_later_steps_do_not_change_a_state_that_was_taken():
    hoag, _ = run(3)
    state = hoag.state_dict()
    decay = state["free"]["decay"].item()
    hoag.step()
    assert state["free"]["decay"].item() == decay != hoag.state_dict()["free"]["decay"].item()


def test_the_state_of_other_hyperparameters_is_refused():
    hoag, _ = run(1)
    state = hoag.state_dict()
    state["free"] = {"decay": torch.zeros(2)}
    before = hoag.state_dict()
    with pytest.raises(ValueError, match="state: got hyperparameters"):
        hoag.load_state_dict(state)
    assert hoag.state_dict()["free"] == before["free"]


DECAYS = WeightDecay("tensor", start=0.5)
GROUPS = GroupStructure("2.weight", groups=2)


def hoag_of_a_network(width=3, device="cpu", variables=(DECAYS, GROUPS)):
    """HOAG in hyperparameters of a small network."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, 2))
    problem, meta, domains = tuning_problem(
        model.to(device, torch.float64), nn.functional.cross_entropy, variables
    )
    data = (X[:, :2].to(device), (Y > 0).long().to(device))
    return HOAG(problem, meta, data, data, domains=domains)


def test_the_state_of_another_model_changes_nothing():
    other = hoag_of_a_network(width=4)
    other.step()
    hoag = hoag_of_a_network()
    before = hoag.meta
    with pytest.raises(ValueError, match=r"for the parameter .* expected"):
        hoag.load_state_dict(other.state_dict() | {"free": hoag.state_dict()["free"]})
    assert all(torch.equal(value, before[name]) for name, value in hoag.meta.items())
    assert hoag.steps == 0


class Counting(nn.Linear):
    """A linear layer that counts its calls, by which its outputs grow a little."""

    def __init__(self):
        super().__init__(2, 2, dtype=torch.float64)
        self.register_buffer("calls", torch.zeros((), dtype=torch.float64))

    def forward(self, x):
        self.calls += 1
        return super().forward(x) * (1 + 1e-3 * self.calls)


def hoag_of_a_counting_model(inner=None):
    torch.manual_seed(0)
    problem, meta, domains = tuning_problem(Counting(), nn.functional.cross_entropy, [DECAYS])
    data = (X[:, :2], (Y > 0).long())
    inner = inner or GradientDescent(steps=3, lr=0.1, momentum=0.5)
    return HOAG(problem, meta, data, data, domains=domains, inner=inner)


def test_the_buffers_of_the_model_are_part_of_the_state():
    whole = hoag_of_a_counting_model()
    for _ in range(4):
        whole.step()
    stopped = hoag_of_a_counting_model()
    for _ in range(2):
        stopped.step()
    resumed = hoag_of_a_counting_model()
    resumed.load_state_dict(stopped.state_dict())
    for _ in range(2):
        resumed.step()
    assert whole.state_dict()["buffers"]["calls"] > 8
    for name, buffer in resumed.state_dict()["buffers"].items():
        assert torch.equal(buffer, whole.state_dict()["buffers"][name])
    assert all(torch.equal(value, whole.meta[name]) for name, value in resumed.meta.items())
    other = hoag_of_a_counting_model(TorchOptimizer(torch.optim.Adam))
    with pytest.raises(ValueError, match="got that of inner steps of SGD, expected steps of Adam"):
        other.load_state_dict(stopped.state_dict())


@pytest.mark.filterwarnings("ignore:the meta-gradient of .* is not finite:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:CG ended with NON_FINITE:RuntimeWarning")
def test_a_step_that_is_not_finite_leaves_the_buffers_as_they_were():
    hoag = hoag_of_a_counting_model()
    hoag.step()
    before = hoag.state_dict()["buffers"]["calls"]
    inputs, targets = hoag.validation
    hoag.validation = (inputs * torch.nan, targets)
    with pytest.raises(FloatingPointError, match="nothing was changed"):
        hoag.step()
    assert torch.equal(hoag.state_dict()["buffers"]["calls"], before)


def test_a_state_goes_to_the_device_of_the_model():
    decay = WeightDecay(start=0.5, domain=Real())
    hoag = hoag_of_a_network(variables=[decay])
    hoag.step()
    elsewhere = hoag_of_a_network(device="meta", variables=[decay])
    elsewhere.load_state_dict(hoag.state_dict())
    trial = elsewhere.line_search.accepted
    tensors = [*elsewhere.params.values(), *trial.point.values(), *trial.gradient.values()]
    assert {x.device.type for x in tensors} == {"meta"}


def test_a_run_within_inference_mode_is_that_outside():
    outside = hoag_of_a_network()
    for _ in range(3):
        outside.step()
    with torch.inference_mode():
        inside = hoag_of_a_network()
        inside.step()
        state = inside.state_dict()
        inside.load_state_dict(state)
        inside.step()
    inside.step()  # goes on outside
    assert all(torch.equal(value, outside.meta[name]) for name, value in inside.meta.items())


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["quadratic", lambda k: 0.5**k], ids=["quadratic", "halving"])
def test_it_finds_the_best_penalty_and_solves_to_the_scheduled_tolerances(schedule):
    hoag, steps = run(12, schedule=schedule, tolerance=0.01)
    grid = torch.logspace(-4, 2, 400).double()
    best = min(float(exact(decay)[0]) for decay in grid)
    assert float(exact(hoag.meta["decay"])[0]) < best * (1 + 1e-4)
    for k, step in enumerate(steps):
        assert step.tolerance == pytest.approx(max(0.01 * hoag.schedule(k + 1), 2**-24))
        assert float(step.report.inner_gradient_norm) <= step.tolerance


@pytest.mark.slow
def test_summable_tolerances_converge_and_a_constant_one_stalls():
    gradients = {"halving": [], "constant": []}
    for name, schedule in {"halving": lambda k: 0.5**k, "constant": lambda k: 1.0}.items():
        hoag, _ = run(16, schedule=schedule, tolerance=0.02)
        for _ in range(5):
            hoag.step()
            gradients[name].append(abs(float(exact(hoag.meta["decay"])[1])))
    assert max(gradients["halving"]) < 1e-7
    assert sum(gradients["constant"]) / 5 > 1e-3


def test_each_trial_is_a_step_of_one_over_the_lipschitz_estimate():
    """A second implementation of the line search follows HOAG through all kinds of trials."""
    hoag, _ = run(0, schedule=lambda k: 0.5**k, tolerance=0.02)
    search = hoag.line_search
    points = []
    gradients = []
    kinds = set()
    accepted = 0
    rejected = []
    lipschitz = math.nan
    for k in range(15):
        points.append(hoag.free.tensors["decay"].item())
        solved_again = len(rejected) == 2
        if solved_again:
            assert points[k] == points[accepted]
        elif k:
            step_length = gradients[accepted] / lipschitz
            assert points[k] == pytest.approx(points[accepted] - step_length, rel=1e-12)

        step = hoag.step()
        trial = search.accepted if step.accepted else search.rejected[-1]
        gradients.append(trial.gradient["decay"].item())
        assert step.norm == abs(gradients[k])

        expected = step.norm
        if k:
            other = rejected[-1] if solved_again else accepted
            distance = abs(points[k] - points[other])
            expected = max(abs(gradients[k] - gradients[other]), step.norm / 4) / distance
            if not step.accepted:
                expected = min(max(expected, 2 * lipschitz), 8 * lipschitz)
        assert step.lipschitz == pytest.approx(expected, rel=1e-12)

        kinds.add((step.accepted, len(rejected)))
        lipschitz = step.lipschitz
        if step.accepted:
            accepted = k
            rejected = []
        else:
            rejected.append(k)
    assert kinds == {(True, 0), (True, 1), (True, 2), (False, 0), (False, 1)}


@pytest.mark.parametrize(("estimate", "growth"), [(0.1, 2.0), (5.0, 5.0), (100.0, 8.0)])
def test_a_rejection_raises_the_lipschitz_constant_twofold_to_eightfold(estimate, growth):
    search = LineSearch()
    assert search.add(Trial({"phi": torch.tensor(0.0)}, {"phi": torch.tensor(1.0)}, 0.0, 0.0))
    before = search.lipschitz
    point = search.next_point()
    distance = point["phi"].abs().item()
    gradient = {"phi": torch.tensor(1.0 - estimate * before * distance)}
    assert not search.add(Trial(point, gradient, loss=1.0, tolerance=0.0))
    # The estimate is at least a quarter of the trial's gradient, over the distance.
    estimate = max(estimate, gradient["phi"].abs().item() / 4)
    assert search.lipschitz == pytest.approx(min(max(estimate, 2), 8) * before)
    assert search.lipschitz == pytest.approx(growth * before)


def test_a_step_that_a_projection_undoes_is_accepted_and_tells_nothing_about_the_constant():
    search = LineSearch()
    point = {"phi": torch.tensor(0.0)}
    gradient = {"phi": torch.tensor(2.0)}
    search.add(Trial(point, gradient, loss=0.0, tolerance=0.0))
    assert search.add(Trial(point, {"phi": torch.tensor(7.0)}, loss=1.0, tolerance=0.0))
    assert search.lipschitz == 2.0


def test_the_hyperparameter_stays_in_its_box():
    hoag, steps = run(5, domains={"decay": Box(0.0, 0.02)}, tolerance=1e-4)
    assert float(hoag.meta["decay"]) == 0.02  # The gradient points out of the box there.
    assert all(step.accepted for step in steps)
    # While φ stays, there is nothing to estimate L from.
    assert len({step.lipschitz for step in steps[1:]}) == 1


def test_a_bound_that_is_reached_does_not_hold_up_the_other_hyperparameters():
    """g = 10 a + (b − 3)²/2 on 0 ≤ a ≤ 2, which is least at a = 0 and b = 3."""
    problem = BilevelProblem(
        init=lambda meta, data: {"w": torch.zeros(2, dtype=torch.float64)},
        inner_loss=lambda params, meta, data: (
            (params["w"] - torch.stack([meta["a"], meta["b"]])).square().sum() / 2
        ),
        outer_loss=lambda params, meta, data: 10 * params["w"][0] + (params["w"][1] - 3) ** 2 / 2,
    )
    meta = {name: torch.tensor(1.0, dtype=torch.float64) for name in ("a", "b")}
    hoag = HOAG(problem, meta, train=None, validation=None, domains={"a": Box(0.0, 2.0)})
    for _ in range(20):
        step = hoag.step()
    assert hoag.meta["a"] == 0
    assert hoag.meta["b"].item() == pytest.approx(3, abs=1e-6)
    assert step.lipschitz == pytest.approx(1.0)


def weighted_square(unit=1.0, inward=0.25):
    """g = unit (a − inward)² of θ* = a."""
    return BilevelProblem(
        init=lambda meta, data: {"w": torch.zeros_like(meta["a"])},
        inner_loss=lambda params, meta, data: (params["w"] - meta["a"]).square().sum(),
        outer_loss=lambda params, meta, data: unit * (params["w"] - inward).square().sum(),
    )


def test_a_start_at_a_bound_takes_a_step_of_its_first_slope():
    """The search has seen no slope when the first one leads away from the bound."""
    search = LineSearch()
    point, zero = {"a": torch.tensor(0.0)}, {"a": torch.tensor(0.0)}
    search.add(Trial(point, zero, loss=1.0, tolerance=0.0))
    search.add(Trial(point, {"a": torch.tensor(-0.5)}, loss=1.0, tolerance=0.0))
    assert search.lipschitz == 0.5
    assert search.next_point() == {"a": 1.0}


def test_slopes_below_the_round_off_of_a_hyperparameter_still_move_it():
    meta = {"a": torch.tensor(1.0)}
    hoag = HOAG(weighted_square(unit=1e-9, inward=2.0), meta, train=None, validation=None)
    for _ in range(30):
        hoag.step()
    assert hoag.meta["a"].item() == pytest.approx(2, abs=1e-3)


@pytest.mark.parametrize("slope", [1e-10, 1e-3])
def test_a_slope_into_a_bound_is_blocked_even_if_it_rounds_away(slope):
    free = FreeMeta({"a": torch.tensor(1.0)}, {"a": Box(0.0, 1.0)})
    assert free.without_blocked({"a": torch.tensor(-slope)}) == {"a": 0}
    assert free.without_blocked({"a": torch.tensor(slope)}) == {"a": torch.tensor(slope)}


def test_bad_options_are_refused():
    known = "exponential, quadratic, cubic"
    with pytest.raises(ValueError, match=f"schedule: got 'linear', expected one of {known}"):
        run(0, schedule="linear")
    with pytest.raises(ValueError, match="tolerance: got 0, expected a number > 0"):
        run(0, tolerance=0)
    for solver in ("cg", Dense(), Nystrom()):
        with pytest.raises(ValueError, match=r"solver: got .*, expected one with a tolerance"):
            run(0, solver=solver)
    with pytest.raises(ValueError, match="params: there are none before the first step"):
        _ = run(0)[0].params
    with pytest.raises(ValueError, match="next_point: got no trial yet"):
        LineSearch().next_point()


@pytest.mark.parametrize("inner", [Ridge(), Newton(), ProximalGradient(L1Norm(0.1))])
def test_a_loop_without_a_tolerance_is_refused(inner):
    with pytest.raises(ValueError, match=r"inner: got .*, expected a loop of steps that stops"):
        HOAG(RIDGE, START, (X, Y), (X_VALIDATION, Y_VALIDATION), inner=inner)


def test_a_hypergradient_that_is_not_finite_changes_nothing():
    hoag, _ = run(1)
    before = hoag.meta["decay"].clone()
    hoag.validation = (X_VALIDATION, Y_VALIDATION * math.nan)
    with (
        pytest.warns(RuntimeWarning, match="CG ended with NON_FINITE"),
        pytest.raises(FloatingPointError, match="step 1: got a hypergradient of norm nan"),
    ):
        hoag.step()
    assert torch.equal(hoag.meta["decay"], before)


def test_lbfgs_solves_every_task_to_the_tolerance():
    oracle = quadratic([[0.1, 1, 2, 3, 40], [1, 1, 2, 2, 8]])
    result = hypergradient(
        oracle.problem,
        oracle.meta,
        oracle.data,
        inner=LBFGS(tol=1e-7),
        method="dense",
        batched=True,
    )
    assert float(result.report.inner_gradient_norm.max()) <= 1e-7
    assert relative_error(result.grads["phi"], oracle.exact["phi"]) < 1e-6
    assert int(result.report.inner_steps[0]) < 60


def test_lbfgs_stops_at_its_cap_with_the_best_point_it_has_seen():
    oracle = quadratic([[0.1, 1, 2, 3, 40]])
    losses = []

    def inner_loss(params, meta, data):
        loss = oracle.problem.inner_loss(params, meta, data)
        losses.append(float(loss.detach()))
        return loss

    problem = BilevelProblem(
        oracle.problem.init,
        inner_loss,
        oracle.problem.outer_loss,
    )
    data = tuple(x[0] for x in oracle.data)
    inner = LBFGS(steps=5, tol=1e-12)
    result = hypergradient(
        problem,
        oracle.meta,
        data,
        inner=inner,
        method="dense",
    )
    assert result.report.inner_steps.tolist() == [5]
    end = float(oracle.problem.inner_loss(result.params, oracle.meta, data))
    assert end == min(losses[:6])


def test_lbfgs_refuses_methods_that_differentiate_its_steps():
    oracle = quadratic([[1.0, 2.0]])

    def ask(method):
        options = {"inner": LBFGS(), "method": method, "batched": True}
        return hypergradient(
            oracle.problem,
            oracle.meta,
            oracle.data,
            **options,
        )

    with pytest.raises(ValueError, match=r"inner: got LBFGS.*expected an implicit method"):
        ask("unrolled")
    with pytest.raises(ValueError, match=r"inner: got LBFGS, whose steps are not differentiable"):
        ask("forward")
    with pytest.raises(ValueError, match="LBFGS history: got 0, expected at least 1"):
        LBFGS(history=0)
    with pytest.raises(ValueError, match="steps: got 0, expected at least 1 inner step"):
        LBFGS(steps=0)
