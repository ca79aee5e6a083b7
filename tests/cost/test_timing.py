"""Candidates take turns."""

import pytest

from tokred.cost import Rounds, Timing, time_rounds


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def costs(clock: Clock, log: list[str], name: str, seconds: list[float]):
    left = iter(seconds)

    def run():
        log.append(name)
        clock.now += next(left)

    return run


def test_functions_alternate_and_warm_up_apart():
    clock, log = Clock(), []
    functions = {
        "a": costs(clock, log, "a", [9, 1, 5, 3]),
        "b": costs(clock, log, "b", [9, 2, 2, 4]),
    }
    times = time_rounds(functions, rounds=3, warmup=1, clock=clock)
    assert "".join(log) == "abababab"
    assert times == {"a": Timing(3, 1, 5, 3), "b": Timing(2, 2, 4, 3)}


def test_a_limit_ends_after_a_whole_round():
    clock, log = Clock(), []
    functions = {name: costs(clock, log, name, [1] * 9) for name in "ab"}
    times = time_rounds(functions, Rounds(9, seconds=3), warmup=0, clock=clock)
    assert times["a"].rounds == 2
    assert "".join(log) == "abab"
    slow = {"a": costs(clock, log, "c", [1])}
    time_rounds(slow, Rounds(9, seconds=0), warmup=0, clock=clock)
    assert log[-1] == "c"


def test_calls_under_way_are_timed_behind_the_rounds():
    clock, log = Clock(), []
    functions = {"a": costs(clock, log, "a", [5, 5, 2, 4]), "b": costs(clock, log, "b", [1] * 4)}
    times = time_rounds(functions, Rounds(2, ahead=2), warmup=0, clock=clock)
    assert "".join(log) == "abab" + "aabb"
    assert times["a"] == Timing(5, 5, 5, 2, 3) and times["b"].pipelined == 1


def test_rounds_are_checked():
    with pytest.raises(ValueError, match="count >= 1"):
        time_rounds({}, rounds=0)
