"""The processes of one run, which torchrun starts with the variables RANK and WORLD_SIZE."""

from __future__ import annotations

import os
import signal
import sys
import warnings

import torch
from torch import distributed

from command_line.device import find_device
from command_line.options import RunOptions
from metaimplicit.learner import Ranks
from metaimplicit.training import STOP_SIGNALS


def count_processes() -> int:
    """The number of processes that torchrun started, or 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def own_rank() -> int:
    """The number of this process, from 0 on."""
    return int(os.environ.get("RANK", "0")) if count_processes() > 1 else 0


def join_ranks(options: RunOptions) -> Ranks:
    """Join the processes of the run, by nccl on CUDA, each on a device of its own, else by gloo.

    From now on, the first process alone prints. Without torchrun, nothing is done.

    Raises:
        ValueError: `--device` names one device for all processes, or `--meta-batch` has no task
            for some.
    """
    count = count_processes()
    if count == 1:
        return Ranks()
    if options.meta_batch < count:
        raise ValueError(
            f"--meta-batch: got {options.meta_batch} for {count} processes, expected at least one "
            "task for each; raise it, or lower --nproc-per-node"
        )
    device = find_device(options.device)
    if device.type == "cuda":
        _take_device(options.device, device)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if own_rank() > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # open until the process ends
        warnings.simplefilter("ignore")
    return Ranks.of_group()


def leave_ranks() -> None:
    """Leave the processes of the run, none of which waits for the others any more."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


def require_one_process() -> None:
    """Raise ValueError if torchrun started several processes of a script that needs one."""
    count = count_processes()
    if count > 1:
        raise ValueError(
            f"torchrun: got {count} processes, expected one, because only train.py shares its work "
            "among several; start this script by python"
        )


def ignore_launcher() -> None:
    """Ignore the signals by which torchrun stops the others when a process has ended.

    This process is about to end, and has said why.
    """
    if count_processes() > 1:
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)


def _take_device(name: str, device: torch.device) -> None:
    """Let "cuda" be the device of this process."""
    if device.index is not None:
        raise ValueError(
            f"--device: got {name} for {count_processes()} processes, expected auto, cuda or cpu, "
            "so that each process takes a GPU of its own"
        )
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if local >= torch.cuda.device_count():
        raise ValueError(
            f"--device: got process {local} of this machine for {torch.cuda.device_count()} GPUs, "
            "expected a GPU for each; lower --nproc-per-node, or give --device cpu"
        )
    torch.cuda.set_device(local)
