"""Runs with damaged files: none goes wrong in silence, and none ends in a trace."""

import pytest
from training.corruption import count_outcomes

HARMLESS = {"same numbers", "recovered", "said", "refused"}


@pytest.mark.slow
def test_files_damaged_at_random_are_noticed_or_do_no_harm():
    outcomes = count_outcomes(10, seed=0, share_of_caches=0.0)
    assert {outcome for _, outcome in outcomes} <= HARMLESS
    assert outcomes.total() == 10
