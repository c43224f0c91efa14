"""Memory that is freed and taken again costs no page faults."""

import resource

import pytest
import torch

from metaimplicit.training import keep_freed_memory


def test_a_freed_block_is_taken_again_without_page_faults():
    if not keep_freed_memory():
        pytest.skip("the C library has no mallopt")

    def fill():
        torch.empty(16 * 2**20).fill_(1.0)  # 64 MiB: 16,384 pages

    for _ in range(3):
        fill()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        fill()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 1000
