"""The forms that batches of few-shot tasks come in, and the one form that they are read to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from metaimplicit.labels import SHORT_INTEGERS
from metaimplicit.learner.episodes import Episode, Pair
from metaimplicit.task_axis import reject_hidden_tensors
from metaimplicit.tensors import recordable, with_known_types

# What two parts may be called, in an object or a dict that holds them.
SETS = (("support", "query"), ("train", "test"))
PARTS = (("inputs", "targets"),)


def name_parts(batch: Any) -> Episode | list[Episode]:
    """A batch of tasks in any accepted form, with its parts under their names.

    The forms are an object with `support` and `query`, a dict with these keys or with "train" and
    "test" (torchmeta), a pair `(support, query)`, and a list of tasks, each of which has one of
    these forms without the task axis. A set of examples is a pair `(inputs, targets)`.

    Args:
        batch: The batch.

    Returns:
        One episode whose tensors carry the task axis first, or a list with one episode for each
        task. Inputs and targets are the batch's own, with mappings as dicts and arrays as tensors.

    Raises:
        ValueError: The batch has another form, or one that can be read in two ways.

    Example:
        >>> pair = (torch.zeros(4, 3, 2), torch.zeros(4, 3))  # 4 tasks of 3 examples
        >>> name_parts({"train": pair, "test": pair}).support.inputs.shape
        torch.Size([4, 3, 2])
    """
    if _is_list_of_tasks(batch):
        return [_name_sets(task) for task in batch]
    return _name_sets(batch)


def read_episodes(batch: Any) -> list[Episode]:
    """A batch of tasks in any accepted form, as episodes whose tensors carry the task axis first.

    Lists in both the inputs and the targets of a set hold one entry for each task, and so do nested
    tensors. A list in the inputs alone holds several inputs, like a tuple. Class indices become
    int64.

    Args:
        batch: As for `name_parts`.

    Returns:
        One episode if all tasks have the same shapes. Otherwise one for each task, in their order:
        nothing is padded. Tensors that autograd cannot record (of `inference_mode`) are copied.

    Raises:
        ValueError: The batch has another form, or its sets differ in their numbers of tasks.

    Example:
        >>> short = (torch.zeros(3, 2), torch.zeros(3))  # 3 examples
        >>> long = (torch.zeros(5, 2), torch.zeros(5))
        >>> [len(e.query.targets) for e in read_episodes([(short, long), (short, long)])]
        [2]
        >>> [len(e.query.targets) for e in read_episodes([(short, long), (long, short)])]
        [1, 1]
    """
    named = name_parts(batch)
    if isinstance(named, Episode):
        if not any(_has_list(pair.inputs) and _has_list(pair.targets) for pair in named):
            return [_plain_episode(named)]
        named = _split_tasks(named)
    tasks = [_plain_episode(task) for task in named]
    if _have_same_shapes(tasks):
        return [tree_map(_stack, *tasks)]
    return [tree_map(_stack, task) for task in tasks]


def read_support(support: Any, *, batched: bool) -> list[Pair]:
    """Support sets without query sets, read as `read_episodes` reads both.

    Args:
        support: A pair `(inputs, targets)`, of one task or, if `batched`, of a batch of tasks. A
            batch may also be a list of tuples, one for each task.
        batched: Whether it holds a batch of tasks.

    Example:
        >>> read_support((torch.zeros(3, 2), torch.zeros(3)), batched=False)[0].inputs.shape
        torch.Size([1, 3, 2])
    """
    if batched and _is_list(support) and all(isinstance(pair, tuple) for pair in support):
        return [read.support for read in read_episodes([(pair, pair) for pair in support])]
    inputs, targets = _two_parts(support, PARTS, "support")
    pair = Pair(_with_known_types(inputs), _with_known_types(targets))
    episode = Episode(pair, pair)
    return [read.support for read in read_episodes(episode if batched else [episode])]


def plain_inputs(inputs: Any) -> Any:
    """Inputs as the model is called with them: lists become tuples, and mappings become dicts.

    Example:
        >>> plain_inputs([1, {"mask": [2, 3]}])
        (1, {'mask': (2, 3)})
    """
    return _rebuild(inputs, lambda x: x)


def may_be_batches(batch: Any, tasks: Episode) -> bool:
    """Whether this is a list of tasks that may be batches of tasks.

    Those have inputs and targets `[a, b, ...]`. So do tasks whose targets have a label for each
    position of their inputs.

    Args:
        batch: As for `name_parts`.
        tasks: What it was read as, with the task axis first.

    Example:
        >>> pair = (torch.zeros(4, 5, 3), torch.zeros(4, 5))
        >>> batches = [{"support": pair, "query": pair}] * 2  # of 4 tasks
        >>> may_be_batches(batches, *read_episodes(batches))
        True
    """
    if not _is_list_of_tasks(batch):
        return False
    inputs, targets = tasks.support
    if not isinstance(inputs, Tensor) or not isinstance(targets, Tensor):
        return False
    return targets.dim() > 2 and inputs.shape[:3] == targets.shape[:3]


def _is_list_of_tasks(batch: Any) -> bool:
    if not isinstance(batch, (list, tuple)) or not batch:
        return False
    if all(_names_in(task, SETS) for task in batch):
        return True
    pairs_of_pairs = all(_is_two(task) and all(map(_is_pair, task)) for task in batch)
    if not pairs_of_pairs or len(batch) != 2:
        return pairs_of_pairs
    # They are two tasks, or two sets that have two inputs and two targets each, or lists of two
    # tasks. A pair of sets is a tuple, unless it was made of lists throughout.
    sets = [examples for task in batch for examples in task]
    if _is_list(batch) and all(map(_is_list, sets)):
        raise ValueError(
            "episodes: got a list of two with lists of two, which may be two tasks or two sets; "
            "name the sets, {'support': …, 'query': …}"
        )
    return _is_list(batch)


def _name_sets(value: Any) -> Episode:
    sets = _two_parts(value, SETS, "episodes")
    pairs = []
    for name, examples in zip(SETS[0], sets, strict=True):
        inputs, targets = _two_parts(examples, PARTS, f"episodes.{name}")
        pairs.append(Pair(_with_known_types(inputs), _with_known_types(targets)))
    return Episode(*pairs)


def _with_known_types(tree: Any) -> Any:
    """The tree with dicts and tensors in it, and a nested tensor as the list of its tensors."""
    if isinstance(tree, Tensor) and tree.is_nested:
        return list(tree.unbind())
    return with_known_types(tree)


def _two_parts(value: Any, names: Sequence[tuple[str, str]], what: str) -> tuple[Any, Any]:
    """Two parts by their names, or in their order."""
    known = _names_in(value, names)
    if known:
        parts = [value[n] if isinstance(value, Mapping) else getattr(value, n) for n in known]
        return parts[0], parts[1]
    if not _is_two(value):
        forms = " or ".join(f"({first}, {second})" for first, second in names)
        raise ValueError(
            f"{what}: got {_describe(value)}, expected a pair {forms}, or an object or dict with "
            "these names" + ("; or a list of such tasks" if names is SETS else "")
        )
    return value[0], value[1]


def _names_in(value: Any, names: Sequence[tuple[str, str]]) -> tuple[str, str] | None:
    for first, second in names:
        if isinstance(value, Mapping):
            if first in value and second in value:
                return first, second
        elif hasattr(value, first) and hasattr(value, second):
            return first, second
    return None


def _is_two(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 2


def _is_pair(value: Any) -> bool:
    return _is_two(value) or _names_in(value, PARTS) is not None


def _describe(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"{type(value).__name__} with the keys {list(value)}"
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    length = f" of {len(value)}" if isinstance(value, Sequence) else ""
    return f"{type(value).__name__}{length}"


def _has_list(tree: Any) -> bool:
    if isinstance(tree, Tensor):
        return False
    return any(_is_list(leaf) for leaf in _listed_leaves(tree))


def _is_list(value: Any) -> bool:
    return isinstance(value, list)


def _listed_leaves(tree: Any) -> list[Any]:
    """The leaves of a pytree. A list is one of them."""
    leaves: list[Any] = tree_leaves(tree, is_leaf=_is_list)
    return leaves


def _split_tasks(batch: Episode) -> list[Episode]:
    """The tasks of a batch some of whose parts are lists with one entry for each task."""
    parts = [x for x in _listed_leaves(batch) if isinstance(x, (list, Tensor))]
    sizes = {0 if isinstance(x, Tensor) and x.dim() == 0 else len(x) for x in parts}
    if len(sizes) != 1:
        raise ValueError(
            f"episodes: got lists and tensors for {sorted(sizes)} tasks, expected one number of "
            "tasks; lists in both inputs and targets hold one entry for each task, and several "
            "inputs of a task are a tuple"
        )

    def task(index: int) -> Episode:
        def entry(leaf: Any) -> Any:
            return leaf[index] if isinstance(leaf, (list, Tensor)) else leaf

        episode: Episode = tree_map(entry, batch, is_leaf=_is_list)
        return episode

    return [task(index) for index in range(sizes.pop())]


def _plain_episode(task: Episode) -> Episode:
    """The task with its parts as the model and the loss take them."""

    def read(pair: Pair) -> Pair:
        return Pair(_rebuild(pair.inputs, recordable), _rebuild(pair.targets, _long_label))

    return Episode(read(task.support), read(task.query))


def _rebuild(tree: Any, convert: Callable[[Tensor], Tensor]) -> Any:
    """A pytree with tuples for its lists, dicts for its mappings, and converted tensors."""
    if isinstance(tree, Tensor):
        return convert(tree)
    if isinstance(tree, Mapping):
        return {key: _rebuild(part, convert) for key, part in tree.items()}
    if isinstance(tree, (list, tuple)):
        parts = [_rebuild(part, convert) for part in tree]
        return type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)
    for leaf in tree_leaves(tree):
        reject_hidden_tensors("episodes", leaf)
    return tree


def _long_label(x: Tensor) -> Tensor:
    """Integers as int64, which every loss and its derivatives take."""
    return x.long() if x.dtype in SHORT_INTEGERS else recordable(x)


def _have_same_shapes(tasks: list[Episode]) -> bool:
    def form(task: Episode) -> tuple[Any, ...]:
        leaves, structure = tree_flatten(task)
        kinds = [(x.shape, x.dtype, x.device) if isinstance(x, Tensor) else x for x in leaves]
        return structure, kinds

    first = form(tasks[0])
    return all(form(task) == first for task in tasks)


def _stack(*leaves: Any) -> Any:
    return torch.stack(leaves) if isinstance(leaves[0], Tensor) else leaves[0]
