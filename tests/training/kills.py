"""Kill runs of train.py and tune.py at random moments, resume them, and compare their ends.

python tests/training/kills.py --kills 50 --terms 25 --seed 0
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from metaimplicit.training import read_metrics  # noqa: E402

TRAIN = ["train.py", "--task=sinusoid", "--vectorize=vmap", "--meta-batch=4", "--steps=300"]
TRAIN += ["--checkpoint-every=3", "--validate-every=20", "--validation-episodes=4"]
TRAIN += ["--test-episodes=40", "--test-steps=2", "--device=cpu"]
TUNE = ["tune.py", "group-lasso", "--quick", "--method=cg", "--outer-steps=250"]
COMMANDS = {"train": TRAIN, "tune": TUNE}
CASE = Path("cg-0", "start-0")


class Experiment:
    """A command, its end without disturbance, and a folder where it is killed again and again."""

    def __init__(self, name: str, root: Path) -> None:
        self.name = name
        self.out = root / name
        self.run = self.out / CASE if name == "tune" else self.out
        undisturbed = root / f"{name}-undisturbed"
        self.call(undisturbed).wait()
        self.expected = self.end(undisturbed)

    def call(self, out: Path) -> subprocess.Popen[str]:
        command = [*COMMANDS[self.name], f"--out={out}"]
        if self.name == "train" and (out / "config.json").exists():
            command.append("--resume")
        script = str(ROOT / "scripts" / command[0])
        return subprocess.Popen(
            [sys.executable, script, *command[1:]],
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )

    def end(self, out: Path) -> object:
        """What must not depend on how often a run was killed."""
        run = out / CASE if self.name == "tune" else out
        state = torch.load(run / "checkpoint.pt", weights_only=True)
        tensors = state["learner"] if self.name == "train" else state["tuner"]["free"]
        bits = {name: tensor.tolist() for name, tensor in tensors.items()}
        lines = [line | {"seconds": 0} for line in read_metrics(run)]
        summary = out / "cg-0" / "summary.json" if self.name == "tune" else out / "summary.json"
        changing = ("seconds", "train_seconds", "test_seconds", "peak_memory_mib", "sha256")
        results = json.loads(summary.read_text())
        return bits, lines, {name: results[name] for name in results if name not in changing}

    def steps(self) -> int:
        log = self.run / "metrics.jsonl"
        return log.read_bytes().count(b'"split": "train"') if log.exists() else 0

    def disturb(self, number: int, random_: random.Random) -> bool:
        """Start or resume the run and send it a signal; return whether it was still running."""
        log = self.run / "metrics.jsonl"
        steps = self.steps()
        before = log.stat().st_mtime_ns if log.exists() else 0
        process = self.call(self.out)
        if random_.random() < 0.8:  # else, while it starts
            while process.poll() is None and self.steps() <= steps:
                time.sleep(0.01)
            time.sleep(random_.uniform(0, 0.8))
        else:
            time.sleep(random_.uniform(0, 6))
        process.send_signal(number)
        said = process.communicate()[1]
        if process.returncode == 0:
            return False
        if number == signal.SIGKILL or (process.returncode == -number and not said):
            return True  # SIGTERM came before the first line of the script
        assert process.returncode == 143, said
        assert said.splitlines()[-1].startswith("stopped by SIGTERM; "), said
        assert "Traceback" not in said, said
        if log.exists() and log.stat().st_mtime_ns > before:
            # The run had begun its sitting, of which no step may be lost.
            state = torch.load(self.run / "checkpoint.pt", weights_only=True)
            assert state["progress"]["step"] == self.steps(), said
        return True

    def finish(self) -> None:
        process = self.call(self.out)
        said = process.communicate()[1]
        assert process.returncode == 0, said
        bits, lines, results = self.end(self.out)
        assert bits == self.expected[0], f"{self.name}: other bits"
        assert lines == self.expected[1], f"{self.name}: other metrics"
        assert results == self.expected[2], f"{self.name}: other results"


def main() -> None:
    """Send all signals, and print where they arrived."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--terms", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commands", nargs="+", choices=list(COMMANDS), default=list(COMMANDS))
    options = parser.parse_args()
    random_ = random.Random(options.seed)
    signals = [signal.SIGKILL] * options.kills + [signal.SIGTERM] * options.terms
    random_.shuffle(signals)
    with tempfile.TemporaryDirectory() as folder:
        rounds = 0
        while signals:
            rounds += 1
            for name in options.commands:
                experiment = Experiment(name, Path(folder, str(rounds)))
                while signals and experiment.disturb(signals[-1], random_):
                    print(
                        f"{name} {rounds}: {signals.pop().name} at {experiment.steps()}", flush=True
                    )
                experiment.finish()
                print(f"{name} {rounds}: the same bits, metrics and results", flush=True)


if __name__ == "__main__":
    main()
