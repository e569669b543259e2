"""`mergeyard check URL`."""

from __future__ import annotations

import argparse

from jobs.errors import BadInput
from orchestrator.commands.inputs import print_json


def check(options: argparse.Namespace) -> int:
    """`mergeyard check URL`: the settings of a store, and its promises; 2 where a run could not have its output."""
    from workers.storage import open_store
    from workers.storage.probing import probe, settings

    store = open_store(options.url).url
    found = settings(store)
    if not options.json:
        for name, value in {"store": store, **found}.items():
            print(f"{name:<15} {value}", flush=True)
    findings = probe(options.url)
    broken = [finding for finding in findings if finding.trouble]
    if options.json:
        checks = [{"promise": finding.promise, "trouble": finding.trouble} for finding in findings]
        print_json({"store": store, "settings": found, "checks": checks, "good": not broken})
    else:
        for finding in findings:
            print(f"{'no ' if finding.trouble else 'yes'}  {finding.promise}")
            if finding.trouble:
                print(f"     {finding.trouble}")
        print("a run cannot have its output here" if broken else "a run can have its output here")
    return BadInput.exit_code if broken else 0
