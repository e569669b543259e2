"""The number of requests that a server gets at a time."""

import threading

import pytest

from workers.engines.congestion import LONGEST_PAUSE_SECONDS, Closed, Window


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def test_a_busy_reply_halves_the_window_once_for_all_that_were_under_way(clock):
    window = Window(16, 0.5, clock)
    entered = [window.enter() for _ in range(16)]
    clock.now = 101.0
    assert [window.busy(at, 0.0) for at in entered] == [True, *[False] * 15]
    assert window.size == 8 and window.opens == 101.5
    for _ in entered:
        window.leave()
    clock.now = 102.0
    assert window.busy(window.enter(), 0.0) is True and window.size == 4


def test_a_window_of_answers_widens_it_by_one_and_never_beyond_the_most(clock):
    window = Window(8, 0.5, clock)
    window.busy(window.enter(), 0.0)
    sizes = [window.size]
    for _ in range(100):
        window.answered()
        sizes.append(window.size)
    # 4 + 1/4 + 1/4.25 + ...: five of these reach 5, as n answers widen a window of n by less than one
    assert sizes[:6] == [4, 4, 4, 4, 4, 5] and max(sizes) == sizes[-1] == 8


def test_it_is_never_smaller_than_one(clock):
    window = Window(3, 0.5, clock)
    for _ in range(9):
        clock.now = window.opens
        window.busy(window.enter(), 0.0)
        window.leave()
    assert window.size == 1


def test_pauses_double_until_there_is_an_answer_and_are_as_long_as_asked(clock):
    window = Window(4, 0.5, clock)
    pauses = []
    for asked in (0, 0, 0, 0, 0, 0, 0, 0, 7.0):
        window.busy(window.enter(), asked)
        window.leave()
        pauses.append(window.opens - clock.now)
        clock.now = window.opens
    assert pauses == [0.5, 1, 2, 4, 8, 16, LONGEST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS]
    window.answered()
    window.busy(clock.now, 7.0)
    assert window.opens - clock.now == 7.0
    window.busy(clock.now - 1000, 9.0)
    assert window.opens - clock.now == 9.0, "also of a request from before the window was halved"


def test_no_more_enter_than_the_window_allows_and_a_closed_one_lets_nobody_in():
    window = Window(2, 0.0)
    together, most, lock = 0, 0, threading.Lock()

    def work():
        nonlocal together, most
        window.enter()
        with lock:
            together, most = together + 1, max(most, together + 1)
        with lock:
            together -= 1
        window.leave()

    threads = [threading.Thread(target=work) for _ in range(30)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most <= 2
    window.close()
    with pytest.raises(Closed):
        window.enter()
