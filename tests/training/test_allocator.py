"""Memory that is freed and taken again costs no page faults."""

import resource
from statistics import median

import pytest
import torch

from metaimplicit.training import keep_freed_memory


def test_a_freed_block_is_taken_again_without_page_faults():
    if not keep_freed_memory():
        pytest.skip("the C library has no mallopt")

    def count_faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.empty(16 * 2**20).fill_(1.0)  # 64 MiB: 16,384 pages
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    count_faults()
    # The system may take some of the pages away at any time, but not most of the time.
    assert median(count_faults() for _ in range(7)) < 250
