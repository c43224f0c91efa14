"""Towers on text: Adam's hyperparameters learnt while it trains a character-level LSTM."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.base import Case, Row
from experiments.networks import seeded
from experiments.towers import Towers, descend, step_decay
from metaimplicit import Hyperoptimizer
from metaimplicit.tuning.hyperoptimizers import Adam

State = tuple[Tensor, Tensor]  # (h, c) `[layers, streams, hidden]`


@dataclass(frozen=True)
class CharTower(Towers):
    """Adam on a character-level LSTM from several step sizes (Chandra et al. 2022).

    The text, by default Python's own help topics (`pydoc_data.topics`: of the Python that runs this), is cut 90 : 10
    into training and validation, and each of these into streams side by side, read window after window; the state is
    carried from one window to the next, without its graph. `plain`: lr as it starts; `step-decay`: lr × 0.1 after 1/2
    and 3/4 of the run; `tower`, `tower-adam`: lr, β₁ and β₂ learnt, under SGD or Adam. A seed is an initialisation.
    """

    start: tuple[float, ...] = (1e-4, 1e-3, 1e-1)
    """lr's to start from."""
    text: Path | None = None
    """A text file, UTF-8."""
    hidden: int = 128
    """Units of a layer of the LSTM."""
    layers: int = 1
    """Its layers."""
    embedding: int = 64
    """Numbers that stand for a character."""
    streams: int = 32
    """Texts read side by side, a batch."""
    window: int = 64
    """Characters of each, of a step: as far as gradients reach back."""
    epochs: int = 10
    """Passes through the training text."""
    outer_sgd: float = 1e-3
    """Step size of the SGD above, on lr itself and the logits of β₁ and β₂, of `tower`: the best of 1e-5, 1e-4 and 1e-3
    by the training losses from all three starts."""
    outer_adam: float = 0.01
    """The same of the Adam above, of `tower-adam`: the best of 1e-4, 1e-3 and 1e-2."""

    name: ClassVar[str] = "char-tower"
    listed: ClassVar[tuple[str, ...]] = ("start",)
    shown: ClassVar[dict[str, tuple[str, int]]] = {
        "bits": ("validation bits a character", 3), "perplexity": ("perplexity", 2), "loss": ("training loss", 3),
    }  # fmt: skip

    @property
    def starts(self) -> list[Case]:
        return [{"lr": lr} for lr in self.start]

    def quickened(self) -> CharTower:
        return replace(
            self,
            start=self.start[:1],
            seeds=1,
            hidden=8,
            layers=1,
            embedding=4,
            streams=16,
            window=512,
            epochs=1,
        )

    def cases(self) -> list[Case]:
        for option in ("hidden", "layers", "embedding", "streams", "window"):
            if (got := getattr(self, option)) < 1:
                raise ValueError(f"--{option}: got {got}, expected at least 1")
        self.data()
        return super().cases()

    def run(self, case: Case, out: Path) -> Row:
        torch.set_flush_denormal(
            True
        )  # saturated gates have gradients on which the CPU takes ten times as long
        try:
            return self._run(case)
        finally:
            torch.set_flush_denormal(False)

    def _run(self, case: Case) -> Row:
        train, validation, characters = self.data()
        with seeded(case["seed"]):
            model = CharLSTM(len(characters), self.embedding, self.hidden, self.layers).to(
                self.torch_device
            )
        train, validation = train.to(self.torch_device), validation.to(self.torch_device)
        windows = (train.shape[1] - 1) // self.window
        state: State | None = None

        def loss(step: int) -> Tensor:
            nonlocal state
            at = step % windows
            found, state = model.loss(train, at * self.window, self.window, state if at else None)
            return found

        steps = self.epochs * windows
        schedule = partial(step_decay, steps=steps) if case["method"] == "step-decay" else None
        row = descend(self.optimizer(case, model.parameters()), loss, steps, windows, schedule)
        row |= {
            "characters": len(characters),
            "parameters": sum(p.numel() for p in model.parameters()),
        }
        bits = math.nan if row["loss"] is None else model.bits(validation, self.window)
        if math.isfinite(bits):
            return row | {"bits": bits, "perplexity": 2**bits}
        if row["diverged"] is None:
            row |= {"diverged": steps, "reason": "the validation loss is not finite", "loss": None}
        return row | {"bits": None, "perplexity": None}

    def optimizer(self, case: Case, params: Iterable[Tensor]) -> torch.optim.Optimizer:
        """Of a case: torch's own Adam, or a tower."""
        if (above := self.above(case["method"])) is None:
            return torch.optim.Adam(params, case["lr"])
        return Hyperoptimizer(params, Adam(case["lr"], optimizer=above))

    def data(self) -> tuple[Tensor, Tensor, str]:
        """Training and validation text `[streams, length]`, as places in the third, the characters there are.

        Raises:
            FileNotFoundError: no file `text`.
            ValueError: it is not UTF-8, or too short.
        """
        text = help_topics() if self.text is None else read_text(self.text)
        cut, least = 9 * len(text) // 10, self.streams * (self.window + 1)
        if cut < least or len(text) - cut < 2 * self.streams:
            needed = max(math.ceil(least / 0.9), 20 * self.streams)
            raise ValueError(
                f"--text: got {len(text)} characters, expected about {needed} or more for {self.streams} streams and a "
                f"window of {self.window}; give a longer text, or fewer --streams"
            )
        characters = "".join(sorted(set(text)))
        place = {character: i for i, character in enumerate(characters)}
        numbers = torch.tensor([place[character] for character in text])
        train, validation = (
            side_by_side(part, self.streams) for part in (numbers[:cut], numbers[cut:])
        )
        return train, validation, characters


class CharLSTM(nn.Module):
    """Embedding, LSTM, a linear layer: scores of the character after each."""

    def __init__(self, characters: int, embedding: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, embedding)
        self.lstm = nn.LSTM(embedding, hidden, layers, batch_first=True)
        self.scores = nn.Linear(hidden, characters)

    def loss(
        self, text: Tensor, begin: int, size: int, state: State | None
    ) -> tuple[Tensor, State]:
        """Mean cross-entropy of characters begin + 1 … begin + size of all streams `[streams, length]`.

        Args:
            state: after character begin − 1; None: zeros.

        Returns:
            The loss; the state after character begin + size − 1, without its graph.
        """
        part = text[:, begin : begin + size + 1]
        outputs, (h, c) = self.lstm(self.embedding(part[:, :-1]), state)
        return F.cross_entropy(self.scores(outputs).flatten(0, 1), part[:, 1:].flatten()), (
            h.detach(),
            c.detach(),
        )

    @torch.no_grad()
    def bits(self, text: Tensor, window: int) -> float:
        """Mean −log₂ p of every character of the streams after its first, the state carried through."""
        total, state, last = 0.0, None, text.shape[1] - 1
        for begin in range(0, last, window):
            size = min(window, last - begin)
            nats, state = self.loss(text, begin, size, state)
            total += size * nats.item()
        return total / last / math.log(2)


def side_by_side(numbers: Tensor, streams: int) -> Tensor:
    """A text `[n]` cut into `[streams, n // streams]`, each row from where the one before ends on."""
    length = len(numbers) // streams
    return numbers[: streams * length].view(streams, length)


def help_topics() -> str:
    """What `help()` tells of Python's own language, topic by topic."""
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))


def read_text(path: Path) -> str:
    """A file of UTF-8; FileNotFoundError without it, ValueError for another encoding."""
    if not path.is_file():
        raise FileNotFoundError(
            f"--text: found no file {path}; name a text file, or leave it out for Python's topics"
        )
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"--text: {path}: got bytes that are not UTF-8 ({error}); convert the file first"
        ) from error
