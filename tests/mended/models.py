"""Models, and the episodes that they take."""

import torch
from reported.helpers import draw
from torch import nn


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def linear(layer=None):
    return nn.Sequential(nn.Linear(4, 6), layer or nn.Identity(), nn.Linear(6, 5))


def bag(**options):
    return nn.Sequential(nn.EmbeddingBag(9, 6, **options), nn.Linear(6, 5))


def words(tasks=2):
    return draw(tasks, inputs=lambda *shape: torch.randint(0, 9, (*shape, 4)))


def episodes_for(model):
    embeds = isinstance(model[0], (nn.Embedding, nn.EmbeddingBag))
    return words() if embeds else draw(tasks=2, examples=10)


def meta_of(model):
    return {name: p.detach() for name, p in model.named_parameters()}
