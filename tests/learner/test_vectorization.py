"""Tasks under vmap, in chunks, in a loop, and whichever of these is chosen."""

import pytest
import torch
from learner.few_shot import INPUTS, QUERIES, TASKS, WAYS, LinearModel, draw_episodes, make_learner
from oracles import relative_error

from metaimplicit import Implicit, Nystrom
from metaimplicit.learner import vectorization
from metaimplicit.learner.vectorization import choose_vectorize

pytestmark = pytest.mark.compared


@pytest.fixture(autouse=True)
def _vmap_by_the_clock(real_clock, monkeypatch):
    """These tests are of the choice by the clock as well."""
    monkeypatch.setattr(vectorization, "_shortest_time", real_clock)


def assert_same_gradients(learner, other):
    for p, q in zip(learner.parameters(), other.parameters(), strict=True):
        assert relative_error(p.grad, q.grad) < 1e-12


@pytest.mark.parametrize("vectorize", ["loop", "auto"])
@pytest.mark.parametrize("method", ["unrolled", "cg"])
def test_the_ways_to_vectorize_give_the_same_gradient(method, vectorize):
    expected = make_learner(method=method)
    learner = make_learner(method=method, vectorize=vectorize)
    chunked = make_learner(method=method, chunk_size=2)
    state = torch.get_rng_state()
    for each in (expected, learner, chunked):
        each.backward(draw_episodes(tasks=3))
    assert torch.equal(state, torch.get_rng_state())
    assert learner.vectorize in ("vmap", "loop")
    assert_same_gradients(learner, expected)
    assert_same_gradients(chunked, expected)


def test_the_choice_leaves_the_generator_of_a_solver_as_it_was():
    def sketched(vectorize):
        generator = torch.Generator().manual_seed(3)
        method = Implicit(Nystrom(rank=4, generator=generator))
        learner = make_learner(method=method, vectorize=vectorize)
        learner.backward(draw_episodes())
        return learner, generator.get_state()

    chosen, state = sketched("auto")
    expected, expected_state = sketched("vmap")
    assert torch.equal(state, expected_state)
    assert_same_gradients(chosen, expected)


def test_the_loop_is_chosen_where_vmap_is_impossible_and_its_own_errors_pass():
    def without_batching_rule(vectorize):
        if vectorize == "vmap":
            raise RuntimeError("no batching rule")
        return torch.zeros(())

    def broken(vectorize):
        raise RuntimeError("broken")

    assert choose_vectorize(without_batching_rule) == "loop"
    with pytest.raises(RuntimeError, match="broken"):
        choose_vectorize(broken)


class Branching(LinearModel):
    """Branches on a value, which vmap refuses."""

    def forward(self, x):
        outputs = self.layer(x)
        return outputs * (2 if outputs.sum().item() > -1e9 else 1)


def test_auto_falls_back_to_the_loop_for_a_model_that_cannot_be_vmapped():
    learner = make_learner(Branching(), vectorize="auto")
    data = draw_episodes()
    learner.backward(data)
    assert learner.vectorize == "loop"
    outputs = learner.adapt(data.support, batched=True)(data.query[0])
    assert outputs.shape == (TASKS, WAYS * QUERIES, WAYS)


def test_a_model_that_cannot_be_vmapped_adapts_before_anything_is_timed():
    learner = make_learner(Branching(), vectorize="auto")
    expected = make_learner(Branching(), vectorize="loop")
    expected.model.load_state_dict(learner.model.state_dict())
    support = draw_episodes().support
    inputs, _ = draw_episodes().query
    adapted = learner.adapt(support, batched=True)
    assert torch.equal(adapted(inputs), expected.adapt(support, batched=True)(inputs))
    assert learner.vectorize == "loop"


def test_an_error_that_the_loop_has_too_chooses_nothing():
    learner = make_learner(vectorize="auto")
    inputs, labels = draw_episodes().support
    with pytest.raises(RuntimeError):
        learner.adapt((inputs[..., :3], labels), batched=True)
    assert learner.vectorize == "auto"


class Clipping(torch.nn.Linear):
    """A model that vmap cannot take in evaluation mode, where it looks at its values."""

    def forward(self, x):
        if not self.training and x.abs().max() > 1e6:
            x = x.clamp(-1e6, 1e6)
        return super().forward(x)


def test_each_mode_of_a_model_is_compared_with_a_loop():
    model = Clipping(INPUTS, WAYS).double()
    learner = make_learner(model, vectorize="auto", method="unrolled", proximal=None)
    for _ in range(3):
        learner.backward(draw_episodes())
    model.eval()
    learner.evaluate(draw_episodes())
    assert learner.vectorize == "loop"
