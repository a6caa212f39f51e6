"""Malformed files and settings end in success or one clear message; see tests/fuzz.py."""

import os

import fuzz
import pytest
from fuzz import Tally, run_group
from fuzz_groups import GROUPS

SECONDS = float(os.environ.get("REFINE_FUZZ_SECONDS") or 60) / len(GROUPS)


@pytest.mark.parametrize("name", GROUPS)
def test_malformed_input_is_read_or_refused_in_one_message(name):
    # A machine may be three times as slow as the one that the limit is meant for.
    limit = 3 * fuzz.SECONDS
    tally = run_group(GROUPS[name], Tally(), seconds=SECONDS, limit=limit, stop_at_failure=True)
    assert sum(tally.outcomes.values()) > 10
    assert set(tally.outcomes) <= {"accepted", "message"}
