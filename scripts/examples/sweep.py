"""A sweep of MAML's step sizes on Optuna: processes share one study, and poor trials end early.

python scripts/examples/sweep.py        # half a minute; once one has begun, others share its trials
"""

from pathlib import Path

import optuna
import torch
import torch.nn.functional as F

import tasks
from metaimplicit import GradientDescent, MetaLearner
from metaimplicit.models import MLP

STUDY = Path("runs/sweep.db")
META_STEPS = 200


def train(trial: optuna.Trial) -> float:
    """The validation error after one inner step. It decides what is pruned, too."""
    torch.manual_seed(0)
    splits = tasks.load("sinusoid", shots=10, queries=10)
    episodes = tasks.EpisodeSampler(splits.train, tasks=25, seed=0)
    validation = tasks.EpisodeSampler(splits.validation, tasks=200, seed=1)[0]

    inner = GradientDescent(steps=1, lr=trial.suggest_float("inner_lr", 1e-3, 1e-1, log=True))
    learner = MetaLearner(MLP(1, 1, hidden=(40, 40)), F.mse_loss, inner=inner, vectorize="vmap")
    outer_lr = trial.suggest_float("outer_lr", 1e-4, 1e-1, log=True)
    optimizer = torch.optim.Adam(learner.parameters(), lr=outer_lr)
    error = float("inf")
    for step in range(1, META_STEPS + 1):
        optimizer.zero_grad()
        learner.backward(episodes[step])
        optimizer.step()
        if step % 50 == 0:
            losses, _ = learner.evaluate(validation, steps=1)
            error = losses[-1].mean().item()
            trial.report(error, step)
            if trial.should_prune():
                raise optuna.TrialPruned
    return error


def main(trials: int = 12, study_file: Path = STUDY) -> optuna.Study:
    """Add trials to the study, which is made if it does not exist, and print the best one."""
    study_file.parent.mkdir(parents=True, exist_ok=True)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        study_name="maml-sinusoid",
        storage=f"sqlite:///{study_file}",
        load_if_exists=True,
        pruner=optuna.pruners.MedianPruner(n_startup_trials=4),
    )
    study.optimize(train, n_trials=trials)
    ended = [trial.state.name.lower() for trial in study.trials]
    settings = ", ".join(f"{name} {value:.2g}" for name, value in study.best_params.items())
    print(f"{ended.count('complete')} trials completed, {ended.count('pruned')} pruned")
    print(f"validation error {study.best_value:.3f} with {settings}")
    return study


if __name__ == "__main__":
    main()
