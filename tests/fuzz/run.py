"""Run the fuzzer: python tests/fuzz/run.py --cases 5000 --seed 0 --out FILE.json

It prints the counts of verdicts, the counts of known kinds among the failures, and a line for each
failure. A case is run again by --seed S --only I. The exit status is 1 if a failure is of no known
kind.
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
from fuzz.known import kind_of
from fuzz.verdicts import TORCH, VERDICTS, WRONG, Verdict, judge

UNKNOWN = "of no known kind"


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
    all_known = args.only is not None or print_summary(verdicts, seconds)
    if args.out is not None:
        rows = [asdict(verdict) | {"known": kind_of(verdict)} for verdict in verdicts]
        args.out.write_text(json.dumps(rows, indent=1))
    sys.exit(0 if all_known else 1)


def print_summary(verdicts: list[Verdict], seconds: float) -> bool:
    """Print the counts and the failures; return whether every failure is of a known kind."""
    counts = Counter(verdict.kind for verdict in verdicts)
    share = sum(verdict.differences for verdict in verdicts) / len(verdicts)
    print(f"{len(verdicts)} cases in {seconds:.0f} s; finite differences decided {share:.0%}")
    for kind in VERDICTS:
        print(f"  {kind:10} {counts[kind]}")

    failures = [verdict for verdict in verdicts if verdict.kind in (WRONG, TORCH)]
    by_kind: dict[str, list[Verdict]] = {}
    for verdict in failures:
        by_kind.setdefault(kind_of(verdict) or UNKNOWN, []).append(verdict)
    for name, group in sorted(by_kind.items(), key=lambda item: -len(item[1])):
        print(f"\n{name}: {len(group)}")
        for verdict in group:
            print(f"  {verdict.reason}\n    {verdict.case}")
    return UNKNOWN not in by_kind


if __name__ == "__main__":
    main()
