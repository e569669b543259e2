"""The results as a table and as a plot."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

PUBLISHED = Path(__file__).parents[1]
Result = Mapping[str, Any]

IN_WORDS = {
    "document-slices": "`passthrough`, two slices of two models",
    "document-stages": "`slerp`, then `ties` of the result",
    "document-lora": "`linear` of a model with an adapter and another",
    "moe": "`moe` of three models",
    "extract-lora": "`extract-lora`, rank 16",
}
PROGRAMS = ("mergeyard", "mergekit")

ASKED = {
    "linear": "≥ 9 × mergekit, ≥ 8 × its CPU, ≤ 1.5 × floor",
    "ties": "≥ 40 × mergekit",
    "linear-resident": "≤ 1.2 × floor, ≥ 25 × mergekit",
    "ties-resident": "≥ 100 × mergekit",
    "linear-hashed": "",
    "ties-hashed": "",
    "moe": "≥ 1 × mergekit",
    "extract-lora": "≥ 1 × mergekit",
    "tiny": "≤ 1 s",
}
"""The promises of the rows; every other method: ≥ 5 × mergekit, every other grid: ≤ 1.2 × floor."""

COLOURS = {"floor": "#999999", "mergeyard": "#1f6fb4", "mergekit": "#c44e52"}


def read(path: Path) -> list[dict[str, Any]]:
    """Every complete row of a file of results; none if there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def middle(result: Result, contender: str, field: str) -> float | None:
    """The median over a contender's runs; None if it did not run."""
    found = [sample[field] for sample in result["samples"].get(contender, ())]
    return median(found) if found else None


def ratio(result: Result, over: str, under: str, field: str = "wall") -> float | None:
    """How often `under` fits into `over`."""
    above, below = middle(result, over, field), middle(result, under, field)
    return above / below if above is not None and below else None


def table(results: Sequence[Result]) -> str:
    """Markdown: one table of seconds and ratios, one of memory."""
    first = results[0]
    lines = [
        f"{first['parameters'].upper()} parameters, unless a row says another number; {first['machine']};"
        f" {first['date']}, commit {first['commit']}.",
        "",
        "| work | floor, s | synced, s | mergeyard, s | its CPU, s | mergekit, s | its CPU, s | faster | less CPU |"
        " × floor | asked |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    timed = [result for result in results if result["limit_bytes"] is None]
    for result in timed:
        seconds = [_seconds(result, "floor", "wall"), _seconds(result, "synced", "wall")]
        seconds += [_seconds(result, who, field) for who in ("mergeyard", "mergekit") for field in ("wall", "cpu")]
        ratios = [
            ratio(result, "mergekit", "mergeyard"),
            ratio(result, "mergekit", "mergeyard", "cpu"),
            ratio(result, "mergeyard", "floor"),
        ]
        cells = [
            name_of(result, first["parameters"]),
            *seconds,
            *(f"{each:.3g} ×" if each else "" for each in ratios),
            asked(result),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    held = [result for result in results if result["limit_bytes"] is not None]
    if held:
        lines += ["", "| memory of a worker, ties of two parents and a base | points | peak, GiB | asked, GiB |"]
        lines.append("|---|---|---|---|")
    for result in held:
        size = "7B, two layers" if "7b" in result["row"] else result["parameters"].upper()
        lines.append(
            f"| {size} | {result['points']} | {peak(result, 'mergeyard'):.2f} | ≤ {result['limit_bytes'] / 2**30:.2f} |"
        )
    documents = [result for result in results if result["row"] in IN_WORDS]
    if documents:
        lines += ["", "| memory of the program | mergeyard, GiB | mergekit, GiB |", "|---|---|---|"]
    for result in documents:
        peaks = [f"{peak(result, program):.2f}" if program in result["samples"] else "" for program in PROGRAMS]
        lines.append(f"| {' | '.join([IN_WORDS[result['row']], *peaks])} |")
    return "\n".join(lines) + "\n"


def peak(result: Result, program: str) -> float:
    """The most memory of a contender, in GiB."""
    return max(sample["rss"] for sample in result["samples"][program]) / 2**30


def name_of(result: Result, usual: str) -> str:
    """The row in words, with the number of parameters where it is not the usual one."""
    if result["parameters"] != usual:
        return f"{name_of(result, result['parameters'])}, {result['parameters'].upper()}"
    if result["row"] in IN_WORDS:
        return f"{IN_WORDS[result['row']]}, written"
    method = f"`{result['row'].partition('-')[0]}`"
    if result["row"].endswith(("-resident", "-hashed")):
        hashed = ", with digests" if result["row"].endswith("-hashed") else ""
        return f"{method}, {result['points']} points into a resident model{hashed}, a point"
    if result["points"] > 1:
        return f"{method}, {result['points']} points written, a point"
    return "a tiny model, `linear`, written" if result["row"] == "tiny" else f"{method}, written"


def asked(result: Result) -> str:
    """The promise of a row."""
    return ASKED.get(result["row"], "≤ 1.2 × floor" if result["points"] > 1 else "≥ 5 × mergekit")


def line(result: Result) -> str:
    """A row for the terminal, as soon as it is complete."""
    parts = [
        f"{who} {_seconds(result, who, 'wall')} s ({_seconds(result, who, 'cpu')} CPU)" for who in result["samples"]
    ]
    faster = ratio(result, "mergekit", "mergeyard")
    floors = ratio(result, "mergeyard", "floor")
    parts += [f"{faster:.3g} × mergekit"] if faster else []
    parts += [f"{floors:.3g} × floor"] if floors else []
    parts += [f"{max(s['rss'] for s in result['samples']['mergeyard']) / 2**30:.2f} GiB"]
    return f"{result['row']}: " + ", ".join(parts)


def write(results: Sequence[Result], folder: Path) -> None:
    """table.md and merges.svg in a folder."""
    (folder / "table.md").write_text(table(results))
    plot(results, folder / "merges.svg")


def publish(results: Sequence[Result]) -> None:
    """merges.jsonl, merges.svg and the table of README.md in tests/benchmarks."""
    (PUBLISHED / "merges.jsonl").write_text("".join(json.dumps(result) + "\n" for result in results))
    plot(results, PUBLISHED / "merges.svg")
    readme = PUBLISHED / "README.md"
    readme.write_text(with_table(readme.read_text(), results))


def with_table(text: str, results: Sequence[Result]) -> str:
    """The page with the table of these results between its two comments."""
    made = f"<!-- merges: begin -->\n\n{table(results)}\n<!-- merges: end -->"
    return re.sub(r"<!-- merges: begin -->.*<!-- merges: end -->", lambda _: made, text, flags=re.DOTALL)


def plot(results: Sequence[Result], path: Path) -> None:
    """Seconds of floor, mergeyard and mergekit, a line per row, on one logarithmic axis; no plot without such rows."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    timed = [result for result in results if result["limit_bytes"] is None]
    if not timed:
        return
    with pyplot.rc_context({"svg.hashsalt": "merges", "svg.fonttype": "none", "font.size": 9}):
        figure, axes = pyplot.subplots(figsize=(8, 1.2 + 0.24 * len(timed)), layout="constrained")
        for place, result in enumerate(timed):
            seconds = {who: middle(result, who, "wall") for who in COLOURS}
            known = [value for value in seconds.values() if value]
            axes.plot([min(known), max(known)], [place, place], color="#dddddd", linewidth=1.5, zorder=1)
            for who, value in seconds.items():
                if value:
                    axes.scatter(value, place, color=COLOURS[who], s=26, zorder=2)
            faster = ratio(result, "mergekit", "mergeyard")
            if faster:
                axes.annotate(
                    f"{faster:.3g} ×", (max(known), place), (6, 0), textcoords="offset points", va="center", fontsize=8
                )
        for who, colour in COLOURS.items():
            axes.scatter([], [], color=colour, s=26, label=who)
        axes.set_yticks(range(len(timed)), [name_of(each, results[0]["parameters"]).replace("`", "") for each in timed])
        axes.set_ylim(len(timed) - 0.4, -0.6)
        axes.set_xscale("log")
        axes.set_xlabel("seconds, logarithmic; × is mergekit over mergeyard")
        axes.grid(axis="x", color="#eeeeee")
        axes.margins(x=0.12)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        axes.tick_params(left=False)
        figure.legend(loc="outside upper right", ncols=3, frameon=False)
        figure.savefig(path, metadata={"Date": None})
        pyplot.close(figure)


def _seconds(result: Result, contender: str, field: str) -> str:
    """The median, and how far the runs lie apart."""
    found = [sample[field] for sample in result["samples"].get(contender, ())]
    if not found:
        return ""
    apart = (max(found) - min(found)) / 2
    return f"{median(found):.3g}" + (f" ± {apart:.2g}" if len(found) > 1 else "")
