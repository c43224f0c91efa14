"""Data reweighting: half of the training labels are wrong; a clean validation set finds them.

python scripts/examples/reweighting.py          # about ten seconds
"""

import torch
import torch.nn.functional as F
from torch import nn

from metaimplicit import CG, Implicit, Proximal, TorchOptimizer, Tuner, tuning_problem
from metaimplicit.tuning import ExampleWeights, Interval

EXAMPLES = 200
CLASSES = 4


def main(outer_steps: int = 60) -> float:
    """Learn a weight for each example; return the share of examples that are judged rightly."""
    torch.manual_seed(0)
    centers = 2 * torch.randn(CLASSES, 10)
    labels = torch.arange(EXAMPLES) % CLASSES
    inputs = centers[labels] + torch.randn(EXAMPLES, 10)
    wrong = torch.arange(EXAMPLES) < EXAMPLES // 2
    shift = torch.randint(1, CLASSES, (EXAMPLES,))
    corrupted = torch.where(wrong, (labels + shift) % CLASSES, labels)
    clean_labels = torch.arange(80) % CLASSES
    clean_inputs = centers[clean_labels] + torch.randn(80, 10)

    train = {"inputs": inputs, "targets": corrupted, "index": torch.arange(EXAMPLES)}
    validation = {"inputs": clean_inputs, "targets": clean_labels}

    # Every training example has a weight in (0, 1), which the validation loss moves.
    problem, meta, domains = tuning_problem(
        nn.Linear(10, CLASSES),
        F.cross_entropy,
        [ExampleWeights(EXAMPLES, start=0.5, domain=Interval(0, 1))],
        penalty=Proximal(0.01, center="zero"),
    )
    tuner = Tuner(
        problem,
        meta,
        domains=domains,
        inner=TorchOptimizer(torch.optim.SGD, steps=10, lr=0.1, momentum=0.9),
        method=Implicit(CG(max_steps=10)),
        optimizer=lambda free: torch.optim.Adam(free, lr=0.3),
    )
    tuner.fit([train], [validation], steps=outer_steps)

    judged_wrong = tuner.meta["example_weights"] < 0.25
    right = float((judged_wrong == wrong).float().mean())
    print(f"{int(judged_wrong.sum())} of {EXAMPLES} examples are judged to be mislabelled")
    print(f"the judgement is right for {right:.0%} of the examples")
    return right


if __name__ == "__main__":
    main()
