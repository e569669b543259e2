"""The race of the simulation, in a few worlds; `race_simulation.py` without `--worlds` runs the hundreds."""

import json
import subprocess
import sys
from pathlib import Path


def test_race_keeps_the_winner_of_the_full_evaluation_at_a_twentieth_of_its_cost():
    script = Path(__file__).parents[2] / "benchmarks" / "race_simulation.py"
    command = [sys.executable, str(script), "--worlds", "4", "--seed", "1", "--json"]
    results = json.loads(subprocess.run(command, check=True, capture_output=True, text=True, timeout=300).stdout)
    assert [result["regime"] for result in results] == ["correlated", "crossing", "anti-correlated"]
    assert all(result["same_winner"] == 1.0 for result in results)
    assert sum(result["cost_share"] for result in results) / 3 < 0.07
