"""What holds for the episodes of every family."""

import torch


def tensors(episodes):
    """All tensors of a batch of episodes, in a fixed order."""
    return (*episodes.support, *episodes.query, *episodes.labels.values())


def is_same(one, other):
    """Whether two batches of episodes are equal to the bit."""
    pairs = zip(tensors(one), tensors(other), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


def assert_class_major(targets, ways, count):
    """Each way in turn has `count` targets: int64 `[tasks, ways·count]`."""
    expected = torch.arange(ways).repeat_interleave(count)
    assert targets.dtype == torch.int64
    assert torch.equal(targets, expected.expand(len(targets), -1))


def assert_no_input_twice(episodes):
    """No two inputs of a task, of its support and query together, are equal."""
    inputs = torch.cat([episodes.support[0], episodes.query[0]], 1).flatten(2)
    for task in inputs:
        assert len(task.unique(dim=0)) == len(task)
