"""The scale of a 70B grid is what arithmetic says: parents once, every point once, a few requests of the driver's."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from tests.benchmarks.scale import dense_70b

ROOT = Path(__file__).parents[3]


@pytest.mark.heavy
def test_a_hundred_points_of_70b_read_their_parents_once_and_cost_the_driver_little() -> None:
    command = [sys.executable, "-m", "tests.benchmarks.scale", "--case", "70b", "--json"]
    told = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=300)
    found = json.loads(told.stdout)["70b"]
    model = 2 * sum(math.prod(shape) for _, _, shape in dense_70b())
    assert math.isclose(found["bytes_read_tb"], 4 * model / 1e12)
    assert math.isclose(found["bytes_written_tb"], 100 * model / 1e12)
    assert found["units"] == 100 * found["tasks"]
    assert sum(found["driver_requests"].values()) < 10 * found["points"]
    assert found["peak_memory_mb"] < 300
