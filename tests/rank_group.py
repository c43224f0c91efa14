"""Functions that run in several processes of one gloo group."""

import importlib
import os
import socket
import sys
import traceback
from functools import cache
from multiprocessing import forkserver, get_context
from pathlib import Path

import pytest
import torch
from benchmark import RETURN_FREED_MEMORY
from torch import distributed

PRELOADED = ["torch._dynamo", "torch.utils.tensorboard", "pytest", "train", "benchmark"]


@cache
def forked_context():
    """The context of processes that are forked from one that imported what all of them need.

    Python 3.11 does not tell that process where to look for modules. A variable does.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        for name, value in RETURN_FREED_MEMORY.items():
            patch.setenv(name, value)
        forkserver.ensure_running()
    return context


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def run_on_ranks(function, count, *args, join=True):
    """What `function(rank, *args)` returns in processes that torchrun's variables describe.

    It is None for a process that was killed. If `join`, the processes form a group.
    """
    port = free_port()
    context = forked_context()
    jobs = []
    for rank in range(count):
        reader, writer = context.Pipe(duplex=False)
        variables = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": count,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        run = (writer, variables, join, _name(function), rank, args)
        process = context.Process(target=_run, args=run, daemon=True)
        process.start()
        writer.close()
        jobs.append((process, reader))
    ends = [_receive(reader) for _, reader in jobs]
    for process, _ in jobs:
        process.join(timeout=60)
    errors = [error for _, error in ends if error]
    assert not errors, "\n".join(errors)
    return [value for value, _ in ends]


def _receive(reader):
    try:
        return reader.recv()
    except EOFError:
        return None, ""


def _name(function):
    """The module and the name of a function, as the folder of the tests is on the path."""
    path = Path(function.__code__.co_filename).relative_to(Path(__file__).parent)
    return ".".join(path.with_suffix("").parts), function.__name__


def _run(writer, variables, join, name, rank, args):
    os.environ.update({name: str(value) for name, value in variables.items()})
    torch.set_num_threads(1)
    try:
        module, attribute = name
        function = getattr(importlib.import_module(module), attribute)
        if join:
            distributed.init_process_group("gloo")
        writer.send((function(rank, *args), ""))
        if join:
            distributed.destroy_process_group()
    except BaseException:
        writer.send((None, traceback.format_exc()))
