"""Towers on text: Adam's hyperparameters, learnt while it trains a character-level LSTM."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from command_line.ranges import Number, Numbers, Steps, Width, within
from torch import Tensor

from experiments.char_lstm import CharLSTM, State, Text, help_topics, read_text, side_by_side
from experiments.networks import parameter_count, seeded
from experiments.runs import Case, Cell, Row, mean
from experiments.towers import Towers, step_decay, train_with_curve
from metaimplicit import Hyperoptimizer
from metaimplicit.tuning.hyperoptimizers import Adam


@dataclass(frozen=True)
class CharTower(Towers):
    """Adam on a character-level LSTM from several step sizes (Chandra et al. 2022).

    The text is by default that of Python's own help topics, which depends on the version of Python.
    Its first 90 % are for training and the rest is for validation. Each part is cut into streams,
    which are read side by side, window after window. The LSTM's state is carried from one window to
    the next without its graph.

    The method `plain` keeps lr as it starts; `step-decay` multiplies it by 0.1 after half and three
    quarters of the run; `tower` and `tower-adam` learn lr, β₁ and β₂, by SGD and by Adam. Their
    step sizes are the best of three, a factor of ten apart, by the training losses from all three
    starts. A seed is an initialisation.
    """

    start: Numbers = (1e-4, 1e-3, 1e-1)
    """Step sizes lr to start from."""
    text: Path | None = None
    """Text file in UTF-8. If it is not given, the text is that of Python's help topics."""
    hidden: Width = 128
    """Number of units of each layer of the LSTM."""
    layers: Annotated[int, within(1, 100)] = 1
    """Number of layers of the LSTM."""
    embedding: Width = 64
    """Size of the embedding of a character."""
    streams: Annotated[int, within(1, 100_000)] = 32
    """Number of streams, which are the examples of a batch."""
    window: Annotated[int, within(1, 100_000)] = 64
    """Number of characters of each stream in a step. Gradients reach back no further."""
    epochs: Steps = 10
    """Number of passes through the training text."""
    outer_sgd: Number = 1e-3
    """Step size of the SGD that moves lr and the logits of β₁ and β₂ of `tower`."""
    outer_adam: Number = 0.01
    """Step size of the Adam that moves lr and the logits of β₁ and β₂ of `tower-adam`."""

    name = "char-tower"
    case_options = ("start",)
    quick_options: ClassVar[dict[str, Any]] = {
        "start": (1e-4,),
        "hidden": 8,
        "embedding": 4,
        "streams": 16,
        "window": 512,
        "epochs": 1,
    }
    result_columns: ClassVar[dict[str, Cell]] = {
        "validation bits a character": mean("bits", 3),
        "perplexity": mean("perplexity", 2),
        "training loss": mean("loss", 3),
    }

    @property
    def starts(self) -> list[Case]:
        """The step sizes to start from."""
        return [{"lr": lr} for lr in self.start]

    def check_options(self) -> None:
        """Raise ValueError for sizes out of range, and what `data` raises."""
        super().check_options()
        self.data()

    def run(self, case: Case, out: Path) -> Row:
        """Train the LSTM; the row has its curve, and its bits and perplexity on validation text."""
        # Saturated gates have denormal gradients, on which a CPU takes ten times as long.
        torch.set_flush_denormal(True)
        try:
            return self.train(case)
        finally:
            torch.set_flush_denormal(False)

    def train(self, case: Case) -> Row:
        """What `run` does, with denormal numbers as they are."""
        text = self.data()
        training = text.training.to(self.torch_device)
        validation = text.validation.to(self.torch_device)
        with seeded(case["seed"]):
            model = CharLSTM(
                len(text.characters),
                embedding=self.embedding,
                hidden=self.hidden,
                layers=self.layers,
            )
        model.to(self.torch_device)

        windows = (training.shape[1] - 1) // self.window
        state: State | None = None

        def loss(step: int) -> Tensor:
            nonlocal state
            window = step % windows
            before = state if window else None  # an epoch starts from the zero state
            first = window * self.window
            value, state = model.loss(training, first, self.window, state=before)
            return value

        steps = self.epochs * windows
        row = train_with_curve(
            self.optimizer(case, model.parameters()),
            loss,
            steps=steps,
            last=windows,
            schedule=partial(step_decay, steps=steps) if case["method"] == "step-decay" else None,
        )
        row["characters"] = len(text.characters)
        row["parameters"] = parameter_count(model)
        if row["diverged"] is not None:
            return row | {"bits": None, "perplexity": None}
        bits = model.bits(validation, self.window)
        perplexity = torch.tensor(bits, dtype=torch.float64).exp2().item()
        if not math.isfinite(perplexity):
            reason = "the validation perplexity is not finite"
            row |= {"diverged": steps, "reason": reason, "loss": None}
            return row | {"bits": None, "perplexity": None}
        return row | {"bits": bits, "perplexity": perplexity}

    def optimizer(self, case: Case, params: Iterable[Tensor]) -> torch.optim.Optimizer:
        """The optimiser of a case: torch's Adam, or a tower."""
        outer = self.outer_level(case["method"])
        if outer is None:
            return torch.optim.Adam(params, lr=case["lr"])
        return Hyperoptimizer(params, Adam(case["lr"], optimizer=outer))

    def data(self) -> Text:
        """The text in streams.

        Raises:
            FileNotFoundError: There is no file `text`.
            ValueError: The file is not UTF-8, or too short for the streams and the window.
        """
        text = help_topics() if self.text is None else read_text(self.text)
        cut = 9 * len(text) // 10
        training_least = self.streams * (self.window + 1)
        if cut < training_least or len(text) - cut < 2 * self.streams:
            needed = max(math.ceil(training_least / 0.9), 20 * self.streams)
            raise ValueError(
                f"--text: got {len(text)} characters, expected about {needed} or more for "
                f"{self.streams} streams and a window of {self.window}; give a longer text, or "
                "fewer --streams"
            )
        characters = "".join(sorted(set(text)))
        number = {character: i for i, character in enumerate(characters)}
        numbers = torch.tensor([number[character] for character in text])
        training = side_by_side(numbers[:cut], self.streams)
        validation = side_by_side(numbers[cut:], self.streams)
        return Text(training, validation, characters)
