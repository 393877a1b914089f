"""F2: one seed of kills and network faults. `make soak` runs many."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.random_kills import kills_and_network_faults


@pytest.mark.slow
def test_thirty_kills_behind_a_bad_network_lose_double_and_contradict_nothing(tmp_path: Path) -> None:
    run = kills_and_network_faults(1, 32, tmp_path)

    print(run)
    assert not run.void, run
    assert not run.violations, run
