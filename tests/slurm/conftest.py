"""The clusters shared by the tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.requirements import need
from tests.support.slurm_cluster import Cluster, missing


def need_slurm() -> None:
    lacking = missing()
    need("slurm", not lacking, f"{', '.join(lacking)} not found; apt-get install slurm-wlm munge")


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    need_slurm()
    with Cluster(nodes=4) as started:
        yield started


@pytest.fixture(scope="module")
def cluster_of_gpus() -> Iterator[Cluster]:
    need_slurm()
    with Cluster(nodes=2, gpus=True) as started:
        yield started
