"""Arguments, episodes and models that the learner refuses, each with an error that says why."""

import copy
from collections import OrderedDict
from types import SimpleNamespace

import pytest
import torch
from learner.few_shot import INPUTS, WAYS, LinearModel, draw_episodes, make_learner, make_network
from torch import nn

from metaimplicit import FromMeta, GradientDescent, MetaLearner, Proximal
from metaimplicit.inner import make_inner


def changed(**sets):
    """The episodes with another support or query set."""
    data = draw_episodes()
    return SimpleNamespace(**({"support": data.support, "query": data.query} | sets))


SUPPORT_INPUTS, SUPPORT_LABELS = draw_episodes().support
QUERY_INPUTS, QUERY_LABELS = draw_episodes().query
BAD_EPISODES = {
    "label above the range": (
        changed(support=(SUPPORT_INPUTS, SUPPORT_LABELS + 1)),
        r"episodes\.support labels: got 4, expected class indices from 0 to 3",
    ),
    "label below the range": (
        changed(query=(QUERY_INPUTS, QUERY_LABELS - 1)),
        r"episodes\.query labels: got -1",
    ),
    "integers that are no classes": (
        changed(support=(SUPPORT_INPUTS, SUPPORT_LABELS + 9)),
        "convert targets that are not class indices to float",
    ),
    "fewer inputs than targets": (
        changed(support=(SUPPORT_INPUTS[:, :2], SUPPORT_LABELS)),
        r"begin with \[tasks, examples\], neither empty",
    ),
    "empty support": (
        changed(support=(SUPPORT_INPUTS[:, :0], SUPPORT_LABELS[:, :0])),
        "neither empty",
    ),
    "fewer tasks in the query": (
        changed(query=(QUERY_INPUTS[:1], QUERY_LABELS[:1])),
        "one task axis of the same size",
    ),
}


@pytest.mark.parametrize("case", BAD_EPISODES)
def test_bad_episodes_are_refused_before_any_gradient(case):
    episodes, message = BAD_EPISODES[case]
    learner = make_learner()
    with pytest.raises(ValueError, match=message):
        learner.backward(episodes)
    assert all(p.grad is None for p in learner.parameters())


class NameConflict(nn.Module):
    """Has a parameter with the name of a learnt step size."""

    def __init__(self):
        super().__init__()
        self.log_lr = nn.Parameter(torch.zeros(WAYS))


BAD_ARGUMENTS = [
    ({"method": "maml"}, "method: got 'maml', expected one of unrolled"),
    ({"adapt": "3.*"}, r"adapt: '3.\*' matches no parameter that requires grad"),
    ({"adapt": ["2.*", "tail"]}, "adapt: 'tail' matches no parameter"),
    ({"adapt": lambda name: False}, "the predicate' matches no parameter"),
    ({"adapt": []}, "matches no parameter"),
    ({"adapt": 2}, r"adapt: got 2, expected patterns of names, such as 'head.\*'"),
    ({"adapt": ["2.*", 2]}, r"adapt: got \['2.\*', 2\], expected patterns of names"),
    ({"metric": "acc"}, r"metric: got 'acc', expected a function \(outputs, targets\) -> numbers"),
    ({"query_loss": "mse"}, r"query_loss: got 'mse', expected a function"),
    ({"model": nn.Linear}, "model: got .*Linear.*, expected a torch.nn.Module"),
    ({"vectorize": "map"}, "vectorize: got 'map'"),
    ({"chunk_size": 0}, "chunk_size: got 0, expected a number of tasks ≥ 1, or None"),
    ({"chunk_size": 2.0}, r"chunk_size: got 2\.0, expected a number of tasks ≥ 1, or None"),
    ({"proximal": -1.0}, "proximal: got -1.0, expected a strength ≥ 0"),
    (
        {"proximal": FromMeta("decay")},
        r"proximal: got FromMeta\(.*, expected a strength ≥ 0; learn=",
    ),
    ({"proximal": 0.0}, "proximal: got 0 with an implicit method"),
    ({"learn": None}, "learn: got None, expected the names of inner numbers, such as 'lr'"),
    ({"learn": {"lr"}}, "learn 'lr': implicit cannot give its gradient.*unrolled"),
    (
        {"learn": {"proximal"}, "method": "first-order"},
        "learn 'proximal': first-order cannot give its gradient",
    ),
    ({"learn": {"eps"}}, r"learn: got \['eps'\], expected some of \['lr', 'proximal'\]"),
    (
        {"learn": {"lr": "each"}, "method": "unrolled"},
        r"learn 'lr': got 'each', expected one of \['scalar', 'per-tensor', 'per-element'\]",
    ),
    (
        {"learn": {"proximal": "per-tensor"}},
        r"learn 'proximal': got 'per-tensor', expected one of \['scalar'\]",
    ),
    (
        {"learn": {"proximal"}, "proximal": 0.0, "method": "unrolled"},
        "learn 'proximal': got proximal=0, expected a strength > 0 to start from",
    ),
    (
        {"learn": {"lr"}, "method": "unrolled", "inner": GradientDescent(lr=torch.tensor(0.1))},
        "learn 'lr': got an inner loop with lr=.*, expected a number > 0",
    ),
    (
        {"model": NameConflict(), "method": "unrolled", "learn": {"lr"}},
        "the model has a parameter 'log_lr' already",
    ),
    (
        {"model": make_network().requires_grad_(False)},
        "model: got no parameter that requires grad",
    ),
    (
        {
            "model": nn.Sequential(OrderedDict(head=nn.Linear(6, 4))),
            "head": "prototypes",
            "proximal": None,
            "method": None,
        },
        r"model: got a parameter 'head\.weight', which Prototypes has as well",
    ),
    (
        {"model": make_network().requires_grad_(False), "head": "ridge"},
        r"model: got no parameter that requires grad.*learn=\['lambda'\]",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_ARGUMENTS)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_learner(**arguments)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (None, r"loss: got None, expected a function \(outputs, targets\) -> scalar"),
        (nn.CrossEntropyLoss, r"loss: got the class .*; make an instance of it, CrossEntropyLoss"),
    ],
)
def test_a_loss_that_is_no_function_is_refused(loss, message):
    with pytest.raises(ValueError, match=message):
        MetaLearner(make_network(), loss)


def test_numbers_of_steps_that_are_not_whole_are_refused():
    learner = make_learner()
    for steps in (2.0, [1.0], {1, 2}, "2"):
        with pytest.raises(ValueError, match=r"steps: got .*, expected a whole number of inner"):
            learner.evaluate(draw_episodes(), steps=steps)
    with pytest.raises(ValueError, match=r"steps: got \[2\.0\], expected a whole number of inner"):
        learner.adapt(draw_episodes().support, steps=2.0, batched=True)


def test_a_model_that_was_replaced_is_refused():
    learner = make_learner()
    learner.model = make_network()
    for call in (
        lambda: learner.backward(draw_episodes()),
        lambda: learner.evaluate(draw_episodes()),
        lambda: learner.adapt(draw_episodes().support, batched=True),
    ):
        with pytest.raises(ValueError, match="model: got another module than the learner was"):
            call()


@pytest.mark.parametrize(
    ("name", "value", "advice"),
    [
        ("proximal", 0.3, "set learner.penalty, such as Proximal"),
        ("compile", True, "set learner.compiles"),
        ("adapt", "*bias", "build a new learner"),
        ("adapted", ["bias"], "build a new learner"),
        ("head", "ridge", "build a new learner"),
        ("learn", ["lr"], "build a new learner"),
    ],
)
def test_a_change_that_nothing_would_see_is_refused(name, value, advice):
    learner = make_learner()
    for changed in (learner, copy.deepcopy(learner)):
        with pytest.raises(AttributeError, match=f"^{name}: got another one .*; {advice}"):
            setattr(changed, name, value)


def test_a_loop_or_a_penalty_that_no_longer_reads_what_is_learnt_is_refused():
    learner = make_learner(method="unrolled", proximal=1.0, learn=["lr", "proximal"])
    with pytest.raises(ValueError, match=r"^inner: got one that does not read 'log_lr', which is"):
        learner.inner = GradientDescent(steps=3, lr=0.1)
    for penalty in (None, Proximal(0.3)):
        with pytest.raises(
            ValueError, match=r"^penalty: got one that does not read 'log_proximal'"
        ):
            learner.penalty = penalty
    learner.inner = learner.inner.with_steps(3)
    learner.backward(draw_episodes())
    assert all(learner.meta[name].grad != 0 for name in ("log_lr", "log_proximal"))


def test_a_loop_with_learnt_step_sizes_may_be_cut_short_but_not_lose_any():
    inner = GradientDescent(steps=2, lr=[0.1, 0.2])
    learner = make_learner(method="unrolled", inner=inner, learn=["lr"])
    with pytest.raises(ValueError, match=r"^inner: got one that does not read 'log_lr\[1\]'"):
        learner.inner = GradientDescent(steps=1, lr=FromMeta("log_lr[0]", torch.exp))
    learner.inner = learner.inner.with_steps(1)
    learner.backward(draw_episodes())
    assert [g.grad != 0 for g in learner.learnt.by_name().values()] == [True, False]


def test_a_flag_of_an_inner_loop_may_be_set_later():
    learner = make_learner()
    learner.inner = "momentum"
    assert learner.inner == make_inner("momentum")
    with pytest.raises(ValueError, match=r"^inner: got 'no-such', expected one of"):
        learner.inner = "no-such"


def test_adapt_refuses_a_negative_number_of_steps_and_pairs_of_different_lengths():
    learner = make_learner()
    inputs, labels = draw_episodes().support
    with pytest.raises(ValueError, match="steps: got -1, expected at least 0 inner steps"):
        learner.adapt((inputs, labels), steps=-1, batched=True)
    message = r"support: got inputs \(1, 4, 6\) and targets \(1, 3\), expected both to begin"
    with pytest.raises(ValueError, match=message):
        learner.adapt((inputs[0], labels[0][:3]))


def batch_norm_network(**options):
    norm = nn.BatchNorm1d(5, **options)
    return nn.Sequential(nn.Linear(INPUTS, 5), norm, nn.Linear(5, WAYS)).double()


def test_running_statistics_are_refused_in_training_mode_and_used_in_evaluation_mode():
    learner = make_learner(batch_norm_network())
    message = r"'1' \(BatchNorm1d\) tracks running statistics.*track_running_stats=False"
    with pytest.raises(ValueError, match=message):
        learner.backward(draw_episodes())
    with pytest.raises(ValueError, match="tracks running statistics"):
        learner.adapt(draw_episodes().support, batched=True)
    learner.eval()
    learner.backward(draw_episodes())
    assert learner.model[1].num_batches_tracked == 0


def test_batch_statistics_are_accepted_in_training_mode():
    learner = make_learner(batch_norm_network(track_running_stats=False))
    learner.backward(draw_episodes())
    assert learner.model[1].weight.grad.abs().max() > 0


@pytest.mark.parametrize(("name", "grad"), [("0.weight", False), ("2.bias", True)])
def test_parameters_that_were_frozen_or_unfrozen_since_are_named(name, grad):
    model = make_network()
    parameter = dict(model.named_parameters())[name]
    parameter.requires_grad_(not grad)
    learner = make_learner(model)
    parameter.requires_grad_(grad)
    message = rf"model: '{name}' was frozen, unfrozen, added, removed or tied after"
    with pytest.raises(ValueError, match=message):
        learner.backward(draw_episodes())


def test_a_layer_that_was_tied_since_is_named():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    learner = make_learner(model)
    model[1].weight = model[0].weight
    with pytest.raises(ValueError, match=r"model: '1\.weight' was .* removed or tied after"):
        learner.backward(draw_episodes())


class TwoOutputs(LinearModel):
    """Returns its inputs as well."""

    def forward(self, x):
        return self.layer(x), x


@pytest.mark.parametrize("method", ["cg", "unrolled"])
def test_a_model_that_does_not_return_one_tensor_is_refused(method):
    message = "model: got a call that returns tuple, expected one tensor; wrap the model"
    with pytest.raises(ValueError, match=message):
        make_learner(TwoOutputs(), method=method).backward(draw_episodes())
