"""One MAML meta-gradient, as written with higher, learn2learn or TorchOpt, and with metaimplicit.

python scripts/examples/coming_from_other_libraries.py      # of what is installed; a few seconds
"""

import importlib.util

import higher
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metaimplicit import GradientDescent, MetaLearner

STEPS = 3
LR = 0.1
LABELS = torch.arange(4).repeat(5, 1)
SUPPORT, QUERY = torch.randn(2, 5, 4, 6, generator=torch.Generator().manual_seed(0))


def with_higher(model: nn.Module) -> None:
    """Add the meta-gradient by higher to `.grad`."""
    inner = torch.optim.SGD(model.parameters(), lr=LR)
    for support, query, labels in zip(SUPPORT, QUERY, LABELS, strict=True):
        with higher.innerloop_ctx(model, inner, copy_initial_weights=False) as (fmodel, diffopt):
            for _ in range(STEPS):
                diffopt.step(F.cross_entropy(fmodel(support), labels))
            (F.cross_entropy(fmodel(query), labels) / len(SUPPORT)).backward()


def with_learn2learn(model: nn.Module) -> None:
    """Add the meta-gradient by learn2learn to `.grad`."""
    import learn2learn

    maml = learn2learn.algorithms.MAML(model, lr=LR)
    for support, query, labels in zip(SUPPORT, QUERY, LABELS, strict=True):
        learner = maml.clone()
        for _ in range(STEPS):
            learner.adapt(F.cross_entropy(learner(support), labels))
        (F.cross_entropy(learner(query), labels) / len(SUPPORT)).backward()


def with_torchopt(model: nn.Module) -> None:
    """Add the meta-gradient by TorchOpt to `.grad`."""
    import torchopt

    inner = torchopt.MetaSGD(model, lr=LR)
    for support, query, labels in zip(SUPPORT, QUERY, LABELS, strict=True):
        start = torchopt.extract_state_dict(model)
        for _ in range(STEPS):
            inner.step(F.cross_entropy(model(support), labels))
        (F.cross_entropy(model(query), labels) / len(SUPPORT)).backward()
        torchopt.recover_state_dict(model, start)


def with_metaimplicit(model: nn.Module) -> None:
    """Add the meta-gradient by metaimplicit to `.grad`."""
    learner = MetaLearner(model, F.cross_entropy, inner=GradientDescent(steps=STEPS, lr=LR))
    learner.backward(((SUPPORT, LABELS), (QUERY, LABELS)))


def main() -> dict[str, Tensor]:
    """The meta-gradient by each installed library; print how far each is from ours."""
    ways = {"metaimplicit": with_metaimplicit, "higher": with_higher}
    ways |= {"learn2learn": with_learn2learn, "torchopt": with_torchopt}
    gradients: dict[str, Tensor] = {}
    for library in filter(importlib.util.find_spec, ways):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
        ways[library](model)
        parts = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        gradients[library] = torch.cat(parts)
        difference = (gradients[library] - gradients["metaimplicit"]).abs().max()
        print(f"{library}: largest difference from metaimplicit {difference:.1e}")
    return gradients


if __name__ == "__main__":
    main()
