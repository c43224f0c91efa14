"""Run the fuzzer: python tests/fuzz/run.py --cases 5000 --seed 0 --out FILE.json

It prints the counts of verdicts, and a line for each failure. A case is run again by --seed S
--only I. The exit status is 1 if there is a failure.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from fuzz.cases import draw
from fuzz.verdicts import VERDICTS, Verdict, judge


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=int, default=0, help="the first index")
    parser.add_argument("--only", type=int, help="run this case alone")
    parser.add_argument("--out", type=Path, help="where to write every verdict")
    args = parser.parse_args()

    torch.set_num_threads(1)
    indices = range(args.start, args.start + args.cases)
    if args.only is not None:
        indices = range(args.only, args.only + 1)
    began = time.perf_counter()
    verdicts = [judge(draw(args.seed, index)) for index in indices]
    seconds = time.perf_counter() - began
    if args.only is not None:
        print(verdicts[0])
        failures: list[Verdict] = []
    else:
        failures = print_summary(verdicts, seconds)
    if args.out is not None:
        args.out.write_text(json.dumps([asdict(verdict) for verdict in verdicts], indent=1))
    sys.exit(1 if failures else 0)


def print_summary(verdicts: list[Verdict], seconds: float) -> list[Verdict]:
    """Print the counts and the failures; return the failures."""
    counts = Counter(verdict.kind for verdict in verdicts)
    share = sum(verdict.differences for verdict in verdicts) / len(verdicts)
    print(f"{len(verdicts)} cases in {seconds:.0f} s; finite differences decided {share:.0%}")
    for kind in VERDICTS:
        print(f"  {kind:10} {counts[kind]}")
    failures = [verdict for verdict in verdicts if verdict.bad]
    for verdict in failures:
        print(f"\n  {verdict.reason}\n    {verdict.case}")
    return failures


if __name__ == "__main__":
    main()
