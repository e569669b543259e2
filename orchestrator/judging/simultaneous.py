"""Many models against one on the same items: intervals and p values that hold for all of them at once.

The statistic of a model is |mean difference| / standard error. Its distribution, for the largest of all models, comes
from a wild cluster bootstrap: the residuals of each haystack get one random sign, the same for all models. So models
that answer alike cost little power. p value and interval come from the same draws: p ≤ α where the interval of
confidence 1 − α does not contain 0.

Bootstrap: Cameron, Gelbach & Miller 2008. Largest statistic: Westfall & Young 1993.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from orchestrator.judging.estimates import cluster_influences, macro_difference, macro_weights
from orchestrator.judging.samples import CellSample, FloatArray, student_quantile
from orchestrator.judging.significance import DRAWS, Tested, holm, sign_patterns, spread_test

WORK = 4e9
"""Products of a sign and an influence: of many models on many haystacks, fewer draws are made."""


def simultaneous(
    samples: Mapping[str, Sequence[CellSample]], confidence: float = 0.95, draws: int = DRAWS, seed: int = 0
) -> dict[str, Tested]:
    """`macro_difference` of each model's paired differences from one baseline, for all models at once.

    The largest statistic is never taken as smaller than Student's of one model alone. Where rare losses explain a
    difference (Holm over the models), its interval contains zero.
    """
    if not samples:
        return {}
    estimates = {name: macro_difference(found, confidence) for name, found in samples.items()}
    rare = holm([estimate.least_p for estimate in estimates.values()])
    largest = np.sort(_largest([*samples.values()], draws, seed))
    critical = float(largest[-max(1, math.floor((1 - confidence) * (largest.size + 1) + 1e-9))])
    found: dict[str, Tested] = {}
    for (name, estimate), unlikely in zip(estimates.items(), rare.tolist(), strict=True):
        if math.isinf(estimate.standard_error):
            found[name] = Tested(estimate, 1.0, unlikely)
            continue
        statistic = abs(estimate.mean) / estimate.standard_error
        above = largest.size - int(np.searchsorted(largest, statistic * (1 - 1e-9)))
        p = max((1 + above) / (1 + largest.size), spread_test(estimate))
        alone = student_quantile((1 + confidence) / 2, estimate.degrees_of_freedom)
        half = max(critical, alone) * estimate.standard_error
        low, high = max(-1.0, estimate.mean - half), min(1.0, estimate.mean + half)
        if unlikely > 1 - confidence:
            low, high = min(low, 0.0), max(high, 0.0)
        found[name] = Tested(replace(estimate, low=low, high=high), p, unlikely)
    return found


def _largest(samples: Sequence[Sequence[CellSample]], draws: int, seed: int) -> FloatArray:
    """The largest |t*| over the models in each draw [draws]; the haystacks of a task are a stratum."""
    residuals, asked, strata = _residuals(samples)
    squares = [np.sum(residuals[rows] ** 2, axis=0) for rows in strata]
    counts = [np.maximum(np.count_nonzero(asked[rows], axis=0), 2) for rows in strata]
    scale = sum(squares, np.zeros(residuals.shape[1]))
    found: list[FloatArray] = []
    for signs in sign_patterns(len(residuals), max(999, min(draws, int(WORK / residuals.size))), seed):
        totals, variances = np.zeros((len(signs), residuals.shape[1])), np.zeros((len(signs), residuals.shape[1]))
        for rows, square, count in zip(strata, squares, counts, strict=True):
            part = signs[:, rows] @ residuals[rows]
            totals += part
            variances += count / (count - 1) * (square - part**2 / count)
        errors = np.sqrt(np.maximum(variances, 1e-18 * scale))
        found.append(np.divide(np.abs(totals), errors, out=np.zeros_like(totals), where=errors > 0).max(axis=1))
    return np.concatenate(found)


def _residuals(
    samples: Sequence[Sequence[CellSample]],
) -> tuple[FloatArray, NDArray[np.bool_], list[slice]]:
    """Each haystack's residual in each model's mean, whether the model was asked about it; the rows of each task.

    Both arrays have shape [haystacks, models].
    """
    task_of = {
        label: sample.cell.task for of in samples for sample in of for label in np.unique(sample.haystacks).tolist()
    }
    labels = sorted(task_of, key=lambda label: (task_of[label], label))
    row_of = {label: row for row, label in enumerate(labels)}
    residuals = np.zeros((len(labels), len(samples)))
    asked = np.zeros(residuals.shape, dtype=np.bool_)
    for column, of in enumerate(samples):
        names, influences, _, _ = cluster_influences(of, macro_weights([sample.cell for sample in of]))
        rows = [row_of[name] for name in names.tolist()]
        residuals[rows, column], asked[rows, column] = influences, True
    tasks = [task_of[label] for label in labels]
    starts = [row for row, task in enumerate(tasks) if row == 0 or task != tasks[row - 1]]
    return residuals, asked, [slice(start, stop) for start, stop in zip(starts, [*starts[1:], len(tasks)], strict=True)]
