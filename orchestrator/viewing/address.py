"""The address of some answers on the page: `#` and a query, which a person can read and write."""

from __future__ import annotations

from urllib.parse import urlencode

EXPORT = "report/view/"
"""The folder of a run where its report finds the exported page."""

MISSED = "missed"
"""The outcome that means every one of an answer that is not right."""


def address(
    *, point: str, benchmark: str = "", task: str = "", length: int = 0, outcome: str = MISSED, beside: str = ""
) -> str:
    """The address of a point's answers, such as `#point=a&length=1024&outcome=missed`; empty values choose all.

    With `beside`, those that the two points answered with different success.
    """
    chosen: dict[str, str | int] = {"point": point, "benchmark": benchmark, "task": task, "length": length}
    chosen |= {"outcome": outcome, "beside": beside}
    if beside:
        chosen["differ"] = 1
    return "#" + urlencode({key: value for key, value in chosen.items() if value})
