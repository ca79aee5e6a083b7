"""What a run survives: other machines, signals, a full disk and a disk that cannot be written."""

import re
import resource
import shutil
import subprocess

import numpy as np
import pytest

from tests.train import jobs
from tests.train.test_processes import free_port

pytestmark = [pytest.mark.slow, pytest.mark.multiprocess]

TRAIN = ("train.steps=12", "rates.steps=3", "checkpoint.every=4", "checkpoint.latest=10")
LONG = ("train.steps=100", "rates.steps=3", "checkpoint.every=1000")
MESHES = {
    "data": lambda devices: ("mesh.shape=-1,", "mesh.axes=data,"),
    "fsdp": lambda devices: (f"mesh.shape=-1,{min(2, devices)}", "mesh.axes=data,fsdp"),
}


def start_two(workdir, *fields, other=()):
    """Two processes with two devices each; other: fields of the second alone."""
    flags = [f"--coordinator=127.0.0.1:{free_port()}", "--processes=2"]
    return [
        jobs.start(workdir, *fields, *(other if i else ()), flags=[*flags, f"--process={i}"])
        for i in range(2)
    ]


@pytest.fixture(scope="module", params=MESHES)
def by_two(request, tmp_path_factory):
    """(mesh, workdir) of a finished run of two processes."""
    workdir = tmp_path_factory.mktemp(request.param)
    done = jobs.finish(*start_two(workdir, *TRAIN, *MESHES[request.param](4)))
    assert [each.code for each in done] == [0, 0], done
    return request.param, workdir


def cut(workdir, copy, last):
    """A copy that knows no checkpoint after `last`, as if the run had been killed."""
    shutil.copytree(workdir, copy)
    for step in jobs.checkpoints(copy):
        if step > last:
            shutil.rmtree(copy / "checkpoints" / str(step))
    return copy


def test_two_processes_write_one_log(by_two):
    _, workdir = by_two
    assert jobs.checkpoints(workdir) == [4, 8, 12, 15]
    assert list(jobs.read_steps(workdir)) == [
        *(("train", step) for step in range(1, 13)),
        *(("rates", step) for step in range(1, 4)),
    ]
    assert (workdir / "results.json").exists()


@pytest.mark.parametrize("devices", [8, 4, 1])
@pytest.mark.parametrize("last", [8, 12])
def test_one_process_goes_on_with_another_number_of_devices(by_two, tmp_path, devices, last):
    mesh, workdir = by_two
    copy, fields = cut(workdir, tmp_path / "copy", last), (*TRAIN, *MESHES[mesh](devices))
    jobs.succeed(copy, *fields, devices=devices)
    before, after = jobs.read_steps(workdir), jobs.read_steps(copy)
    assert list(after) == list(before)
    losses = np.array([[*before.values()], [*after.values()]])
    np.testing.assert_array_equal(*losses[:, :last])
    np.testing.assert_allclose(*losses[:, last:], rtol=0, atol=1e-6)


def test_sigterm_to_one_of_two_stops_both_at_one_step(tmp_path):
    running = start_two(tmp_path, *LONG)
    jobs.stop_midway(running[1], tmp_path)
    done = jobs.finish(*running)
    assert [each.code for each in done] == [0, 0], done
    steps = [re.findall(r"stopped after step (\d+)", each.complained) for each in done]
    assert steps[0] == steps[1] == [str(step) for step in jobs.checkpoints(tmp_path)]
    assert 5 <= int(steps[0][0]) < 100
    again = jobs.finish(*start_two(tmp_path, *LONG))
    assert [each.code for each in again] == [0, 0], again
    assert len(jobs.read_steps(tmp_path)) == 103
    assert jobs.checkpoints(tmp_path) == [103]


def test_two_configs_stop_both(tmp_path):
    done = jobs.finish(*start_two(tmp_path, *TRAIN, other=["optimizer.lr=0.1"]))
    assert [each.code for each in done] == [2, 2], done
    assert done[0].sentence().startswith("process 1 has another config than process 0; ")
    assert done[1].sentence().startswith("config.optimizer.lr=0.1 here, 0.002 in process 0; ")
    assert not list(tmp_path.iterdir())


def test_sigterm_saves_and_the_same_command_ends_as_if_nothing_had_been(tmp_path):
    whole, stopped = jobs.succeed(tmp_path / "whole", *LONG), tmp_path / "stopped"
    running = jobs.start(stopped, *LONG)
    jobs.stop_midway(running, stopped)
    (done,) = jobs.finish(running)
    assert done.code == 0, done.complained
    (step,) = jobs.checkpoints(stopped)
    assert f"stopped after step {step}; " in done.complained and 5 <= step < 100
    assert len(jobs.read_steps(stopped)) == step
    jobs.succeed(stopped, *LONG)
    assert jobs.read_log(stopped) == jobs.read_log(whole)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The workdir of a finished run of one process."""
    return jobs.succeed(tmp_path_factory.mktemp("alone"), *TRAIN)


def test_files_that_cannot_grow_stop_the_run(alone, tmp_path):
    copy = cut(alone, tmp_path / "copy", 4)
    limit = (16 << 10, resource.RLIM_INFINITY)
    done = jobs.run(
        copy, *TRAIN, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    )
    assert done.code == 2, done.complained
    assert "could not be written" in done.sentence()
    assert "the last good step is 4;" in done.sentence()
    assert jobs.checkpoints(copy) == [4]
    jobs.succeed(copy, *TRAIN)
    assert jobs.read_log(copy) == jobs.read_log(alone)
    assert sorted(path.name for path in (copy / "checkpoints").iterdir()) == ["12", "15", "4", "8"]


@pytest.fixture
def disk(tmp_path):
    """A disk of its own that holds two checkpoints."""
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1300k", "tmpfs", path]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting needs root")
    yield path
    subprocess.run(["umount", path], check=True)


def remount(disk, option):
    subprocess.run(["mount", "-o", f"remount,{option}", disk], check=True)


def test_a_full_disk_stops_the_run(alone, disk):
    workdir = disk / "run"
    done = jobs.run(workdir, *TRAIN)
    assert done.code == 2, done.complained
    steps = jobs.checkpoints(workdir)
    assert steps and steps == [4, 8, 12][: len(steps)]
    assert f"the last good step is {steps[-1]};" in done.sentence()
    remount(disk, "size=64m")
    jobs.succeed(workdir, *TRAIN)
    assert jobs.read_log(workdir) == jobs.read_log(alone)
    assert jobs.checkpoints(workdir) == [4, 8, 12, 15]


def test_a_disk_that_is_read_only(alone, disk):
    remount(disk, "size=64m")
    workdir = cut(alone, disk / "run", 8)
    log = jobs.read_log(workdir)
    remount(disk, "ro")
    for path in (workdir, disk / "new"):
        done = jobs.run(path, *TRAIN)
        assert done.code == 2, done.complained
        assert "Read-only file system" in done.sentence() and str(path) in done.sentence()
    assert jobs.checkpoints(workdir) == [4, 8] and jobs.read_log(workdir) == log


def test_a_workdir_below_a_file(tmp_path):
    (tmp_path / "file").touch()
    done = jobs.run(tmp_path / "file" / "run", *TRAIN)
    assert done.code == 2
    assert done.complained.count("\n") == 1 and str(tmp_path / "file") in done.sentence()
