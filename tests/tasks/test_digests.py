"""Digests identify the content of data: other numbers, shapes, types or names show."""

import multiprocessing
import os
import signal
from dataclasses import replace

import pytest
import torch

import tasks

IMAGES = torch.arange(4 * 3 * 2 * 2, dtype=torch.uint8).reshape(4, 3, 2, 2)


def pool(images=IMAGES, counts=(1, 3), names=("a", "b")):
    return tasks.ImagePool.from_sorted(images, counts, names)


def test_the_digest_of_a_pool_identifies_its_images_and_names():
    changed = IMAGES.clone()
    changed[3, 2, 1, 1] ^= 1
    others = [
        pool(changed),
        pool(IMAGES.reshape(4, 3, 4, 1)),
        pool(IMAGES.float()),
        pool(names=("a", "c")),
        pool(counts=(2, 2)),
        pool().subset([1]),
    ]
    digests = [other.digest for other in (pool(), *others)]
    assert len(set(digests)) == len(digests)
    assert pool().digest == digests[0]
    # A subset has the digest of a pool that holds nothing else.
    assert pool().subset([1]).digest == pool(IMAGES[1:], counts=(3,), names=("b",)).digest


def test_the_digest_of_examples_identifies_inputs_and_targets():
    examples = tasks.Examples(torch.rand(3, 2), torch.tensor([0, 1, 1]))
    other_inputs = replace(examples, inputs=examples.inputs + 1e-7)
    other_targets = replace(examples, targets=torch.tensor([0, 1, 0]))
    other_type = replace(examples, targets=examples.targets.int())
    digests = {x.digest for x in (examples, other_inputs, other_targets, other_type)}
    assert len(digests) == 4
    same = tasks.Examples(examples.inputs.T.contiguous().T, examples.targets.clone())
    assert same.digest == examples.digest


def test_the_digests_of_splits_identify_images_under_the_same_names():
    def splits(images):
        families = [
            tasks.FewShot(
                pool(images, counts=(2, 2), names=(f"{name}1", f"{name}2")),
                ways=2,
                shots=1,
                queries=1,
                name=name,
            )
            for name in ("train", "validation", "test")
        ]
        return tasks.Splits(*families)

    before = splits(IMAGES)
    after = splits(IMAGES + 1)
    assert before.digests == after.digests
    assert before.content_digests == splits(IMAGES.clone()).content_digests
    assert not set(before.content_digests.values()) & set(after.content_digests.values())
    sinusoid = tasks.load("sinusoid")
    assert sinusoid.content_digests == sinusoid.digests


@pytest.mark.slow
def test_signals_to_all_processes_of_a_run_leave_its_workers_alive():
    sampler = tasks.EpisodeSampler(tasks.load("sinusoid").train, tasks=2)
    batches = sampler.batches(6, workers=1)
    next(batches)
    (worker,) = multiprocessing.active_children()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(worker.pid, number)
    assert len(list(batches)) == 5
