"""Which tests are quick, which share a worker of pytest, and which run alone.

A test is quick unless SLOW or SLOW_FIXTURES names it. `make quick` fails a quick test that starts a process or a
server, imports Ray or a model library, or takes QUICK_SECONDS of CPU time, so that both lists stay true.
"""

from __future__ import annotations

import fcntl
import os
import sys
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

ROOT = Path(__file__).parents[1]

RAY = (
    "tests/end_to_end",
    "tests/infra/test_draining.py",
    "tests/infra/test_roles.py",
    "tests/infra/test_together.py",
    "tests/security/test_secrets.py",
)
"""Tests that start Ray: two clusters at once starve each other."""

ORACLE = "tests/conformance/test_against"
"""Tests that share a process of mergekit, which takes ten seconds of CPU time to start."""

HARNESS = (
    "tests/orchestrator/evaluating/test_session.py::test_a_real_task_of_the_harness",
    "tests/orchestrator/evaluating/test_session.py::test_a_remark_of_a_worker",
    "tests/orchestrator/evaluating/test_session.py::test_a_task_of_the_harness",
    "tests/workers/benchmarks/harness/test_adapter.py",
)
"""Tests that use the fixture `harness_index`: a process indexes lm-evaluation-harness for 7 to 14 s."""

SLOW = (
    *RAY,
    "tests/benchmarks",
    "tests/chaos",
    "tests/conformance",
    "tests/fuzz/test_fuzz.py",
    "tests/infra",
    "tests/jobs/test_expressions.py::test_agrees_with_python",
    "tests/jobs/test_expressions.py::test_an_expression_of_200_characters",
    "tests/jobs/test_expressions.py::test_format_number_is_within",
    "tests/jobs/test_expressions.py::test_no_text_does_worse",
    "tests/jobs/test_fuzz.py",
    "tests/jobs/test_job.py::test_the_time_to_bind_points",
    "tests/jobs/test_specs.py::test_plain_data_survives_yaml",
    "tests/jobs/test_specs.py::test_the_schema_is_one",
    "tests/jobs/test_trajectories.py::test_the_numbers_of_a_trajectory",
    "tests/jobs/test_yaml_nodes.py::test_every_json_document",
    "tests/orchestrator/cluster/test_in_process.py::test_in_this_process_a_store",
    "tests/orchestrator/cluster/test_ray",
    "tests/orchestrator/cluster/test_shipment.py::test_a_dashboard_that_does_not_answer",
    "tests/orchestrator/commands/test_check.py::test_every_run_on_a_file_system",
    "tests/orchestrator/commands/test_commands.py::test_a_broken_run_ends_in_the_same_bytes",
    "tests/orchestrator/commands/test_commands.py::test_heads_that_some_parents_lack",
    "tests/orchestrator/commands/test_commands.py::test_merge_makes_a_model_that_transformers_loads",
    "tests/orchestrator/commands/test_commands.py::test_status_follows",
    "tests/orchestrator/commands/test_commands.py::test_verify_finds_one_flipped_bit",
    "tests/orchestrator/commands/test_completion.py::test_bash",
    "tests/orchestrator/commands/test_measure.py",
    "tests/orchestrator/commands/test_search.py",
    "tests/orchestrator/evaluating/test_confirming.py",
    "tests/orchestrator/evaluating/test_forecast.py",
    "tests/orchestrator/evaluating/test_guarding.py",
    "tests/orchestrator/evaluating/test_outcome.py",
    "tests/orchestrator/evaluating/test_searching.py",
    "tests/orchestrator/evaluating/test_servers.py",
    "tests/orchestrator/evaluating/test_session.py",
    "tests/orchestrator/evaluating/test_subjects.py",
    "tests/orchestrator/judging/test_gate.py::test_items_needed_reach",
    "tests/orchestrator/judging/test_gate.py::test_many_small_gains",
    "tests/orchestrator/judging/test_gate.py::test_the_anytime_gate_decides",
    "tests/orchestrator/judging/test_gate.py::test_topping_up_is_legal_only_in_the_anytime_mode",
    "tests/orchestrator/judging/test_gate.py::test_wrong_passes",
    "tests/orchestrator/judging/test_gate.py::test_wrong_verdicts",
    "tests/orchestrator/judging/test_guards.py::test_wrong_calls",
    "tests/orchestrator/judging/test_power.py",
    "tests/orchestrator/judging/test_race_simulation.py",
    "tests/orchestrator/judging/test_simultaneous.py::test_of_equal_models",
    "tests/orchestrator/judging/test_statistics_simulation.py",
    "tests/orchestrator/making",
    "tests/orchestrator/merging/test_gathering.py::test_the_head_of_an_untied_parent",
    "tests/orchestrator/merging/test_stages.py",
    "tests/orchestrator/nightly/test_tonight.py",
    "tests/orchestrator/notebook",
    "tests/orchestrator/planning/test_activations.py::test_a_head_has_its_own",
    "tests/orchestrator/planning/test_activations.py::test_every_omega",
    "tests/orchestrator/planning/test_devices.py::test_a_gpu_is_faster_where",
    "tests/orchestrator/planning/test_plan.py::test_the_time_to_plan_points",
    "tests/orchestrator/planning/test_plan.py::test_tokenizers_of_every_format",
    "tests/orchestrator/planning/test_scale.py",
    "tests/orchestrator/points/test_pruning.py::test_a_dry_run",
    "tests/orchestrator/points/test_pruning.py::test_points_that_only_their_names_parted",
    "tests/orchestrator/points/test_verifying.py::test_a_finished_run",
    "tests/orchestrator/points/test_verifying.py::test_a_flipped_bit",
    "tests/orchestrator/points/test_verifying.py::test_records_of_an_older_version",
    "tests/orchestrator/points/test_verifying.py::test_the_same_job_mends",
    "tests/orchestrator/records/test_ledger.py::test_a_damaged_receipt",
    "tests/orchestrator/records/test_ledger.py::test_a_driver_elsewhere_that_no_longer_renews",
    "tests/orchestrator/records/test_ledger.py::test_a_living_driver_elsewhere",
    "tests/orchestrator/records/test_ledger.py::test_a_silent_driver_elsewhere",
    "tests/orchestrator/report/test_in_a_browser.py",
    "tests/orchestrator/report/test_page.py",
    "tests/orchestrator/report/test_report_command.py",
    "tests/orchestrator/report/test_two_models.py::test_the_written_point_of_a_search",
    "tests/orchestrator/searching/test_evolving.py::test_batches_depend_neither",
    "tests/orchestrator/searching/test_search.py",
    "tests/orchestrator/viewing/test_in_a_browser.py",
    "tests/orchestrator/viewing/test_serving.py",
    "tests/orchestrator/viewing/test_site.py::test_an_export_without_an_address",
    "tests/security",
    "tests/simulation/test_simulation.py::test_a_planted_bug_is_found",
    "tests/simulation/test_simulation.py::test_hundreds_of_schedules",
    "tests/test_documents.py::test_every_documented_job_can_be_planned",
    "tests/test_documents.py::test_the_commands_of_the_pages_run",
    "tests/test_house.py",
    "tests/test_selection.py",
    "tests/workers/activations",
    "tests/workers/benchmarks/harness",
    "tests/workers/benchmarks/ruler/test_budget.py",
    "tests/workers/benchmarks/ruler/test_draws.py::test_items_are_the_same_in_another_process",
    "tests/workers/benchmarks/ruler/test_draws.py::test_items_do_not_depend",
    "tests/workers/benchmarks/ruler/test_draws.py::test_needle_grid",
    "tests/workers/benchmarks/ruler/test_draws.py::test_the_same_thing_is_asked_at_every_length",
    "tests/workers/benchmarks/ruler/test_prompts.py::test_any_text_is_a_haystack",
    "tests/workers/benchmarks/ruler/test_prompts.py::test_chat_frame_surrounds",
    "tests/workers/benchmarks/ruler/test_prompts.py::test_the_worked_example_of_common_words",
    "tests/workers/benchmarks/test_generation.py",
    "tests/workers/benchmarks/test_mrcr.py::test_in_a_chat",
    "tests/workers/benchmarks/test_mrcr.py::test_too_short_a_length",
    "tests/workers/benchmarks/test_scorers.py::test_rouge_l_is_that_of_the_package",
    "tests/workers/benchmarks/test_sets.py::test_a_chat_template_frames",
    "tests/workers/benchmarks/test_sets.py::test_a_misspelt_task_of_the_harness",
    "tests/workers/benchmarks/test_sets.py::test_in_a_chat",
    "tests/workers/benchmarks/test_sets.py::test_only_sets_whose_prompts_changed",
    "tests/workers/benchmarks/test_sets.py::test_tasks_of_the_harness_are_known",
    "tests/workers/benchmarks/test_sets.py::test_the_address_changes_with",
    "tests/workers/benchmarks/test_sets.py::test_what_a_task_of_the_harness_is_told",
    "tests/workers/benchmarks/test_tiny_parents.py",
    "tests/workers/benchmarks/texts/test_pieces.py",
    "tests/workers/benchmarks/texts/test_tokenizer.py",
    "tests/workers/checkpoints/test_opening.py::test_any_bytes",
    "tests/workers/checkpoints/test_opening.py::test_any_header",
    "tests/workers/engines",
    "tests/workers/evaluating",
    "tests/workers/making/test_low_rank.py::test_a_searched_subspace",
    "tests/workers/merging/test_on_a_gpu.py",
    "tests/workers/merging/test_resident.py::test_unwritten",
    "tests/workers/merging/test_shard.py::test_a_bit_of_a_parent_that_flips",
    "tests/workers/merging/test_shard.py::test_a_file_that_changes_while",
    "tests/workers/merging/test_shard.py::test_a_large_tensor_that_is_near",
    "tests/workers/merging/test_shard.py::test_a_merge_that_is_computed_while",
    "tests/workers/merging/test_shard.py::test_bytes_do_not_depend_on_memory_threads_or_grouping",
    "tests/workers/merging/test_shard.py::test_past_the_page_cache",
    "tests/workers/methods/kernels/test_compiling.py",
    "tests/workers/methods/kernels/test_dense.py::test_a_solution",
    "tests/workers/methods/test_aim.py::test_a_pass_has_the_bits_of_the_formula",
    "tests/workers/methods/test_passes.py::test_a_pass_has_the_bits_of_the_formula",
    "tests/workers/methods/test_ranking.py::test_the_largest_are_those_of_a_stable_sort",
    "tests/workers/test_half_products.py",
    "tests/workers/storage/test_conformance.py::test_an_upload_of_many_parts",
    "tests/workers/storage/test_conformance.py::test_list_is_whole_beyond_one_page",
    "tests/workers/storage/test_local.py::test_a_full_disk",
    "tests/workers/storage/test_local.py::test_of_racing_processes",
    "tests/workers/storage/test_local.py::test_what_a_killed_writer_left",
    "tests/workers/storage/test_mapping.py::test_a_bus_error_elsewhere",
    "tests/workers/storage/test_mapping.py::test_files_are_mapped_by_many_threads",
    "tests/workers/storage/test_open_store.py::test_a_folder_is_opened_without_any_cloud_library",
)
"""Tests that start a model, a process or a server, or that compute for long: how their names begin."""

SLOW_FIXTURES = {"chat", "fault_proxy", "harness_task", "hub_server", "killed_driver", "mounted", "quirky_s3"}
SLOW_FIXTURES |= {"azurite", "gcs_server", "real_model", "s3_server", "served_long", "sleeper"}
SERVERS = {"s3": "s3_server", "azure": "azurite", "gcs": "gcs_server"}
QUICK_SECONDS = 8.0
"""Of CPU time; a machine with other work takes two or three times that of a quiet one."""

NOT_QUICK = {"subprocess.Popen", "os.posix_spawn", "os.fork", "socket.bind", "ray", "transformers", "lm_eval"}
"""Python's audit events, and modules to import, that a quick test does without."""


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("markexpr") == "quick":
        config.pluginmanager.register(QuickTests())


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what is quick; the long group of Ray begins first, and tests that run alone come last."""
    for item in items:
        if not (item.nodeid.startswith(SLOW) or _needs(item) & SLOW_FIXTURES or item.get_closest_marker("heavy")):
            item.add_marker("quick")
    items.sort(key=lambda item: (not item.nodeid.startswith(RAY), item.get_closest_marker("serial") is not None))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    return Groups(config, log)


class Groups(LoadScopeScheduling):
    """One worker of pytest-xdist runs all tests of RAY, one all of ORACLE, one all of HARNESS.

    Whoever is free runs the next of the others.

    `--dist loadgroup` of pytest-xdist 3.8 does not group under pytest 9.2: it writes to an attribute that is gone.
    """

    def _split_scope(self, nodeid: str) -> str:
        groups = {"ray": RAY, "oracle": ORACLE, "harness": HARNESS}
        return next((group for group, names in groups.items() if nodeid.startswith(names)), nodeid)


def _needs(item: pytest.Item) -> set[str]:
    """Its fixtures, with the server that a store named s3, azure or gcs asks for."""
    assert isinstance(item, pytest.Function)
    named = item.callspec.params.values() if hasattr(item, "callspec") else ()
    return {*item.fixturenames, *(server for name, server in SERVERS.items() if name in named)}


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """A test marked serial waits for the other workers of pytest, and they wait for it."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return (yield)
    with _locked(fcntl.LOCK_EX if item.get_closest_marker("serial") else fcntl.LOCK_SH):
        return (yield)


@contextmanager
def _locked(how: int) -> Iterator[None]:
    """Holds the lock of this checkout's tests. A queue before it lets a test that wants it alone have its turn."""
    queue, lock = (os.open(path, os.O_RDONLY) for path in (__file__, Path(__file__).parent))
    try:
        fcntl.flock(queue, fcntl.LOCK_EX)
        fcntl.flock(lock, how)
        fcntl.flock(queue, fcntl.LOCK_UN)
        yield
        fcntl.flock(lock, fcntl.LOCK_UN)
    finally:
        os.close(queue)
        os.close(lock)


class QuickTests:
    """Fails a test that is marked quick and is not; leaves files of slow tests alone, as some import for seconds."""

    def __init__(self) -> None:
        self._seen: list[str] = []
        sys.addaudithook(self._notice)

    def _notice(self, event: str, details: tuple[Any, ...]) -> None:
        if (event in NOT_QUICK and details[0] != "git") or (event == "import" and details[0] in NOT_QUICK):
            self._seen.append(f"{event} {details[0]}")

    def pytest_ignore_collect(self, collection_path: Path) -> bool | None:
        return collection_path.relative_to(ROOT).as_posix().startswith(SLOW) or None

    def pytest_runtest_logstart(self) -> None:
        self._seen.clear()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self) -> Generator[None, object, object]:
        before = sum(os.times()[:4])
        ended = yield
        seconds = sum(os.times()[:4]) - before
        if self._seen or seconds > QUICK_SECONDS:
            reasons = ", ".join(self._seen) or f"{seconds:.1f} s of CPU time"
            pytest.fail(f"not a quick test: {reasons}; make it quick, or name it in tests/selection.py")
        return ended
