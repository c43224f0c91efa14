"""Data classes are values that nothing can change, but for a few that count or remember."""

import dataclasses
import importlib
import pkgutil

import metaimplicit

MUTABLE = {
    "metaimplicit.compilation._Family",
    "metaimplicit.compiled.Said",
    "metaimplicit.inner.differentiable._RunningLoop",
    "metaimplicit.solvers.iteration.Progress",
    "metaimplicit.training.progress.Progress",
    "metaimplicit.tuning.early_stopping.EarlyStopping",
    "metaimplicit.vectorization.choice.ShapeRecord",
}


def test_data_classes_are_frozen_unless_they_are_listed():
    mutable = set()
    for module in pkgutil.walk_packages(metaimplicit.__path__, "metaimplicit."):
        for name, kind in vars(importlib.import_module(module.name)).items():
            is_own = isinstance(kind, type) and kind.__module__ == module.name
            if is_own and dataclasses.is_dataclass(kind) and not kind.__dataclass_params__.frozen:
                mutable.add(f"{module.name}.{name}")
    assert mutable == MUTABLE
