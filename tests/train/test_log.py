"""The log of a resumed run, and where the time of a loop went."""

import json

import jax
import pytest

from tokred.train.clock import COMPILED, Clock, format_summary
from tokred.train.log import RunLog


def line(stage, step):
    return json.dumps({"stage": stage, "step": step, "loss": 1 / 3}) + "\n"


def reopen(path, kept):
    with RunLog(path.parent, kept=kept, tensorboard=False):
        pass
    return path.read_text()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.jsonl"


def test_lines_hold_the_numbers_and_no_times(path):
    with RunLog(path.parent, tensorboard=False) as log:
        log.write("train", 1, {"loss": 0.1, "accuracy": 1}, examples_per_s=3.0)
        written = path.read_text()  # before the file is closed
    assert json.loads(written) == {
        "stage": "train",
        "step": 1,
        "loss": 0.1,
        "accuracy": 1.0,
    }


def test_later_lines_go_and_the_rest_stays_byte_for_byte(path):
    first = [line("train", step) for step in (1, 2, 3)]
    path.write_text("".join([*first, line("train", 4), line("rates", 1)]))
    text = reopen(path, lambda stage, step: stage == "train" and step <= 3)
    assert text == "".join(first)


@pytest.mark.parametrize("torn", ['{"stage": "train", "st', "{", line("train", 3)[:-1]])
def test_a_torn_line_goes(path, torn):
    whole = line("train", 1) + line("train", 2)
    path.write_text(whole + torn)
    assert reopen(path, lambda stage, step: True) == whole


def test_a_log_that_fits_is_not_written_again(path):
    path.write_text(line("train", 1))
    before = path.stat()
    reopen(path, lambda stage, step: True)
    after = path.stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_reopened_log_goes_on_at_its_end(path):
    path.write_text(line("train", 1) + line("train", 2))
    with RunLog(path.parent, kept=lambda stage, step: step <= 1, tensorboard=False) as log:
        log.write("train", 2, {"loss": 1 / 3})
    assert path.read_text() == line("train", 1) + line("train", 2)


def test_a_silent_log_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with RunLog.silent() as log, RunLog(tmp_path / "other", write=False) as other:
        for each in (log, other):
            each.write("train", 1, {"loss": 1.0})
    assert not list(tmp_path.iterdir())


def test_event_files_hold_numbers_and_times(path):
    event_file = pytest.importorskip("tensorboardX.event_file_writer")
    with RunLog(path.parent) as log:
        log.write("train", 7, {"loss": 0.5}, examples_per_s=3.0)
    assert event_file is not None
    (events,) = path.parent.glob("events.out.tfevents.*")
    assert b"train/loss" in events.read_bytes() and b"train/examples_per_s" in events.read_bytes()


class Time:
    """A clock that stands still between calls of `spend`."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now

    def spend(self, clock, **sections):
        for name, seconds in sections.items():
            with clock(name):
                self.now += seconds


def test_sections_and_overhead_of_all_turns_but_the_first():
    time = Time()
    clock = Clock(time)
    time.spend(clock, data=5.0, step=60.0)  # the first turn, which compiles
    clock.turn()
    for save in (0.0, 0.5):
        time.spend(clock, data=0.125, place=0.125, step=0.5, save=save)
        time.now += 0.25  # belongs to no section
        clock.turn()
    summary = clock.summary()
    assert summary == {
        "steps": 2,
        "turn_ms": 1250.0,
        "overhead": 0.4,
        "compilations": 0,
        "data_ms": 125.0,
        "place_ms": 125.0,
        "save_ms": 250.0,
        "step_ms": 500.0,
    }
    assert "2 steps of 1250.0 ms; loop overhead 40.00 % (data 10.00, place 10.00, log 0.00, " in (
        format_summary("train", summary)
    )


def test_a_section_counts_although_it_raises():
    time = Time()
    clock = Clock(time)
    clock.turn()
    with pytest.raises(KeyError), clock("save"):
        time.now += 2.0
        raise KeyError
    clock.turn()
    assert clock.summary()["save_ms"] == 2000.0


def test_what_a_busy_device_hides_is_no_overhead():
    time = Time()
    clock = Clock(time)
    clock.turn()
    for busy in (True, False):
        with clock("data", lambda busy=busy: busy):
            time.now += 1.0
        clock.turn()
    summary = clock.summary()
    assert (summary["hidden_ms"], summary["data_ms"], summary["overhead"]) == (500.0, 500.0, 0.5)


def test_no_turn_no_time():
    summary = Clock(Time()).summary()
    assert (summary["steps"], summary["turn_ms"], summary["overhead"]) == (0, 0.0, 0.0)
    assert "0 steps" in format_summary("train", summary)


def test_compilations_of_later_steps_are_counted():
    clock = Clock(Time())

    def compiles(section):
        with clock(section):
            jax.monitoring.record_event_duration_secs(COMPILED, 0.1)

    with clock.counting():
        compiles("step")
        clock.turn()
        compiles("save")
        assert clock.compiled == 0
        compiles("step")
        assert clock.compiled == 1
    compiles("step")
    assert clock.compiled == 1
