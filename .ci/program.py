"""A training program of a user, run by `.ci/run` on the built wheel and outside of the checkout."""

from pathlib import Path

import torch
from torch import nn

import metaimplicit
import tasks
from metaimplicit import GradientDescent, MetaLearner
from metaimplicit.training import Budget, fit, read_metrics

HERE = Path(__file__).parent
for package in (metaimplicit, tasks):
    assert Path(str(package.__file__)).is_relative_to(HERE), package.__file__
assert list(HERE.glob("installed/metaimplicit/training/*.css"))  # of the pages of runs

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 1))
inner = GradientDescent(steps=5, lr=0.01)
learner = MetaLearner(model, nn.functional.mse_loss, inner=inner, method="cg")
optimizer = torch.optim.Adam(learner.parameters())
sampler = tasks.EpisodeSampler(tasks.load("sinusoid", shots=5).train, tasks=4)
fit(learner, optimizer, sampler, out=HERE / "run", budget=Budget(steps=20), bar=False)
assert [line["step"] for line in read_metrics(HERE / "run")] == list(range(1, 21))
