"""A loss that a schedule changes between calls: f is that of the loss as it is."""

from dataclasses import dataclass
from types import ModuleType

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from tuning_loop import C, M, Y, draw

from metaimplicit import tuning_problem
from metaimplicit.loss_state import LossState
from metaimplicit.tuning import ExampleWeights, WeightDecay

W = torch.linspace(0.5, 2, M, dtype=torch.float64)
CLASS_WEIGHTS = torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)
SCHEDULE = {"gamma": 0.0}


def cross_entropies(z, **options):
    return F.cross_entropy(z, Y, reduction="none", **options)


def focal(z, y, gamma):
    losses = F.cross_entropy(z, y, reduction="none")
    return (1 - (-losses).exp()) ** gamma * losses


class Focal(nn.Module):
    def __init__(self):
        super().__init__()
        self.gamma = 0.0
        self.reduction = "mean"

    def forward(self, z, y):
        losses = focal(z, y, self.gamma)
        return losses if self.reduction == "none" else losses.mean()


class OfClass:
    """A callable object whose number is one of its class."""

    gamma = 0.0

    def __call__(self, z, y, reduction="mean"):
        losses = focal(z, y, self.gamma)
        return losses if reduction == "none" else losses.mean()


def of_global(z, y, reduction="mean"):
    losses = focal(z, y, SCHEDULE["gamma"])
    return losses if reduction == "none" else losses.mean()


def weighted(weight):
    return lambda z, y, reduction="mean": F.cross_entropy(z, y, weight, reduction=reduction)


class Settings:
    weight = None


SETTINGS_MODULE = ModuleType("settings")


def of_named_class(z, y, reduction="mean"):
    return F.cross_entropy(z, y, Settings.weight, reduction=reduction)


def of_module(z, y, reduction="mean"):
    return F.cross_entropy(z, y, SETTINGS_MODULE.weight, reduction=reduction)


def of_itself(z, y, reduction="mean"):
    return F.cross_entropy(z, y, of_itself.weight, reduction=reduction)


class Package:
    """A class in a class, as a module in a module."""

    settings = Settings


SETTINGS_MODULE.nested = Package


def of_nested(z, y, reduction="mean"):
    weight = SETTINGS_MODULE.nested.settings.weight
    return F.cross_entropy(z, y, weight, reduction=reduction)


class OfClassMethod:
    weight = None

    @classmethod
    def loss(cls, z, y, reduction="mean"):
        return F.cross_entropy(z, y, cls.weight, reduction=reduction)


class PrivateSlot:
    __slots__ = ("__weight",)

    def __init__(self):
        self.__weight = None

    weight = property(lambda self: self.__weight)

    @weight.setter
    def weight(self, value):
        self.__weight = value

    def __call__(self, z, y, reduction="mean"):
        return F.cross_entropy(z, y, self.__weight, reduction=reduction)


@dataclass(slots=True)
class Slotted:
    weight: torch.Tensor | None = None

    def __call__(self, z, y, reduction="mean"):
        return F.cross_entropy(z, y, self.weight, reduction=reduction)


class OfProperty:
    @property
    def weight(self):
        return Settings.weight

    def __call__(self, z, y, reduction="mean"):
        return F.cross_entropy(z, y, self.weight, reduction=reduction)


SLOTTED = Slotted()
PRIVATE = PrivateSlot()
HOLDERS = (Settings, SETTINGS_MODULE, of_itself, SLOTTED, PRIVATE, OfClassMethod)  # of a `weight`


def set_weight(holder):
    return lambda loss: setattr(holder, "weight", CLASS_WEIGHTS)


def set_attribute(name, value):
    return lambda loss: setattr(loss, name, value)


def ones():
    return torch.ones(C, dtype=torch.float64)


SHARED = ones()


def right_focal(z):
    return (W * focal(z, Y, 2.0)).mean()


def right_weighted(z):
    return (W * cross_entropies(z, weight=CLASS_WEIGHTS)).sum() / CLASS_WEIGHTS[Y].sum()


CHANGES = {
    "smoothing": (
        nn.CrossEntropyLoss(),
        set_attribute("label_smoothing", 0.3),
        lambda z: (W * cross_entropies(z, label_smoothing=0.3)).mean(),
    ),
    "ignored class": (
        nn.CrossEntropyLoss(),
        set_attribute("ignore_index", 1),
        lambda z: (W * cross_entropies(z))[Y != 1].sum() / (Y != 1).sum(),
    ),
    "reduction": (
        nn.CrossEntropyLoss(),
        set_attribute("reduction", "sum"),
        lambda z: (W * cross_entropies(z)).sum(),
    ),
    "gamma of a module": (Focal(), set_attribute("gamma", 2.0), right_focal),
    "gamma of a class": (
        OfClass(),
        lambda loss: setattr(type(loss), "gamma", 2.0),
        right_focal,
    ),
    "gamma of a global": (of_global, lambda loss: SCHEDULE.update(gamma=2.0), right_focal),
    "weights replaced": (
        nn.CrossEntropyLoss(ones()),
        lambda loss: setattr(loss, "weight", CLASS_WEIGHTS.clone()),  # which the test overwrites
        right_weighted,
    ),
    "weights in place": (
        nn.CrossEntropyLoss(ones()),
        lambda loss: loss.weight.copy_(CLASS_WEIGHTS),
        right_weighted,
    ),
    "weights in place, past autograd": (
        nn.CrossEntropyLoss(ones()),
        lambda loss: loss.weight.data.copy_(CLASS_WEIGHTS),
        right_weighted,
    ),
    "weights replaced past autograd": (
        nn.CrossEntropyLoss(ones()),
        lambda loss: setattr(loss.weight, "data", CLASS_WEIGHTS.clone()),
        right_weighted,
    ),
    "weights of a class": (of_named_class, set_weight(Settings), right_weighted),
    "weights of a class by a property": (OfProperty(), set_weight(Settings), right_weighted),
    "weights of a module": (of_module, set_weight(SETTINGS_MODULE), right_weighted),
    "weights of the function": (of_itself, set_weight(of_itself), right_weighted),
    "weights of a class in a module": (of_nested, set_weight(Settings), right_weighted),
    "weights of a class method": (
        OfClassMethod.loss,
        set_weight(OfClassMethod),
        right_weighted,
    ),
    "weights of a private slot": (PRIVATE, set_weight(PRIVATE), right_weighted),
    "weights of a slot": (SLOTTED, set_weight(SLOTTED), right_weighted),
    "weights of a closure": (
        weighted(SHARED),
        lambda loss: SHARED.copy_(CLASS_WEIGHTS),
        right_weighted,
    ),
}


@pytest.fixture(autouse=True)
def _no_weights(monkeypatch):
    for holder in HOLDERS:
        monkeypatch.setattr(holder, "weight", None, raising=False)


@pytest.mark.parametrize(
    ("name", "batch"),
    [
        *((name, "same batch") for name in CHANGES),
        *((name, "fresh batch") for name in ("smoothing", "gamma of a global", "weights in place")),
    ],
)
def test_a_changed_loss_is_taken_as_it_is(name, batch, monkeypatch):
    loss, change, right = CHANGES[name]
    SHARED.fill_(1.0)
    monkeypatch.setitem(SCHEDULE, "gamma", 0.0)
    monkeypatch.setattr(OfClass, "gamma", 0.0)
    original = dict(getattr(loss, "__dict__", {}))
    case = draw()
    problem, meta, _ = tuning_problem(case.model, loss, [ExampleWeights(M)])
    params = problem.init(meta, None)
    y = Y.clone()
    try:
        problem.inner_loss(params, {"example_weights": W}, (case.x, y, torch.arange(M)))
        change(loss)
        targets = y.clone() if batch == "fresh batch" else y
        given = (case.x, targets, torch.arange(M))
        got = problem.inner_loss(params, {"example_weights": W}, given)
        torch.testing.assert_close(got, right(case.model(case.x)))
    finally:
        getattr(loss, "__dict__", {}).update(original)
        if isinstance(loss, nn.CrossEntropyLoss) and loss.weight is not None:
            loss.weight.fill_(1.0)


def test_labels_that_are_written_to_past_autograd_count_as_they_are():
    case = draw()
    problem, meta, _ = tuning_problem(case.model, nn.CrossEntropyLoss(), [ExampleWeights(M)])
    params = problem.init(meta, None)
    y = torch.where(torch.arange(M) == 0, -100, Y)
    batch = (case.x, y, torch.arange(M))
    for _ in range(2):
        got = problem.inner_loss(params, meta, batch)
        torch.testing.assert_close(got, F.cross_entropy(case.model(case.x), y))
        y.numpy()[1:3] = -100


def test_a_loss_that_holds_too_much_to_compare_is_always_looked_at_again():
    numbers = [float(i) for i in range(1000)]
    state = LossState(lambda z, y: (z - y).mean() * numbers[0])
    assert state.has_changed()
    assert state.has_changed()


@pytest.mark.parametrize("name", CHANGES)
def test_a_loss_that_stays_has_not_changed(name):
    loss, *_ = CHANGES[name]
    state = LossState(loss)
    loss(torch.randn(M, C, dtype=torch.float64), Y)
    assert not state.has_changed()


class Centred(nn.Module):
    """Cross-entropy of outputs minus a moving average of them, which every call moves."""

    def __init__(self):
        super().__init__()
        self.register_buffer("center", torch.zeros(C, dtype=torch.float64))
        self.calls = 0

    def forward(self, z, y):
        with torch.no_grad():
            self.center.mul_(0.9).add_(0.1 * z.mean(0))
        self.calls += 1
        return F.cross_entropy(z - self.center, y) * self.calls


def test_a_loss_that_changes_itself_is_called_as_often_as_in_a_plain_loop():
    case = draw()
    loss, plain = Centred(), Centred()
    problem, meta, _ = tuning_problem(case.model, loss, [WeightDecay(start=0.0)])
    params = problem.init(meta, None)
    for _ in range(3):
        got = problem.inner_loss(params, meta, (case.x, Y.clone()))
        torch.testing.assert_close(got, plain(case.model(case.x), Y))


def test_a_weighed_loss_that_changes_itself_is_refused():
    case = draw()
    problem, meta, _ = tuning_problem(case.model, Centred(), [ExampleWeights(M)])
    batch = (case.x, Y, torch.arange(M))
    with pytest.raises(ValueError, match="the value of Centred is no mean"):
        problem.inner_loss(problem.init(meta, None), meta, batch)
