"""Few-shot data sets with a split of their own, which is used as it is and never shuffled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from tasks.class_images import ClassImages
from tasks.episodes import Splits
from tasks.few_shot import few_shot_splits

# What `read_class_images` takes, without what nothing splits.
LAYOUTS = (
    "folders train, val and test (or base, val and novel) of class folders; class folders or "
    "images with lists train, val and test in .txt, .csv or .json; or arrays in .pkl, .npz or .pt "
    "files that are called after the parts"
)


@dataclass(frozen=True)
class DataSet:
    """What is known of a published data set.

    Args:
        name: The name of its family.
        counts: The numbers of train, validation and test classes.
        known_parts: The train, validation and test classes by name, for data that comes without
            lists. None if they are not known here.
        how_to_get_it: An instruction, such as where to download it.
    """

    name: str
    counts: tuple[int, int, int]
    known_parts: tuple[tuple[str, ...], ...] | None
    how_to_get_it: str

    def splits(self, classes: ClassImages, *, ways: int, shots: int, queries: int) -> Splits:
        """Few-shot families on the classes of the data set's own split.

        Args:
            classes: What was read.
            ways: As for `FewShot`, as are `shots` and `queries`.
            shots: See `ways`.
            queries: See `ways`.

        Raises:
            ValueError: If nothing splits the classes, or they cannot give such tasks.
        """
        divided = classes if len(classes.parts) == 3 else self._divided_by_name(classes)
        counts = tuple(map(len, divided.parts))
        source = f"{classes.root}, split by {divided.divided_by} into {_sum(counts)} classes"
        if counts != self.counts:
            source += f" (published: {_sum(self.counts)})"
        positions = divided.positions()
        if repeats := divided.repeats(positions):
            source += f"; {repeats}"
        return few_shot_splits(
            self.name,
            divided.pool,
            positions,
            ways=ways,
            shots=shots,
            queries=queries,
            source=source,
        )

    def _divided_by_name(self, classes: ClassImages) -> ClassImages:
        """The classes divided by the published lists, if all of them are there and no others."""
        class_called = {name.rsplit("/", 1)[-1]: name for name in classes.pool.names}
        if classes.foreign:
            raise ValueError(
                f"{self.name}: {classes.root} has {', '.join(classes.foreign)}, which name no "
                f"class, such as {classes.pool.names[0]!r}; expected {LAYOUTS}; remove or mend them"
            )
        known = self.known_parts or ()
        names = [name for part in known for name in part]
        if not known or sorted(names) != sorted(class_called):
            raise ValueError(
                f"{self.name}: {classes.root} has {len(classes.pool)} classes and nothing that "
                f"splits them, expected {LAYOUTS}; {self.how_to_get_it}; "
                "for a split of your own, take the folder family"
            )
        parts = [[class_called[name] for name in part] for part in known]
        return replace(
            classes,
            parts=parts,
            divided_by="the published names of classes",
        )


def _sum(counts: Sequence[int]) -> str:
    return " + ".join(map(str, counts))
