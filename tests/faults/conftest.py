"""One fork server for all tests of a process: it takes half a second to start, and its neurons nothing."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.faults.launcher import Launcher


@pytest.fixture(scope="session")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    with Launcher(tmp_path_factory.mktemp("launcher")) as running:
        yield running
