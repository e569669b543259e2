"""`mergeyard compare A B`."""

from __future__ import annotations

import argparse

from orchestrator.commands.inputs import print_json, run_url


def compare(options: argparse.Namespace) -> int:
    """`mergeyard compare A B`: wins and losses of B against A."""
    from orchestrator.report.scored_models import find_models
    from orchestrator.report.terminal.comparison import print_comparison
    from orchestrator.report.two_models import compare_models, with_expected

    a, b = find_models((options.a, options.b), run_url)
    comparison = compare_models(a, b)
    if options.json:
        print_json(with_expected(comparison).document())
    else:
        print_comparison(with_expected(comparison, options.flips), options.flips)
    return 0
