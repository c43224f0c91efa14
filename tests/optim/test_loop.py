"""Second-order optimisers in a training loop: resumed, copied, scheduled, frozen, on a GPU."""

import copy
import io
import pickle

import pytest
import torch
from oracles import relative_error
from second_order import (
    LABELS,
    OPTIMIZERS,
    X,
    closure_for,
    network,
    tanh_network,
    vector,
)
from torch import nn


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_run_continues_to_the_same_bits(name):
    model = tanh_network()
    optimizer = OPTIMIZERS[name](model)
    for _ in range(4):
        optimizer.step(closure_for(name, model))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    for _ in range(3):
        optimizer.step(closure_for(name, model))

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = tanh_network(seed=1)
    other.load_state_dict(saved["model"])
    resumed = OPTIMIZERS[name](other)
    resumed.load_state_dict(saved["optimizer"])
    for _ in range(3):
        resumed.step(closure_for(name, other))
    assert torch.equal(vector(model), vector(other))
    assert optimizer.param_groups[0]["damping"] == resumed.param_groups[0]["damping"]


@pytest.mark.parametrize("name", ["natural", "kfac"])
def test_a_state_without_random_numbers_is_refused(name):
    optimizer = OPTIMIZERS[name](tanh_network())
    state = optimizer.state_dict()
    del state["random"]
    with pytest.raises(ValueError, match="state_dict: got no entry 'random'"):
        optimizer.load_state_dict(state)


def deep_copy(pair):
    return copy.deepcopy(pair)


def pickled_copy(pair):
    return pickle.loads(pickle.dumps(pair))


# Both ways ask an optimiser for the same state.
COPIES = [
    *((name, deep_copy) for name in OPTIMIZERS),
    *((name, pickled_copy) for name in ("newton", "kfac")),
]


@pytest.mark.parametrize(("name", "make_copy"), COPIES)
def test_a_copy_steps_as_the_original_does_and_without_it(name, make_copy):
    model = tanh_network()
    optimizer = OPTIMIZERS[name](model)
    optimizer.step(closure_for(name, model))
    copied_model, copied_optimizer = make_copy((model, optimizer))
    for _ in range(2):
        optimizer.step(closure_for(name, model))
    end = vector(model)
    for _ in range(2):
        copied_optimizer.step(closure_for(name, copied_model))
    assert torch.equal(vector(copied_model), end)
    assert torch.equal(vector(model), end)


@pytest.mark.parametrize(("name", "make_copy"), COPIES)
def test_a_copy_of_an_optimizer_with_a_scheduler_steps_by_itself(name, make_copy):
    model = tanh_network()
    optimizer = OPTIMIZERS[name](model)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    copied_model, copied_optimizer = make_copy((model, optimizer))
    start = vector(model)
    for _ in range(5):  # because the first step may be taken back
        copied_optimizer.step(closure_for(name, copied_model))
    assert torch.equal(vector(model), start)
    assert not torch.equal(vector(copied_model), start)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_scheduler_sets_the_length_of_the_step_and_frozen_parameters_stay(name):
    model = tanh_network()
    model[0].requires_grad_(False)
    frozen = vector(model[0])
    start = copy.deepcopy(model.state_dict())
    optimizer = OPTIMIZERS[name](model)
    assert len(optimizer.param_groups[0]["params"]) == 2
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.25)
    lr = optimizer.param_groups[0]["lr"]
    steps = []
    for _ in range(2):
        state = copy.deepcopy(optimizer.state_dict())
        before = vector(model[2])
        optimizer.step(closure_for(name, model))
        steps.append(vector(model[2]) - before)
        # The same step again, but of another length.
        model.load_state_dict(start)
        optimizer.load_state_dict(state)
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == lr / 16
    assert torch.equal(vector(model[0]), frozen)
    assert relative_error(steps[1], 0.25 * steps[0]) < 1e-12


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_second_parameter_group_is_refused(name):
    optimizer = OPTIMIZERS[name](tanh_network())
    with pytest.raises(ValueError, match="got another parameter group"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_parameter_that_was_frozen_after_the_optimizer_was_built_is_named(name):
    model = tanh_network()
    optimizer = OPTIMIZERS[name](model)
    model[2].weight.requires_grad_(False)
    message = r"step: '2\.weight' was frozen after the optimiser was built; build another"
    with pytest.raises(ValueError, match=message):
        optimizer.step(closure_for(name, model))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_parameter_that_was_replaced_after_the_optimizer_was_built_is_named(name):
    model = tanh_network()
    optimizer = OPTIMIZERS[name](model)
    model[2] = nn.Linear(4, 4).double()
    message = r"step: '2\.weight' was replaced after the optimiser was built; build another"
    with pytest.raises(ValueError, match=message):
        optimizer.step(closure_for(name, model))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_parameter_that_the_optimizer_does_not_move_is_named(name):
    """Another optimiser may move it, so that the step is that of a model where it is frozen."""
    model = tanh_network()
    model[0].requires_grad_(False)
    frozen = copy.deepcopy(model)
    OPTIMIZERS[name](frozen).step(closure_for(name, frozen))
    optimizer = OPTIMIZERS[name](model)
    model[0].requires_grad_(True)
    named = r"step: '0\.weight', '0\.bias' were added or unfrozen after the optimiser was built"
    with pytest.warns(RuntimeWarning, match=named) as caught:
        optimizer.step(closure_for(name, model))
    assert caught[0].filename == __file__
    torch.testing.assert_close(vector(model), vector(frozen), rtol=1e-10, atol=1e-12)
    model[0].requires_grad_(False)
    model.append(nn.Linear(4, 4, bias=False).double())
    with pytest.warns(RuntimeWarning, match=r"'3\.weight' were added"):
        optimizer.step(closure_for(name, model))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_model_that_changes_its_type_goes_on_as_if_its_state_were_loaded(name):
    model = tanh_network().float()
    optimizer = OPTIMIZERS[name](model)
    for _ in range(2):
        optimizer.step(closure_for(name, model, X.float(), LABELS))
    model.double()
    other = copy.deepcopy(model)
    loaded = OPTIMIZERS[name](other)
    loaded.load_state_dict(optimizer.state_dict())
    for _ in range(2):
        optimizer.step(closure_for(name, model))
        loaded.step(closure_for(name, other))
    assert torch.equal(vector(model), vector(other))

    model.half()
    with pytest.raises(ValueError, match="expected single or double precision"):
        optimizer.step(closure_for(name, model, X.half(), LABELS))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_within_inference_mode_is_that_outside(name):
    inside, outside = tanh_network(), tanh_network()
    optimizer, expected = OPTIMIZERS[name](inside), OPTIMIZERS[name](outside)
    with torch.inference_mode():
        for _ in range(2):
            optimizer.step(closure_for(name, inside))
            optimizer.load_state_dict(optimizer.state_dict())
    optimizer.zero_grad(set_to_none=False)  # in place, which torch refuses for its tensors
    optimizer.step(closure_for(name, inside))
    for _ in range(3):
        expected.step(closure_for(name, outside))
    assert torch.equal(vector(inside), vector(outside))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_half_precision_is_refused(name):
    message = r"got '0\.weight' as torch\.bfloat16.*single or double precision"
    with pytest.raises(ValueError, match=message):
        OPTIMIZERS[name](network().bfloat16())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", ["newton", "newton-cg", "gauss-newton"])
def test_cuda_agrees_with_the_cpu(name):
    ends = []
    for device in ("cpu", "cuda"):
        model = tanh_network().to(device)
        optimizer = OPTIMIZERS[name](model)
        closure = closure_for(name, model, X.to(device), LABELS.to(device))
        for _ in range(4):
            optimizer.step(closure)
        ends.append(vector(model).cpu())
    assert relative_error(ends[1], ends[0]) < 1e-8
