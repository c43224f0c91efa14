"""`SplitLoss` and `BatchLoss`: which losses are called with one example at a time."""

import pytest
import torch
from torch.nn import functional as F

from metaimplicit.tuning.batch_loss import BatchLoss
from metaimplicit.tuning.losses import SplitLoss

OUTPUTS = torch.linspace(-1.0, 2.0, 12, dtype=torch.float64).sin().reshape(4, 3)
TARGETS = torch.tensor([0, 1, 2, 1])


def test_losses_that_are_not_of_examples_are_those_of_single_examples_from_then_on():
    def loss(z, y, reduction="mean"):
        losses = F.cross_entropy(z, y, reduction="none")
        return losses.mean() if reduction == "mean" else losses.sum()  # never one for each

    split = BatchLoss(loss)
    assert not split.takes_single_examples
    expected = F.cross_entropy(OUTPUTS, TARGETS, reduction="none")
    assert torch.allclose(split.of_examples(OUTPUTS, TARGETS), expected)
    assert split.takes_single_examples


def test_a_loss_that_is_refused_for_its_order_is_refused_again_for_the_same_reason():
    def loss(z, y, reduction="mean"):
        losses = F.cross_entropy(z, y, reduction="none").flip(0)
        # In a batch of one, another loss, so that single examples do not give its mean.
        scale = 1.0 if len(z) > 1 else z.square().sum()
        return scale * losses.mean() if reduction == "mean" else scale * losses

    split = SplitLoss(loss)
    for _ in range(2):
        with pytest.raises(ValueError, match="are not in the order of the examples"):
            split.split(OUTPUTS, TARGETS)
