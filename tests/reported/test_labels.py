"""Labels in few-shot tasks: padding that the loss ignores, and classes new in the query."""

from reported.helpers import (
    assert_hypergradient,
    assert_learns,
    assert_same,
    draw,
    plain_maml,
    split,
)
from torch import nn


def padded_and_cut():
    """Two tasks, the first with 7 labelled examples in each set, and both without the padding."""
    episodes = draw(tasks=2)
    for _, labels in (episodes.support, episodes.query):
        labels[0, 7:] = -100  # F.cross_entropy skips them
    cut = [tuple((x[y >= 0], y[y >= 0]) for x, y in task) for task in split(episodes)]
    return episodes, cut


def test_the_hypergradient_of_padded_tasks_is_that_of_their_labelled_examples():
    model = nn.Linear(4, 5)
    episodes, cut = padded_and_cut()
    assert_hypergradient(plain_maml(model, cut), model, episodes)


def test_the_learner_ignores_examples_labelled_ignore_index():
    model = nn.Linear(4, 5)
    episodes, cut = padded_and_cut()
    learner = assert_learns(plain_maml(model, cut), model, episodes)
    accuracies = learner.evaluate(episodes)[1][-1]
    for accuracy, (support, (inputs, labels)) in zip(accuracies, cut, strict=True):
        right = learner.adapt(support)(inputs).argmax(1) == labels
        assert_same(accuracy, right.double().mean())


def test_the_learner_takes_query_words_that_the_support_lacks():
    model = nn.Linear(4, 5)
    episodes = draw(tasks=2)
    episodes.support[1].remainder_(4)
    episodes.query[1].fill_(4)
    assert_learns(plain_maml(model, split(episodes)), model, episodes)
