"""Times the building of RULER's niah_single_1 against lm-evaluation-harness, in one go and without a network.

    python -m tests.benchmarks.build_items [--tokenizer FOLDER] [--length 1024] [--items 500] [--repeat 1] [--json]

Each builder runs in a process of its own, from its imports to its items: word lists, tokenizer and all. lm-eval has
its word list made at import, always builds 500 items, and encodes every prompt whole; so the builders are compared
without their imports, too. On a busy machine the seconds of the processors tell more than those on the wall.

Afterwards every prompt of lm-eval is written again by our templates, from the key, value and line that lm-eval drew;
all must be equal.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from workers.benchmarks.items import Asked
from workers.benchmarks.ruler.niah import Needles, pose
from workers.benchmarks.ruler.tasks import NIAH
from workers.benchmarks.texts.haystacks import Noise
from workers.benchmarks.texts.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]
PARENT = ROOT / "jobs" / "examples" / "parents" / "base"

LM_EVAL = """
import json, sys, time
begin = time.perf_counter()
from lm_eval.tasks.ruler.niah_utils import niah_single_1
ready, busy = time.perf_counter(), time.process_time()
rows = niah_single_1(tokenizer=sys.argv[1], max_seq_lengths=[int(sys.argv[2])])["test"].to_list()
done, spent = time.perf_counter(), time.process_time() - busy
told = {"imports": ready - begin, "build": done - ready, "cpu": spent, "items": len(rows), "rows": rows}
json.dump(told, open(sys.argv[4], "w"))
"""
OURS = """
import json, sys, time
begin = time.perf_counter()
from workers.benchmarks.ruler.tasks import ruler_items
from workers.benchmarks.texts.tokenizer import Tokenizer
ready, busy = time.perf_counter(), time.process_time()
tokenizer = Tokenizer.from_folder(sys.argv[1])
items = ruler_items(tokenizer, "niah_single_1", int(sys.argv[2]), indices=range(int(sys.argv[3])), seed=1)
done, spent = time.perf_counter(), time.process_time() - busy
json.dump({"imports": ready - begin, "build": done - ready, "cpu": spent, "items": len(items)}, open(sys.argv[4], "w"))
"""


@dataclass(frozen=True)
class Measured:
    """One builder: seconds to import it, seconds to build and of the processors while building, and items."""

    builder: str
    import_seconds: float
    build_seconds: float
    build_cpu_seconds: float
    items: int

    @property
    def seconds_an_item(self) -> float:
        """Imports and all."""
        return (self.import_seconds + self.build_seconds) / self.items


def run(script: str, arguments: argparse.Namespace, folder: Path) -> dict[str, object]:
    """What the script left behind; network access is off, and nltk finds an (empty) folder where it would download."""
    (folder / "nltk" / "tokenizers" / "punkt_tab").mkdir(parents=True, exist_ok=True)
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder / "hub"),
        "NLTK_DATA": str(folder / "nltk"),
        "TQDM_DISABLE": "1",
    }
    out = folder / "out.json"
    subprocess.run(
        [sys.executable, "-c", script, arguments.tokenizer, str(arguments.length), str(arguments.items), out],
        check=True,
        cwd=ROOT,
        env=environment,
        timeout=600,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    return json.loads(out.read_text())


def rewritten(tokenizer: Tokenizer, row: dict[str, str]) -> str:
    """The prompt that our templates make of what lm-eval drew."""
    lines = row["input"].split("\n")
    [at] = [number for number, line in enumerate(lines) if line.startswith("One of the special magic")]
    found = re.fullmatch(r"One of the special magic numbers for (.+) is: (\d{7})\.", lines[at])
    assert found is not None
    task, needles = NIAH["niah_single_1"], Needles((found[1],), ((found[2],),), ((0,),))
    units = len(lines) - 3  # without the first line, the needle and the question
    place = (at - 1 + 0.5) / units
    [item] = pose(
        tokenizer,
        Asked("ruler", "niah_single_1", int(row["max_length"]), 0, 0),
        task,
        needles,
        context=lambda _: Noise().hide(units, needles.texts(task), [place]),
        forecast=lambda budget: np.asarray([0, budget + 1]),  # as many lines as lm-eval took
        haystack="h",
        indices=[0],
    )
    return item.text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", default=str(PARENT))
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--items", type=int, default=500)
    parser.add_argument("--repeat", type=int, default=2, help="the fastest counts; the first may compile libraries")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # or every process compiles its libraries
    measured: list[Measured] = []
    rows: list[dict[str, str]] = []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(arguments.repeat):
            for builder, script in (("lm-eval", LM_EVAL), ("mergeyard", OURS)):
                result = run(script, arguments, Path(folder))
                rows = result.get("rows", rows)
                measured.append(Measured(builder, result["imports"], result["build"], result["cpu"], result["items"]))
    best = {
        builder: min(
            (row for row in measured if row.builder == builder), key=lambda row: row.import_seconds + row.build_seconds
        )
        for builder in ("lm-eval", "mergeyard")
    }
    tokenizer = Tokenizer.from_folder(arguments.tokenizer)
    equal = sum(rewritten(tokenizer, row) == f"{row['input']} {row['gen_prefix']}" for row in rows)
    theirs, ours = best["lm-eval"], best["mergeyard"]
    summary = {
        "ratio": theirs.seconds_an_item / ours.seconds_an_item,
        "ratio_without_imports": theirs.build_seconds / theirs.items / (ours.build_seconds / ours.items),
        "cpu_ratio_without_imports": theirs.build_cpu_seconds / theirs.items / (ours.build_cpu_seconds / ours.items),
        "equal_prompts": equal,
        "compared_prompts": len(rows),
    }
    if arguments.json:
        print(json.dumps({"rows": [asdict(row) for row in measured], **summary}))
    else:
        for row in measured:
            print(
                f"{row.builder:10} {row.items} items in {row.import_seconds + row.build_seconds:6.2f} s: "
                f"{row.import_seconds:.2f} s of imports, {row.build_seconds:.2f} s of building "
                f"({row.build_cpu_seconds:.2f} s of processors)"
            )
        print(
            f"{summary['ratio']:.1f} × faster, {summary['ratio_without_imports']:.1f} × without the imports "
            f"({summary['cpu_ratio_without_imports']:.1f} × in seconds of processors)"
        )
        print(f"{equal} of {len(rows)} prompts of lm-eval equal ours for the same draw")
    sys.exit(equal != len(rows))


if __name__ == "__main__":
    main()
