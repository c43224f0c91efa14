"""The small networks of the fuzzer, in plain torch, and their inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fuzz.case import SEQUENCES, Case

TOKENS, POSITIONS = 5, 3
PADDED = "body.embedding.weight"  # its row 0, where the model has a padding token
ACTIVATIONS = {"tanh": nn.Tanh, "softplus": nn.Softplus, "gelu": nn.GELU, "relu": nn.ReLU}
Norm = Callable[[int], nn.Module]


class Model(nn.Module):
    """A body whose outputs are scores, and what makes log-probabilities of them."""

    def __init__(self, body: nn.Module, log_softmax: bool) -> None:
        super().__init__()
        self.body = body
        self.tail = nn.LogSoftmax(1) if log_softmax else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self.body(x))


class Embedded(nn.Module):
    """The mean of the tokens' embeddings, and a linear layer."""

    def __init__(self, outputs: int, padding: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, 3, padding_idx=0 if padding else None)
        self.head = nn.Linear(3, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embedding(x).mean(1))


class Tagger(nn.Module):
    """Scores for each position, laid out `[m, outputs, positions]` as cross-entropy has them."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(2, 4)
        self.head = nn.Linear(4, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.hidden(x).tanh()).mT


class Tied(nn.Module):
    """Two layers that share one weight."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3, bias=False)
        self.second.weight = self.first.weight
        self.head = nn.Linear(3, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x).tanh()).tanh())


class Spare(nn.Module):
    """A layer that is used, and one that is not."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.spare = nn.Linear(2, 2)
        self.head = nn.Linear(3, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)


class Sequence(nn.Module):
    """A layer over sequences `[m, positions, 2]`, pooled, and a linear layer."""

    def __init__(self, kind: str, outputs: int) -> None:
        super().__init__()
        self.kind = kind
        self.layer = {
            "attention": lambda: nn.MultiheadAttention(2, 1, batch_first=True),
            "encoder": lambda: nn.TransformerEncoderLayer(2, 1, 2, dropout=0.0, batch_first=True),
            "dot-product": lambda: nn.Linear(2, 2),
            "lstm": lambda: nn.LSTM(2, 2, batch_first=True),
            "gru": lambda: nn.GRU(2, 2, batch_first=True),
        }[kind]()
        self.head = nn.Linear(2, outputs)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "attention":
            states = self.layer(x, x, x, need_weights=False)[0].mean(1)
        elif self.kind == "encoder":
            states = self.layer(x).mean(1)
        elif self.kind == "dot-product":
            states = F.scaled_dot_product_attention(self.layer(x), x, x).mean(1)
        else:
            states = self.layer(x)[0][:, -1]
        return self.head(states)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Torch's default dtype, for a while."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def build_model(case: Case, dtype: torch.dtype, batch_norm: Norm) -> Model:
    """The model of a case, initialised from its seed alone.

    Args:
        case: the case.
        dtype: of the parameters. They are drawn in float64 and rounded to the case's own dtype
            first, so that every copy of the model holds the same numbers.
        batch_norm: makes a batch-norm of so many channels for the norm `"project-batch"`.
    """
    with torch.random.fork_rng(devices=[]), default_dtype(torch.float64):
        torch.manual_seed(1_000_003 * case.seed + case.index)
        model = Model(_body(case, batch_norm), case.log_softmax)
    model = model.to(getattr(torch, case.dtype)).to(dtype)
    model.train(case.norm != "eval-batch")
    if case.frozen:
        next(model.parameters()).requires_grad_(False)
    return model


def _body(case: Case, batch_norm: Norm) -> nn.Module:
    outputs, activation = case.outputs, ACTIVATIONS[case.activation]
    if case.model in SEQUENCES:
        return Sequence(case.model, outputs)
    if case.model == "embedding":
        return Embedded(outputs, case.padding)
    if case.model == "linear":
        return nn.Linear(3, outputs)
    if case.model == "mlp":
        norm = nn.LayerNorm(4) if case.norm == "layer" else nn.Identity()
        drop = nn.Dropout(0.3 if case.dropout else 0.0)
        hidden = nn.Linear(3, 4)
        return nn.Sequential(hidden, norm, activation(), drop, nn.Linear(4, outputs))
    if case.model == "conv":
        layers = [nn.Conv2d(1, 2, 2, stride=2), _norm(case.norm, batch_norm), activation()]
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(8, outputs))
    return {"tagger": Tagger, "tied": Tied, "spare": Spare}[case.model](outputs)


def _norm(name: str, batch_norm: Norm) -> nn.Module:
    if name == "eval-batch":
        norm = nn.BatchNorm2d(2)
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2.0)
        return norm
    if name == "batch":
        return nn.BatchNorm2d(2, track_running_stats=False)
    if name == "project-batch":
        return batch_norm(2)
    return nn.GroupNorm(1, 2) if name == "group" else nn.Identity()


def plain_batch_norm(channels: int) -> nn.Module:
    """Torch's own batch-norm, which the project's is meant to equal."""
    return nn.BatchNorm2d(channels, track_running_stats=False)


def draw_inputs(case: Case, generator: torch.Generator) -> Tensor:
    """Inputs `[tasks, examples, ...]` of the model, float64 or token numbers."""
    lead = (case.tasks, case.examples)
    if case.model == "embedding":
        tokens = torch.randint(0, TOKENS, (*lead, 4), generator=generator)
        tokens[:, :, 0] = torch.where(tokens[:, :, 1] > 1, 0, tokens[:, :, 0])
        return tokens
    shape: tuple[Any, ...] = (3,)
    if case.model == "conv":
        shape = (1, 4, 4)
    elif case.model in SEQUENCES or case.model == "tagger":
        shape = (POSITIONS, 2)
    return torch.randn(*lead, *shape, generator=generator, dtype=torch.float64)
