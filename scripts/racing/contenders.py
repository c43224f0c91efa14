"""Who is in the race."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

from racing.contender import Contender, Sizes
from racing.ours import HEADS, METHODS, OurLearner, our_options
from racing.with_higher import SIZES as HIGHER_SIZES
from racing.with_higher import HigherMAML
from racing.with_learn2learn import SIZES as LEARN2LEARN_SIZES
from racing.with_learn2learn import learn2learn_anil, learn2learn_maml, load_learn2learn
from tasks import TaskFamily


@dataclass(frozen=True)
class Entry:
    """A contender before the race.

    Args:
        sizes: Its training tasks.
        make: Makes it for a family of such tasks, from torch's random generator.
        load: Imports the optional package that it needs.
    """

    sizes: Sizes
    make: Callable[[TaskFamily], Contender]
    load: Callable[[], object] = lambda: None


def our_entry(name: str, task: str) -> Entry:
    """The entry of a head or a method of ours, with the options that suit a task."""
    options = our_options(task, name)
    return Entry(OurLearner.sizes(options), partial(OurLearner, options))


PEERS = {
    "learn2learn-maml": Entry(LEARN2LEARN_SIZES, learn2learn_maml, load_learn2learn),
    "learn2learn-anil": Entry(LEARN2LEARN_SIZES, learn2learn_anil, load_learn2learn),
    "higher": Entry(HIGHER_SIZES, HigherMAML),
}
CONTENDERS = (*HEADS, *METHODS, *PEERS)


def find_entry(name: str, task: str) -> Entry:
    """The entry of one of `CONTENDERS`."""
    return PEERS[name] if name in PEERS else our_entry(name, task)


def find_missing(names: Iterable[str]) -> dict[str, str]:
    """Those contenders whose package cannot be imported, and why."""
    missing = {}
    for name in names:
        if name in PEERS:
            try:
                PEERS[name].load()
            except ImportError as error:
                missing[name] = str(error)
    return missing
