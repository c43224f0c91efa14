"""Reweighting of text: 40 % of the labels are wrong, and three methods learn whom to trust.

python scripts/examples/reweighting_text.py     # about half a minute
"""

import time
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metaimplicit import TorchOptimizer, Tuner, tuning_problem
from metaimplicit.methods import make_method
from metaimplicit.tuning import ExampleWeights, Interval

TOPICS, WORDS, LENGTH, WIDTH = 4, 40, 12, 16
METHODS = {  # and the step size of the weights
    "equal weights": (make_method("sama"), 0.0),
    "cg": (make_method("cg", solver_steps=5, curvature="gauss-newton"), 0.3),
    "sama": (make_method("sama"), 0.3),
    "t1-t2": (make_method("t1-t2", scale=0.1), 0.3),
}


class Transformer(nn.Module):
    """One encoder layer over the words of a text, whose mean gives the scores of the topics."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.encoder = nn.TransformerEncoderLayer(WIDTH, 2, 32, dropout=0.0, batch_first=True)
        self.scores = nn.Linear(WIDTH, TOPICS)

    def forward(self, texts: Tensor) -> Tensor:
        """Words `[m, LENGTH]` to scores `[m, TOPICS]`."""
        scores: Tensor = self.scores(self.encoder(self.words(texts)).mean(1))
        return scores


def draw_texts(count: int) -> tuple[Tensor, Tensor]:
    """Texts and their topics. Half of the words are of the topic, the others are of any."""
    topics = torch.arange(count) % TOPICS
    own = WORDS // TOPICS * topics[:, None] + torch.randint(WORDS // TOPICS, (count, LENGTH))
    is_own = torch.rand(count, LENGTH) < 0.5
    return torch.where(is_own, own, torch.randint(WORDS, (count, LENGTH))), topics


def main(examples: int = 400, outer_steps: int = 60) -> None:
    """Train with each method, and print how many labels it judges rightly."""
    torch.manual_seed(0)
    (texts, topics), clean, test = draw_texts(examples), draw_texts(100), draw_texts(1000)
    wrong = torch.rand(examples) < 0.4
    labels = torch.where(wrong, (topics + torch.randint(1, TOPICS, (examples,))) % TOPICS, topics)
    train = {"inputs": texts, "targets": labels, "index": torch.arange(examples)}
    model = Transformer()
    weights = ExampleWeights(examples, start=0.5, domain=Interval(0, 1))

    for name, (method, rate) in METHODS.items():
        problem, meta, domains = tuning_problem(model, F.cross_entropy, [weights])
        tuner = Tuner(
            problem,
            meta,
            domains=domains,
            inner=TorchOptimizer(torch.optim.Adam, steps=5, lr=5e-3),
            method=method,
            optimizer=partial(torch.optim.Adam, lr=rate),
        )
        start = time.perf_counter()
        tuner.fit([train], [clean], steps=outer_steps)
        seconds = time.perf_counter() - start
        scores = torch.func.functional_call(model, tuner.params, (test[0],))
        accuracy = (scores.argmax(1) == test[1]).float().mean()
        judged = ((tuner.meta["example_weights"] < 0.5) == wrong).float().mean()
        print(f"{name:13}  test {accuracy:.1%}, judged rightly {judged:.1%}, {seconds:.0f} s")


if __name__ == "__main__":
    main()
