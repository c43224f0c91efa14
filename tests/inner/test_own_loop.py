"""An inner loop of one's own, whose steps read φ without saying so."""

from dataclasses import dataclass, field

import pytest
import torch
from oracles import randn, relative_error

from metaimplicit import (
    BilevelProblem,
    Dense,
    FromMeta,
    GradientDescent,
    Implicit,
    hypergradient,
)
from metaimplicit.inner import InnerLoop, L1Norm, ProximalGradient, Trajectory
from metaimplicit.methods import METHODS, shared
from metaimplicit.params import detached, flatten, leaves

TARGETS = randn(3, 2, seed=1)
META = {"size": torch.tensor(0.1).double(), "center": torch.tensor([0.3, -0.2]).double()}
PROBLEM = BilevelProblem(
    init=lambda meta, data: {"w": torch.ones(2, dtype=torch.float64)},
    inner_loss=lambda params, meta, data: (params["w"] - meta["center"]).square().sum() / 2,
    outer_loss=lambda params, meta, data: (params["w"] - data).pow(4).sum(),
)


@dataclass(frozen=True)
class Descent(InnerLoop):
    """Steps of `meta["size"]` along the gradient."""

    steps: int = 4
    replay_objection = ""
    fixed_point_objection = ""

    def take_step(self, params, gradients, state, meta, step=None):
        return {name: p - meta["size"] * gradients[name] for name, p in params.items()}, {}

    def run(self, loss, start, meta, *, differentiated_steps, keep_iterates=False, state=None):
        params, iterates = start, [start]
        for t in range(self.steps):
            differentiated = t >= self.steps - differentiated_steps
            point = params if differentiated and t > 0 else leaves(params)
            gradients = torch.autograd.grad(
                loss(point, t).sum(), list(point.values()), create_graph=differentiated
            )
            gradients = dict(zip(point, gradients, strict=True))
            params, _ = self.take_step(point, gradients, {}, meta)
            params = params if differentiated else detached(params)
            iterates.append(params)
        norm = flatten(detached(gradients)).norm(dim=1)
        steps = torch.full((len(norm),), self.steps)
        return Trajectory(params, steps, norm, tuple(iterates) if keep_iterates else ())


class Inherited(ProximalGradient):
    """The same steps in a loop that takes the rest from the package."""

    take_step = Descent.take_step


def outcome(inner, method):
    """The gradient of the size of the steps, or what the method says against it."""
    try:
        return hypergradient(PROBLEM, META, TARGETS, inner=inner, method=method).grads["size"]
    except ValueError as error:
        return str(error)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("flag", sorted(set(METHODS) - {"truncated"}))
def test_every_method_treats_it_as_it_treats_a_step_size(flag):
    expected = outcome(GradientDescent(steps=4, lr=FromMeta("size")), flag)
    found = outcome(Descent(), flag)
    if isinstance(expected, str):
        assert "cannot give the gradient of meta['size']" in expected or "Composite" in expected
        assert found == expected
    else:
        assert relative_error(found, expected) < 1e-12


@pytest.mark.parametrize("flag", ["forward", "real-time", "fixed-point"])
def test_a_loop_that_inherits_all_but_its_step_is_looked_at_as_well(flag):
    expected = outcome(GradientDescent(steps=4, lr=FromMeta("size")), flag)
    found = outcome(Inherited(L1Norm(0.0), steps=4), flag)
    assert found == expected


def test_a_step_that_some_methods_would_not_take_is_warned_of():
    with pytest.warns(RuntimeWarning, match="take_step, which the run that it inherits does not"):

        class Descends(GradientDescent):
            take_step = Descent.take_step


@dataclass(frozen=True)
class Warm(Descent):
    """It goes on where it ended, and its steps draw random numbers."""

    ends: dict = field(default_factory=dict)
    own: torch.Generator = field(default_factory=torch.Generator)

    def take_step(self, params, gradients, state, meta, step=None):
        noise = 0.01 * torch.randn(2, dtype=torch.float64)
        noise = noise + 0.01 * torch.randn(2, dtype=torch.float64, generator=self.own)
        end, _ = super().take_step(params, gradients, state, {"size": 0.1}, step)
        return {name: p + noise for name, p in end.items()}, {}

    def run(self, loss, start, meta, **options):
        start = {name: self.ends.get(name, p) for name, p in start.items()}
        end = super().run(loss, start, meta, **options)
        self.ends.update(detached(end.params))
        return end


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("method", ["cg", "unrolled", "forward"])
def test_what_a_loop_holds_and_draws_is_not_touched_by_the_trial(method, monkeypatch):
    """An entry without a gradient makes methods ask whether the loop reads it."""
    meta = {"center": META["center"], "unread": torch.ones(()).double()}

    def results():
        torch.manual_seed(0)
        loop = Warm()
        for _ in range(2):
            end = hypergradient(PROBLEM, meta, TARGETS, inner=loop, method=method).params["w"]
        return [end, *loop.ends.values(), torch.rand(1)]

    tried = results()
    monkeypatch.setattr(shared, "read_by_step", lambda *_: set())
    for first, second in zip(tried, results(), strict=True):
        assert torch.equal(first, second)


class Singular(Descent):
    """A loop that cannot take a step for another loss."""

    def take_step(self, params, gradients, state, meta, step=None):
        if step is not None:
            raise torch.linalg.LinAlgError("singular")
        return super().take_step(params, gradients, state, meta)

    def run(self, loss, start, meta, *, differentiated_steps, keep_iterates, state):
        return super().run(loss, start, meta, differentiated_steps=differentiated_steps)


def test_a_loop_that_cannot_take_the_trial_runs_as_before(monkeypatch):
    meta = {**META, "unread": torch.ones(()).double()}
    for method in ("unrolled", Implicit(Dense(), curvature="hessian")):
        result = hypergradient(PROBLEM, meta, TARGETS, inner=Singular(), method=method)
        monkeypatch.setattr(shared, "read_by_step", lambda *_: set())
        expected = hypergradient(PROBLEM, meta, TARGETS, inner=Descent(), method=method)
        monkeypatch.undo()
        for name, gradient in expected.grads.items():
            assert torch.equal(result.grads[name], gradient)


def test_a_loop_without_a_step_of_its_own_is_told_to_define_one():
    class Whole(Descent):
        take_step = InnerLoop.take_step

        def run(self, *args, **options):
            return Descent(self.steps).run(*args, **options)

    with pytest.raises(ValueError, match="got Whole, which does not define take_step"):
        hypergradient(PROBLEM, META, TARGETS, inner=Whole(), method="forward")
