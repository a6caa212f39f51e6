"""Runs that are killed again and again compute what they would have without it."""

import pytest
import soak


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_killed_runs_end_bit_for_bit_as_uninterrupted_ones():
    done = soak.soak(kills=20, seed=0)
    assert done["kills"] == 20 and done["SIGKILL"] and done["SIGTERM"] and done["taken_over"]
    assert done["differences"] == []
