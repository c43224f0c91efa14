"""Few-shot tasks: their parts, and a check that the parts fit together."""

# This module does not import `annotations` from `__future__`. That would turn the types of the
# fields of a NamedTuple into strings that documentation tools cannot resolve.

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor
from torch.utils._pytree import tree_map

from metaimplicit.tensors import tensors_in


class Pair(NamedTuple):
    """The inputs and targets of one set of examples.

    Attributes:
        inputs: A tensor `[m, ...]`, or `[tasks, m, ...]` for a batch of tasks. Or several such: the
            model receives a tuple as positional arguments, and a dict as keyword arguments.
        targets: A tensor of the same leading sizes, or any pytree of tensors, as the loss takes it.

    Example:
        >>> import torch
        >>> pair = Pair(torch.zeros(3, 2), torch.tensor([0, 1, 2]))
        >>> inputs, targets = pair
        >>> targets is pair.targets
        True
    """

    inputs: Any
    targets: Any


class Episode(NamedTuple):
    """The support set that a task adapts on, and the query set that its adaptation is measured on.

    Attributes:
        support: Examples of one task, or of a batch of tasks.
        query: Likewise.

    Example:
        >>> import torch
        >>> support = (torch.zeros(3, 2), torch.tensor([0, 1, 2]))
        >>> query = (torch.ones(6, 2), torch.tensor([0, 1, 2, 0, 1, 2]))
        >>> Episode.of(support, query).query.inputs.shape
        torch.Size([6, 2])
    """

    support: Pair
    query: Pair

    @classmethod
    def of(cls, support: Sequence[Any], query: Sequence[Any]) -> "Episode":
        """The episode of two plain `(inputs, targets)` pairs.

        Raises:
            TypeError: One of them does not have two parts.
        """
        return cls(Pair(*support), Pair(*query))


class HasSets(Protocol):
    """An object with a support set and a query set, each a pair `(inputs, targets)`.

    Example:
        >>> import torch
        >>> def count_tasks(episodes: HasSets) -> int:
        ...     inputs, targets = episodes.support
        ...     return len(inputs)
        >>> import torch
        >>> pair = Pair(torch.zeros(4, 3, 2), torch.zeros(4, 3))
        >>> count_tasks(Episode(pair, pair))
        4
    """

    @property
    def support(self) -> Any:
        """The examples that the tasks adapt on."""

    @property
    def query(self) -> Any:
        """The examples that the adapted models are measured on."""


EpisodeBatch = HasSets | Mapping[str, Any] | Sequence[Any]
"""What the learner takes; see `forms.name_parts` for its forms."""


def check_pair(name: str, pair: Pair) -> None:
    """Check that a set is not empty, and that inputs and targets have the same leading sizes.

    Sizes are compared where inputs and targets are one tensor each. If there are several, only the
    model and the loss know how they belong together.

    Args:
        name: What the error calls the pair.
        pair: The inputs and targets of a batch of tasks.

    Raises:
        ValueError: A tensor is empty, or inputs and targets begin with different
            `[tasks, examples]`.

    Example:
        >>> import torch
        >>> check_pair("support", Pair(torch.zeros(2, 3, 1), torch.zeros(2, 3)))
    """
    inputs, targets = pair
    if isinstance(inputs, Tensor) and isinstance(targets, Tensor):
        leading = inputs.shape[:2]
        fits = inputs.dim() >= 2 and leading == targets.shape[:2] and 0 not in leading
    else:
        fits = all(0 not in x.shape[:2] for x in tensors_in(pair))
    if not fits:
        raise ValueError(
            f"{name}: got inputs {shapes_of(inputs)} and targets {shapes_of(targets)}, "
            "expected both to begin with [tasks, examples], neither empty; put a tensor without "
            "an axis of examples after that of tasks into a tuple, (x,)"
        )


def shapes_of(tree: Any) -> Any:
    """The shapes of the tensors of a pytree, for errors.

    Example:
        >>> import torch
        >>> shapes_of({"x": torch.zeros(2, 3), "lengths": None})
        {'x': (2, 3), 'lengths': None}
    """
    return tree_map(lambda x: tuple(x.shape) if isinstance(x, Tensor) else x, tree)
