"""A character-level LSTM, and texts for it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

State = tuple[Tensor, Tensor]  # h and c, each [layers, streams, hidden]


class Text(NamedTuple):
    """Training and validation text `[streams, length]`, as positions in `characters`."""

    training: Tensor
    validation: Tensor
    characters: str


class CharLSTM(nn.Module):
    """Embedding, LSTM and a linear layer, which scores the character after each.

    Args:
        characters: Number of characters there are.
        embedding: Size of the embedding of a character.
        hidden: Number of units of each layer of the LSTM.
        layers: Number of layers.
    """

    def __init__(self, characters: int, embedding: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, embedding)
        self.lstm = nn.LSTM(embedding, hidden, layers, batch_first=True)
        self.scores = nn.Linear(hidden, characters)

    def loss(
        self, text: Tensor, first: int, size: int, *, state: State | None
    ) -> tuple[Tensor, State]:
        """The mean cross-entropy of the characters first + 1 … first + size of all streams.

        Args:
            text: Streams of characters, int64 `[streams, length]`.
            first: Position of the first character to read.
            size: Number of characters to read.
            state: The state before character `first`. If None, it is zero.

        Returns:
            The loss; the state after the last character read, without its graph.
        """
        inputs = text[:, first : first + size]
        targets = text[:, first + 1 : first + size + 1]
        outputs, (h, c) = self.lstm(self.embedding(inputs), state)
        value = F.cross_entropy(self.scores(outputs).flatten(0, 1), targets.flatten())
        return value, (h.detach(), c.detach())

    @torch.no_grad()
    def bits(self, text: Tensor, window: int) -> float:
        """The mean −log₂ p of all characters but the first of each stream.

        The text is read in windows. The state is carried through, so their size only bounds memory.
        """
        count = text.shape[1] - 1
        nats = 0.0
        state: State | None = None
        for first in range(0, count, window):
            size = min(window, count - first)
            loss, state = self.loss(text, first, size, state=state)
            nats += size * loss.item()
        return nats / count / math.log(2)


def side_by_side(numbers: Tensor, streams: int) -> Tensor:
    """A text `[n]` cut into consecutive streams, `[streams, n // streams]`. The rest is left out.

    Example:
        >>> side_by_side(torch.arange(7), 3)
        tensor([[0, 1],
                [2, 3],
                [4, 5]])
    """
    length = len(numbers) // streams
    return numbers[: streams * length].view(streams, length)


def help_topics() -> str:
    """The texts that `help()` shows on Python's language, joined in the order of their names."""
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))


def read_text(path: Path) -> str:
    """The text of a file in UTF-8.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is in another encoding.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"--text: found no file {path}; name a text file, or leave the option out to read "
            "Python's help topics"
        )
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"--text: {path}: got bytes that are not UTF-8 ({error}); convert the file first"
        ) from error
