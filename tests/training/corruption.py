"""Damage the files of runs at random, use the runs, and count what becomes of it.

python tests/training/corruption.py --count 1000 --seed 0
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import random
import shutil
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from matplotlib.figure import Figure

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "scripts")]

from scripts.running import load_main  # noqa: E402

import tasks.cache  # noqa: E402
from metaimplicit.training import read_metrics  # noqa: E402

OPTIONS = ["--task=sinusoid", "--schedule=constant", "--vectorize=loop", "--meta-batch=2"]
OPTIONS += ["--checkpoint-every=2", "--validate-every=2", "--validation-episodes=4"]
OPTIONS += ["--test-episodes=4", "--test-steps=1", "--hidden", "8", "--device=cpu"]
STEPS = 6
FILES = [
    "checkpoint.pt",
    "checkpoint-previous.pt",
    "checkpoint-best.pt",
    "config.json",
    "metrics.jsonl",
]
OTHERS = {
    "the same options": [],
    "another seed": ["--seed=1"],
    "another step size": ["--inner-lr=0.02"],
}


def flip_bits(content: bytes, random_: random.Random) -> bytes:
    """Flip one bit, or some."""
    damaged = bytearray(content)
    for _ in range(random_.choice([1, 1, 1, 2, 8, 64])):
        bit = random_.randrange(8 * len(content))
        damaged[bit // 8] ^= 1 << bit % 8
    return bytes(damaged)


def truncate(content: bytes, random_: random.Random) -> bytes:
    """Cut the end off."""
    return content[: random_.randrange(len(content))]


def zero_block(content: bytes, random_: random.Random) -> bytes:
    """Overwrite a block by zeros."""
    start = random_.randrange(len(content))
    size = random_.choice([1, 16, 512, 4096])
    return (content[:start] + bytes(size) + content[start + size :])[: len(content)]


def edit_number(content: bytes, random_: random.Random) -> bytes:
    """Change a number, as an editor or torch.save would."""
    if content.startswith(b"PK"):
        state = torch.load(io.BytesIO(content), weights_only=True)
        name = random_.choice(sorted(state["learner"]))
        state["learner"][name] += 1e-3
        buffer = io.BytesIO()
        torch.save(state, buffer)
        return buffer.getvalue()
    digits = [i for i, byte in enumerate(content) if chr(byte).isdigit()]
    place = random_.choice(digits)
    digit = random_.choice([d for d in b"0123456789" if d != content[place]])
    return content[:place] + bytes([digit]) + content[place + 1 :]


CHANGES = [flip_bits, truncate, zero_block, edit_number]


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Print no results, draw no figures or curves, and leave no pages: most of the time."""
    with (
        contextlib.redirect_stdout(io.StringIO()),
        mock.patch.object(Figure, "savefig"),
        mock.patch("command_line.report.leave_page"),
        mock.patch("command_line.testing.predict_curves", return_value=None),
    ):
        yield


class World:
    """A run, other runs to exchange files with, and what an undisturbed resume leads to."""

    def __init__(self, root: Path) -> None:
        self.train = load_main("train")
        self.evaluate = load_main("evaluate")
        self.run = root / "run"
        self.out = root / "out"
        self.start(self.run, [])
        self.restore()
        self.expected = {}
        for use in ("resume", "evaluate"):
            verdict, numbers, _ = self.use(use)
            assert verdict == "done"
            self.expected[use] = numbers
            self.restore()

    def start(self, out: Path, options: list[str]) -> None:
        with contextlib.redirect_stderr(io.StringIO()), quietly():
            self.train([*OPTIONS, *options, f"--steps={STEPS}", f"--out={out}"])

    def other(self, name: str) -> Path:
        """The folder of one of the `OTHERS`, which is run when it is first asked for."""
        out = self.run.with_name(name.replace(" ", "-"))
        if not out.exists():
            self.start(out, OTHERS[name])
        return out

    def restore(self) -> None:
        """Put the run as it was in the place where it is used."""
        shutil.rmtree(self.out, ignore_errors=True)
        shutil.copytree(self.run, self.out)

    def use(self, name: str) -> tuple[str, object, str]:
        """Resume or evaluate the run: "done" or "refused", the numbers, and what was said."""
        said = io.StringIO()
        with (
            contextlib.redirect_stderr(said),
            quietly(),
            warnings.catch_warnings(record=True) as caught,
        ):
            warnings.simplefilter("always")
            try:
                if name == "resume":
                    arguments = [f"--out={self.out}", "--task=sinusoid", "--resume"]
                    self.train([*arguments, f"--steps={STEPS + 3}"])
                else:
                    self.evaluate([str(self.out), "--episodes=4"])
            except SystemExit as stop:
                code = stop.code
            else:
                code = 0
        if code > 128:
            raise KeyboardInterrupt  # a signal to stop this program
        if code:
            lines = [line for line in said.getvalue().splitlines() if "error: " in line]
            assert (code, len(lines)) == (2, 1), (code, said.getvalue())
            return "refused", None, lines[0]
        text = "; ".join(str(warning.message) for warning in caught)
        return "done", self.numbers(name), text

    def numbers(self, name: str) -> object:
        if name == "evaluate":
            return (self.out / "evaluation.json").read_text()
        state = torch.load(self.out / "checkpoint.pt", weights_only=True)
        learner = {name: x.tolist() for name, x in state["learner"].items()}
        lines = [line | {"seconds": 0} for line in read_metrics(self.out, complete=False)]
        return learner, state["progress"]["step"], lines


def damage(world: World, random_: random.Random) -> str:
    """Damage one file of the run, and say how."""
    name = random_.choice(FILES)
    path = world.out / name
    if random_.random() < 0.2:
        other = random_.choice(sorted(OTHERS))
        shutil.copy(world.other(other) / name, path)
        return f"{name}: that of a run with {other}"
    content = path.read_bytes()
    change = random_.choice(CHANGES)
    while (damaged := change(content, random_)) == content:
        pass
    path.write_bytes(damaged)
    return f"{name}: {change.__name__}"


def try_run(world: World, random_: random.Random) -> tuple[str, str]:
    """Damage a run and use it; return what was damaged and what became of it."""
    world.restore()
    damaged = damage(world, random_)
    use = random_.choice(["resume", "resume", "evaluate"])
    try:
        verdict, numbers, said = world.use(use)
    except Exception:
        return damaged, f"traceback\n{traceback.format_exc()}"
    if verdict == "refused":
        # Two whole checkpoints remain, wherever one is damaged.
        return damaged, "refused although a checkpoint is whole" if ".pt" in damaged else "refused"
    if numbers == world.expected[use]:
        return damaged, "recovered" if said else "same numbers"
    return damaged, "said" if said else f"silent ({use})"


def try_cache(folder: Path, random_: random.Random) -> tuple[str, str]:
    """Damage a cached array and load it."""
    arrays = {"images": np.arange(3000, dtype=np.uint8).reshape(30, 100), "counts": np.arange(5)}
    other = arrays | {"images": np.zeros((30, 100), np.uint8)}
    shutil.rmtree(folder, ignore_errors=True)
    with mock.patch.dict(os.environ, METAIMPLICIT_CACHE=str(folder)):
        tasks.cache.load_or_build("arrays", lambda: arrays)
        tasks.cache.load_or_build("other", lambda: other)
        (path,) = folder.glob("arrays.*")
        change = random_.choice([flip_bits, truncate, zero_block, None])
        if change is None:
            shutil.copy(path.with_stem("other"), path)
            damaged = "cache: that of other arrays"
        else:
            path.write_bytes(change(path.read_bytes(), random_))
            damaged = f"cache: {change.__name__}"
        try:
            loaded = tasks.cache.load_or_build("arrays", lambda: arrays)
        except BaseException:
            return damaged, f"traceback\n{traceback.format_exc()}"
    same = loaded.keys() == arrays.keys()
    same = same and all(np.array_equal(loaded[name], arrays[name]) for name in arrays)
    return damaged, "same numbers" if same else "silent"


def count_outcomes(count: int, seed: int, share_of_caches: float = 0.1) -> Counter[tuple[str, str]]:
    """The outcomes of `count` damages, by file and kind."""
    random_ = random.Random(seed)
    outcomes: Counter[tuple[str, str]] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder))
        for _ in range(count):
            if random_.random() < share_of_caches:
                outcomes[try_cache(Path(folder, "cache"), random_)] += 1
            else:
                outcomes[try_run(world, random_)] += 1
    return outcomes


def main() -> None:
    """Print the outcomes, and in the end their totals."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    outcomes = count_outcomes(options.count, options.seed)
    totals: Counter[str] = Counter()
    for (damaged, outcome), times in sorted(outcomes.items()):
        print(f"{times:5d}  {damaged:60s} {outcome}")
        totals[outcome.splitlines()[0]] += times
    print(dict(totals))


if __name__ == "__main__":
    main()
