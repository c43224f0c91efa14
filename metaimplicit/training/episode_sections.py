"""The sections of a page that show tasks of classification, and which classes were confused."""

from __future__ import annotations

import torch
from torch import Tensor

from metaimplicit.learner import Episode
from metaimplicit.training.page import Html, element, join, note, picture
from metaimplicit.training.predictions import Confusion, Predictions

# What of a task is shown. A page stays below 2 MB with images of noise, which compress badly.
MOST_WAYS = 8
MOST_SHOTS = 3
MOST_QUERIES = 6
MOST_PAIRS = 12  # of classes that were confused
MOST_CLASSES = 20  # in a matrix


def episodes_section(predictions: Predictions) -> Html:
    """Some tasks: a row for each class, with its support and what was said of its queries."""
    sure = predictions.probabilities.amax(-1)
    right = predictions.right
    wrong = predictions.wrong
    words = [
        f"The worst, a middling and the best of {len(right)} tasks. A row has the support examples "
        "of a class, then its queries: ✓ with the probability of the right class, or ✗ with the "
        "class that was chosen instead, and its probability.",
        _confidence("where it is right", sure[right]),
        _confidence("where it is wrong", sure[wrong & predictions.is_choice]),
        _without_choice(predictions),
    ]
    shown = [_episode(predictions, task) for task in predictions.episodes]
    return join([note(" ".join(filter(None, words))), *shown])


def confusion_section(predictions: Predictions) -> Html:
    """A matrix if there are few classes, and the pairs of classes that were confused most."""
    if predictions.classes is None:
        return note("Which classes are behind the ways of these tasks is unknown.")
    confusion = Confusion.of(predictions)
    is_small = len(confusion.numbers) <= MOST_CLASSES
    matrix = [_matrix(predictions, confusion)] if is_small else []
    words = _without_choice(predictions)
    warning = [note(words)] if words else []
    return join([*warning, *matrix, _pairs(predictions, confusion)])


def _without_choice(predictions: Predictions) -> str:
    counted = predictions.is_counted
    missing = int((counted & ~predictions.is_choice).sum())
    if missing == 0:
        return ""
    return (
        f"For {missing} of {int(counted.sum())} queries the learner chose no class, because their "
        "probabilities are NaN. They count as wrong."
    )


def _confidence(where: str, probabilities: Tensor) -> str:
    if len(probabilities) == 0:
        return ""
    mean = 100 * float(probabilities.mean())
    return f"The mean probability of the choice {where} is {mean:.0f} %."


def _episode(predictions: Predictions, task: int) -> Html:
    episode = predictions.episodes[task]
    right = predictions.right[task]
    wrong = predictions.wrong[task]
    targets = predictions.targets[task]
    ways = predictions.probabilities.shape[-1]
    errors = torch.stack([wrong[targets == way].sum() for way in range(ways)])
    shown = sorted(errors.argsort(descending=True, stable=True)[:MOST_WAYS].tolist())
    heading = f"Task {task + 1}: {int(right.sum())} of {int((right | wrong).sum())} right"
    if len(shown) < ways:
        heading += f"; the {len(shown)} of {ways} classes with most errors"
    rows = (
        _way(
            predictions,
            task=task,
            way=way,
            episode=episode,
        )
        for way in shown
    )
    return element("div", element("h3", heading), *rows, class_="episode")


def _way(predictions: Predictions, *, task: int, way: int, episode: Episode) -> Html:
    name = predictions.name_of(task, way)
    mine = (episode.support.targets == way).nonzero().flatten()[:MOST_SHOTS]
    support = [_shot(episode.support.inputs[i], f"support example of {name}") for i in mine]
    right = predictions.right[task]
    is_counted = predictions.is_counted[task]
    queries = ((episode.query.targets == way) & is_counted).nonzero().flatten()
    wrong_first = queries[right[queries].int().argsort(stable=True)][:MOST_QUERIES]
    answers = [
        _answer(
            predictions,
            task=task,
            query=int(i),
            image=episode.query.inputs[i],
        )
        for i in wrong_first.sort().values
    ]
    return element(
        "div",
        element("div", name, class_="name"),
        element("div", *support, class_="support"),
        element("div", *answers, class_="queries"),
        class_="way",
    )


def _answer(predictions: Predictions, *, task: int, query: int, image: Tensor) -> Html:
    """A query example, and what was said of it."""
    if not predictions.is_choice[task, query]:
        says = element("figcaption", "✗ no choice", class_="says")
        return _shot(image, "no class chosen", says, kind="wrong")
    choice = int(predictions.choices[task, query])
    sure = f"{100 * float(predictions.probabilities[task, query, choice]):.0f}\N{NO-BREAK SPACE}%"
    name = predictions.name_of(task, choice)
    if predictions.right[task, query]:
        says = element("figcaption", f"✓\N{NO-BREAK SPACE}{sure}", class_="says")
        return _shot(
            image,
            f"rightly taken for {name}, {sure}",
            says,
            kind="right",
        )
    says = element(
        "figcaption",
        f"✗\N{NO-BREAK SPACE}{sure} ",
        element("span", name),
        class_="says",
    )
    return _shot(image, f"wrongly taken for {name}, {sure}", says, kind="wrong")


def _shot(image: Tensor, alt: str, says: Html | None = None, *, kind: str = "") -> Html:
    drawn = element("span", "features", class_="soft")
    if _is_image(image):
        drawn = picture(image, alt)
    return element("figure", drawn, says, class_=f"shot {kind}".strip())


def _is_image(x: Tensor) -> bool:
    return x.dim() == 3 and x.shape[0] in (1, 3)


def _matrix(predictions: Predictions, confusion: Confusion) -> Html:
    shares = confusion.counts / confusion.chances.clamp(min=1)
    names = [_name(predictions, number) for number in confusion.numbers.tolist()]
    head = element("tr", element("th"), *(element("th", n, title=n) for n in names))
    rows = []
    for i, name in enumerate(names):
        cells = (
            element(
                "td",
                f"{100 * share:.0f}" if share > 0 else None,
                class_="hit" if i == j else "miss",
                style=f"--share:{share:.2f}",
            )
            for j, share in enumerate(shares[i].tolist())
        )
        rows.append(element("tr", element("th", name, title=name), *cells))
    words = (
        "Rows are the right classes, columns the chosen ones. A number is the percentage of the "
        "queries of its row that were taken for its column, in tasks that have both classes."
    )
    content = element(
        "table",
        element("thead", head),
        element("tbody", *rows),
        class_="matrix",
    )
    return join([note(words), element("div", content, class_="scroll")])


def _pairs(predictions: Predictions, confusion: Confusion) -> Html:
    """The pairs of classes that were confused most, by count."""
    wrong = confusion.counts.clone().fill_diagonal_(0)
    n = len(wrong)
    order = wrong.flatten().argsort(descending=True, stable=True)[:MOST_PAIRS].tolist()
    pairs = []
    for i, j in (divmod(position, n) for position in order):
        if count := int(wrong[i, j]):
            true, chosen = (_class(predictions, int(confusion.numbers[k])) for k in (i, j))
            words = f"taken for the other in {count} of {int(confusion.chances[i, j])} queries"
            pairs.append(
                element(
                    "div",
                    true,
                    "→",
                    chosen,
                    element("span", words),
                    class_="pair",
                )
            )
    if not pairs:
        return note("No query was taken for one of another class.")
    words = (
        f"The pairs of {n} classes with most errors. The queries are those of the first class, in "
        "tasks that have both."
    )
    return join([note(words), element("div", *pairs, class_="pairs")])


def _class(predictions: Predictions, number: int) -> Html:
    name = _name(predictions, number)
    example = predictions.examples.get(number)
    if example is None or not _is_image(example):
        return element("span", name)
    return _shot(example, f"an example of {name}", element("figcaption", name))


def _name(predictions: Predictions, number: int) -> str:
    return predictions.names.get(number, f"class {number}")
