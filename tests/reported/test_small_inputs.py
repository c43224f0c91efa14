"""Small inputs that end in torch's own errors: a float as aux, a list as meta, labels."""

import pytest
from reported.helpers import (
    INNER,
    assert_learns,
    cross_entropy,
    draw,
    plain_maml,
    refuses,
    split,
)
from torch import nn
from torch.nn import functional as F

from metaimplicit import BilevelProblem, MetaLearner, Unrolled, hypergradient


def run(meta, vectorize="loop"):
    """The hypergradient of a problem whose outer loss returns (loss, accuracy as a number)."""
    model = nn.Linear(4, 5)
    problem = BilevelProblem(
        init=lambda meta, data: meta,
        inner_loss=lambda params, meta, data: cross_entropy(model, params, data),
        outer_loss=lambda params, meta, data: (cross_entropy(model, params, data), 0.5),
    )
    options = {"inner": INNER, "method": Unrolled(), "batched": True, "vectorize": vectorize}
    return hypergradient(problem, meta, draw().support, **options)


@pytest.mark.parametrize("vectorize", ["loop", "vmap"])
def test_a_float_as_aux_comes_back_for_each_task(vectorize):
    meta = {name: p.detach() for name, p in nn.Linear(4, 5).named_parameters()}
    assert run(meta, vectorize).aux.tolist() == [0.5, 0.5]


def test_a_list_as_meta_is_refused_with_what_is_expected():
    with refuses("meta", "got list", "dict"):
        run([p.detach() for p in nn.Linear(4, 5).parameters()])


def test_labels_of_type_uint8_have_the_meta_gradient_of_int64_labels():
    model = nn.Linear(4, 5)
    episodes = draw()
    expected = plain_maml(model, split(episodes))
    for name in ("support", "query"):
        inputs, labels = getattr(episodes, name)
        setattr(episodes, name, (inputs, labels.byte()))
    assert_learns(expected, model, episodes)


def test_adapt_refuses_a_label_out_of_range_with_the_range():
    learner = MetaLearner(nn.Linear(4, 5), F.cross_entropy, inner=INNER, method=Unrolled())
    inputs, labels = draw().support
    with refuses("support", "label", r"\b7\b", "0 to 4"):
        learner.adapt((inputs[0], labels[0] + 3))
