"""The cluster that all tests of this folder share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.requirements import need
from tests.slurm.cluster import Cluster, missing


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    lacking = missing()
    need("slurm", not lacking, f"{', '.join(lacking)} not found; apt-get install slurm-wlm munge")
    with Cluster(nodes=4) as started:
        yield started
