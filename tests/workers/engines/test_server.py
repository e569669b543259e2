"""Requests to one server, apart from the engine that makes them."""

import threading
import time

import pytest

from jobs.errors import Unavailable
from workers.engines.server import Server


@pytest.fixture
def server():
    options = {"concurrency": 2, "attempts": 6, "timeout_seconds": 30.0, "first_pause_seconds": 0.1}
    server = Server("http://127.0.0.1:1/v1", **options)
    yield server
    server.close()


def test_an_error_is_told_while_an_earlier_task_waits(server):
    told, given_up = threading.Event(), []

    def ask(task):
        if task == 1:
            raise Unavailable("the quota is used up")
        if not told.wait(10):
            given_up.append(task)

    with pytest.raises(Unavailable, match="the quota is used up"):
        server.map(ask, [0, 1], None)
    told.set()
    assert not given_up


def test_answers_come_in_the_order_of_their_tasks(server):
    second_ended, counts = threading.Event(), []

    def ask(task):
        if task == 0:
            assert second_ended.wait(60)
        else:
            second_ended.set()
        return task * task

    assert server.map(ask, [0, 3], counts.append) == [0, 9] and counts == [1, 1]


def test_a_request_that_waits_for_the_server_hides_no_error(server):
    """The first request is told to wait for some seconds, then the second to wait for a day."""
    together = threading.Barrier(2)

    def exchange(method, path, body, most_bytes):
        together.wait(10)
        if body["task"] == 0:
            return 429, b"{}", 20.0, None
        while server._window.opens < time.monotonic() + 5:
            time.sleep(0.01)
        return 429, b"{}", 86_400.0, None

    def ask(task):
        return server.request("POST", "/completions", {"task": task}, 1 << 10, dict, "")

    server._exchange, began = exchange, time.monotonic()
    with pytest.raises(Unavailable, match="asks to wait 86400 s"):
        server.map(ask, [0, 1], None)
    assert time.monotonic() - began < 15
