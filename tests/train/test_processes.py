import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from tokred.train.processes import (
    Preempted,
    Preemption,
    find_launcher,
    is_main,
    local_gpus,
    require_same_config,
    start_processes,
    stop_processes,
    to_host,
)

ROOT = Path(__file__).resolve().parents[2]
SRUN = {
    "SLURM_JOB_ID": "4242",
    "SLURM_STEP_NODELIST": "127.0.0.1",
    "SLURM_NTASKS": "2",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}
INDEXED = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"}


def without(env: Mapping[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in env.items() if name not in names}


@pytest.mark.parametrize(
    "env, launcher",
    [
        ({}, None),
        (SRUN, "SLURM"),
        (without(SRUN, "SLURM_STEP_NUM_TASKS"), "SLURM"),
        ({**SRUN, "SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1"}, None),
        ({**SRUN, "SLURM_STEP_NUM_TASKS": "1"}, None),  # a shell within an allocation of two
        (without(SRUN, "SLURM_STEP_NODELIST"), None),  # a batch script, without srun
        ({"OMPI_COMM_WORLD_SIZE": "4", **SRUN, "SLURM_STEP_NUM_TASKS": "1"}, "Open MPI"),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, None),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1", **INDEXED}, "GKE TPU"),
        ({"TPU_PROCESS_ADDRESSES": "a:1,b:1"}, "GKE TPU"),
        ({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, "GKE TPU"),
        ({"TPU_WORKER_HOSTNAMES": "localhost", **INDEXED}, None),
        (INDEXED, "Kubernetes"),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),
        ({"TPU_ML_PLATFORM": "JAX", "TPU_SKIP_MDS_QUERY": "1"}, None),
    ],
)
def test_find_launcher(env, launcher):
    assert find_launcher(env) == launcher


@pytest.fixture
def metadata() -> Iterator[tuple[str, dict[str, str]]]:
    """The address of a metadata server, and what it knows."""
    known: dict[str, str] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name = self.path.rsplit("/", 1)[1]
            found = name in known and self.headers["Metadata-Flavor"] == "Google"
            self.send_response(200 if found else 404)
            self.end_headers()
            self.wfile.write(known.get(name, "").encode())

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}", known
        server.shutdown()


@pytest.mark.parametrize(
    "hosts, launcher",
    [("a,b,c,d", "Cloud TPU VM"), ("x:y:10.0.0.1,x:y:10.0.0.2", "Cloud TPU VM"), ("a", None)],
)
def test_a_tpu_vm_asks_the_metadata_server_for_the_hosts_of_its_slice(metadata, hosts, launcher):
    address, known = metadata
    known["worker-network-endpoints"] = hosts
    env = {"TPU_ML_PLATFORM": "JAX", "GCE_METADATA_IP": address}
    assert find_launcher(env) == launcher


def test_tpu_chips_without_a_slice_leave_it_to_the_next_launcher(metadata):
    env = {"TPU_ML_PLATFORM": "JAX", "GCE_METADATA_IP": metadata[0]}
    assert find_launcher(env) is None
    assert find_launcher({**env, **INDEXED}) == "Kubernetes"


@pytest.mark.parametrize(
    "env, gpus",
    [
        (SRUN, None),
        ({**SRUN, "CUDA_VISIBLE_DEVICES": "0,1,2,3"}, [0, 1, 2, 3]),  # alone on its node
        ({**SRUN, "CUDA_VISIBLE_DEVICES": "4,5", "SLURM_STEP_NUM_NODES": "1"}, None),
        ({**SRUN, "CUDA_VISIBLE_DEVICES": "5", "SLURM_STEP_NUM_NODES": "1"}, [0]),
        ({**SRUN, "CUDA_VISIBLE_DEVICES": "0,1", "JAX_LOCAL_DEVICE_IDS": "1"}, None),
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, None),
    ],
)
def test_local_gpus(env, gpus):
    assert local_gpus(env) == gpus


@pytest.mark.parametrize(
    "flags, words",
    [
        (("host:1", 2, None), "--process is missing"),
        ((None, 2, 0), "--coordinator is missing"),
        ((None, 2, None), "--coordinator and --process is missing"),
        (("host:1", None, 0), "--processes is missing"),
        (("host:1", 2, 2), "--process must be in 0..1"),
        (("host:1", 2, -1), "--process must be in 0..1"),
        (("host:1", 0, 0), "--processes must be 1 or more"),
        (("host", 2, 0), "--coordinator must be HOST:PORT"),
        ((":1234", 2, 0), "--coordinator must be HOST:PORT"),
        (("host:port", 2, 0), "--coordinator must be HOST:PORT"),
    ],
)
def test_bad_flags_are_named(flags, words):
    with pytest.raises(ValueError, match=words) as error:
        start_processes(*flags, env={})
    assert str(error.value).count(".") - words.count(".") <= 1


def test_a_process_that_is_alone_starts_nothing():
    assert not start_processes(env={})
    assert not start_processes(None, 1, None, env=SRUN)
    assert not start_processes("host:1", 1, 0, env=SRUN)
    assert not jax.distributed.is_initialized()
    stop_processes()
    assert is_main()
    require_same_config({"seed": 0})


def test_to_host_of_one_process():
    mesh = jax.make_mesh((8,), ("data",))
    split = jax.device_put(np.arange(16.0), jax.NamedSharding(mesh, jax.P("data")))
    got = to_host({"split": split, "none": None, "number": 3, "host": np.ones(2)})
    assert type(got["split"]) is np.ndarray and got["split"].tolist() == list(range(16))
    assert got["none"] is None and got["number"] == 3


def test_sigterm_is_held_within_the_context_alone():
    heard = []
    before = signal.signal(signal.SIGTERM, lambda *_: heard.append(1))
    try:
        with Preemption() as preemption:
            assert not preemption.reached(1)
            os.kill(os.getpid(), signal.SIGTERM)
            assert preemption.reached(2) and preemption.reached(3)
            assert not heard
        os.kill(os.getpid(), signal.SIGTERM)
        assert heard == [1]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_preemption_in_another_thread_leaves_the_signal_alone():
    before, found = signal.getsignal(signal.SIGTERM), []

    def work() -> None:
        with Preemption() as preemption:
            found.extend([signal.getsignal(signal.SIGTERM), preemption.reached(1)])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [before, False]


def test_preempted_carries_the_step():
    assert Preempted(7).step == 7 and "step 7" in str(Preempted(7))


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


Words = Sequence[Sequence[str]]
Variables = Sequence[Mapping[str, str]]


def finish_two(
    task: str, flags: Words = ((), ()), env: Variables = ({}, {})
) -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of `task` of two_processes.py in each of two processes."""
    base = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "PYTHONPATH": str(ROOT),
    }
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.train.two_processes", task, *flags[i]],
            env={**base, **env[i]},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    try:
        said = [process.communicate(timeout=90) for process in running]
    finally:
        for process in running:
            process.kill()
            process.wait()
    return [(p.returncode, *s) for p, s in zip(running, said, strict=True)]


def run_two(task: str, flags: Words = ((), ()), env: Variables = ({}, {})) -> list[Any]:
    """What `task` gives in each of two processes; both must exit with 0."""
    return [_result(*end) for end in finish_two(task, flags, env)]


def _result(code: int, out: str, err: str) -> Any:
    lines = [line for line in out.splitlines() if line.startswith("result: ")]
    assert code == 0 and len(lines) == 1, f"exit {code}\n{out}\n{err}"
    return json.loads(lines[0].removeprefix("result: "))


def flags_of_two() -> Words:
    coordinator = f"127.0.0.1:{free_port()}"
    return [(coordinator, "2", str(i)) for i in range(2)]


JOINED = [[0, 2, True, 4], [1, 2, False, 4]]  # index, count, is_main, devices


@pytest.mark.multiprocess
def test_flags_win_over_the_launcher():
    assert run_two("whoami", flags_of_two(), [SRUN, SRUN]) == JOINED


@pytest.mark.multiprocess
def test_the_variables_of_srun_join_two_processes():
    port = str(free_port())
    env = [{**SRUN, "SLURM_PROCID": str(i), "JAX_COORDINATOR_PORT": port} for i in range(2)]
    assert run_two("whoami", env=env) == JOINED


@pytest.mark.multiprocess
def test_the_variables_of_mpirun_join_two_processes():
    common = {
        "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://127.0.0.1:34911",
        "OMPI_COMM_WORLD_SIZE": "2",
        "JAX_COORDINATOR_PORT": str(free_port()),
    }
    ranks = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK")
    env = [{**common, **dict.fromkeys(ranks, str(i))} for i in range(2)]
    assert run_two("whoami", env=env) == JOINED


@pytest.mark.multiprocess
def test_another_config_raises_in_both():
    main, other = run_two("config", flags_of_two())
    assert main.startswith("process 1 has another config than process 0; ")
    assert other.startswith("config.optimizer.lr=0.1 here, 0.01 in process 0; ")


@pytest.mark.multiprocess
def test_to_host_gives_the_whole_arrays_to_both():
    whole = np.arange(8.0).reshape(4, 2).tolist()
    expected = {"split": whole, "same": whole, "local": [1.0, 1.0]}
    assert run_two("host", flags_of_two()) == [expected, expected]


@pytest.mark.multiprocess
def test_sigterm_to_one_stops_both_at_the_same_step():
    (first, still), (second, also) = run_two("preempt", flags_of_two())
    assert first == second and 20 < first < 4000
    assert still and also


@pytest.mark.multiprocess
def test_one_failure_ends_both():
    (main, *_), (failed, _, words) = finish_two("fail", flags_of_two())
    assert main != 0 and failed != 0
    assert "ValueError: a failure of one process" in words


@pytest.mark.multiprocess
def test_open_mpi_5_asks_for_flags():
    """It has no coordinator in the environment; the processes must not run each by itself."""
    env = {**os.environ, "OMPI_COMM_WORLD_SIZE": "2", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "tests.train.two_processes", "whoami"]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=90)
    assert done.returncode != 0
    assert "ValueError: Open MPI started several processes, but jax cannot find" in done.stderr
