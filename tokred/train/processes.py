"""Several JAX processes as one job: they find each other, agree on a config, stop at one step.

Every process runs the same program; what is said to raise or to return in all processes does so
only if all of them call it.
"""

import atexit
import contextlib
import itertools
import json
import os
import signal
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from tokred.train.cli import Stopped

PATIENCE = 20.0  # seconds; see _leave
FLAGS = ("--coordinator", "--processes", "--process")
_calls = itertools.count()  # of Preemption.reached, like the service of jax that it asks


def start_processes(
    coordinator: str | None = None,
    count: int | None = None,
    index: int | None = None,
    env: Mapping[str, str] = os.environ,
) -> bool:
    """Joins this process to the others, before anything touches a device; False if it is alone.

    With flags the processes are `count`, this is number `index`, and number 0 listens at
    `coordinator`, 'HOST:PORT'; every process sees all devices of its machine. count=1 says that
    there are no others. Without flags a launcher is looked for: see `find_launcher`.

    Raises:
      ValueError: flags that do not fit, or a launcher whose processes jax cannot find.
    """
    check_flags(coordinator, count, index)
    launcher = None if count else find_launcher(env)
    if count == 1 or (count is None and launcher is None):
        return False
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if launcher is None:
        jax.distributed.initialize(coordinator, count, index, cluster_detection_method="deactivate")
    else:
        _join(launcher, env)
    atexit.register(_leave)
    return True


def _join(launcher: str, env: Mapping[str, str]) -> None:
    try:
        jax.distributed.initialize(local_device_ids=local_gpus(env))
    except ValueError as error:
        raise ValueError(
            f"{launcher} started several processes, but jax cannot find them ({error}); pass "
            f"{', '.join(FLAGS)} to join them, or --processes=1 for runs of their own."
        ) from error


def stop_processes() -> None:
    """Leaves the job once all processes do; does nothing in a process that is alone."""
    if jax.distributed.is_initialized():
        jax.distributed.shutdown()


@contextlib.contextmanager
def joined(coordinator: str | None, count: int | None, index: int | None) -> Iterator[None]:
    """`start_processes`, and `stop_processes` where the job ends or stops in all of them."""
    start_processes(coordinator, count, index)
    try:
        yield
    except Stopped:
        stop_processes()
        raise
    stop_processes()


def _leave() -> None:
    """What a process does that exits without `stop_processes`, as after an error.

    If all do so, they end as they would alone. One that fails by itself ends when the others have
    not come within PATIENCE seconds, so that they end too, not after minutes.
    """
    leaving = threading.Thread(target=stop_processes, daemon=True)
    leaving.start()
    leaving.join(PATIENCE)
    if leaving.is_alive():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


def check_flags(coordinator: str | None, count: int | None, index: int | None) -> None:
    """Raises ValueError unless the flags are all given or none, and fit each other."""
    values = (coordinator, count, index)
    if values in ((None, None, None), (None, 1, None)):
        return
    if coordinator is None or count is None or index is None:
        missing = [flag for flag, value in zip(FLAGS, values, strict=True) if value is None]
        raise ValueError(
            f"{', '.join(FLAGS)} go together, {' and '.join(missing)} is missing; give all three."
        )
    if count < 1:
        raise ValueError(f"--processes must be 1 or more, got {count}; change it.")
    if not 0 <= index < count:
        raise ValueError(
            f"--process must be in 0..{count - 1} as --processes={count}, got {index}; change it."
        )
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal():
        raise ValueError(
            f"--coordinator must be HOST:PORT of process 0, got {coordinator!r}; change it."
        )


def find_launcher(env: Mapping[str, str] = os.environ) -> str | None:
    """The launcher that started this process as one of several, or None.

    Open MPI, SLURM (inside srun), GKE TPU, Cloud TPU VM or Kubernetes (indexed Job), the first
    that `env` shows; jax.distributed reads the details from the same variables. On a Cloud TPU VM
    the metadata server is asked for the hosts of the slice.
    """
    for launcher, count in LAUNCHERS.items():
        processes = count(env)
        if processes is not None:
            return launcher if processes > 1 else None
    return None


def _open_mpi(env: Mapping[str, str]) -> int | None:
    return int(env["OMPI_COMM_WORLD_SIZE"]) if "OMPI_COMM_WORLD_SIZE" in env else None


def _slurm(env: Mapping[str, str]) -> int | None:
    # A batch script or a shell within an allocation knows the tasks of the job, but is no task.
    if not {"SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_NTASKS"} <= env.keys():
        return None
    return int(env.get("SLURM_STEP_NUM_TASKS", env["SLURM_NTASKS"]))


def _gke_tpu(env: Mapping[str, str]) -> int | None:
    hosts = env.get("TPU_PROCESS_ADDRESSES", env.get("TPU_WORKER_HOSTNAMES"))
    if hosts is None:
        return None
    return len(hosts.split(",")) * int(env.get("MEGASCALE_NUM_SLICES") or 1)


def _cloud_tpu(env: Mapping[str, str]) -> int | None:
    # Importing jax sets the first where there are TPU chips and the second where there are none.
    if "TPU_ML_PLATFORM" not in env or "TPU_SKIP_MDS_QUERY" in env:
        return None
    server = env.get("GCE_METADATA_IP", "metadata.google.internal")
    url = f"http://{server}/computeMetadata/v1/instance/attributes/worker-network-endpoints"
    request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return len(answer.read().decode().split(","))
    except OSError:  # no such server or no such attribute: TPU chips, but no Cloud TPU VM
        return None


def _kubernetes(env: Mapping[str, str]) -> int | None:
    # The number is not in the environment; a Job is indexed because its pods are several.
    return 2 if {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= env.keys() else None


LAUNCHERS: Mapping[str, Callable[[Mapping[str, str]], int | None]] = {
    "Open MPI": _open_mpi,
    "SLURM": _slurm,
    "GKE TPU": _gke_tpu,
    "Cloud TPU VM": _cloud_tpu,
    "Kubernetes": _kubernetes,
}


def local_gpus(env: Mapping[str, str]) -> list[int] | None:
    """Which of the GPUs that this process sees are its own; None: as jax.distributed decides.

    Under SLURM and Open MPI jax takes the one with the number of the process on its node. That is
    wrong for a process that is alone on its node, and for one that sees a single GPU.
    """
    if "CUDA_VISIBLE_DEVICES" not in env or "JAX_LOCAL_DEVICE_IDS" in env:
        return None
    seen = len(env["CUDA_VISIBLE_DEVICES"].split(","))
    nodes = env.get("SLURM_STEP_NUM_NODES")
    alone = nodes is not None and nodes == env.get("SLURM_STEP_NUM_TASKS")
    return list(range(seen)) if seen == 1 or alone else None


def is_main() -> bool:
    """Whether this is process 0, the one that writes files and shows progress."""
    return jax.process_index() == 0


def require_same_config(config: Mapping[str, Any]) -> None:
    """Compares the JSON-able `config` of every process with that of process 0.

    Raises:
      ValueError: in all processes, if one differs; there it names up to three fields.
    """
    if jax.process_count() == 1:
        return
    text = json.dumps(config, sort_keys=True)
    main = _broadcast(text)
    differs = multihost_utils.process_allgather(np.array([text != main]), tiled=True)
    if text != main:
        raise ValueError(f"{_differences(json.loads(text), json.loads(main))}; {SAME_COMMAND}")
    if differs.any():
        others = ", ".join(map(str, np.flatnonzero(differs)))
        raise ValueError(f"process {others} has another config than process 0; {SAME_COMMAND}")


SAME_COMMAND = "start all processes with the same config and overrides."


def _broadcast(text: str) -> str:
    """The text of process 0."""
    mine = np.frombuffer(text.encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(mine.size)))
    padded = np.zeros(size, np.uint8)  # the shape must be the same everywhere
    padded[: mine.size] = mine[:size]
    return bytes(np.asarray(multihost_utils.broadcast_one_to_all(padded))).decode()


def _differences(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    here, there = flat_fields(mine, "config"), flat_fields(theirs, "config")
    names = [k for k in {**here, **there} if here.get(k, ...) != there.get(k, ...)]
    told = [
        f"{k}={here.get(k, 'absent')!r} here, {there.get(k, 'absent')!r} in process 0"
        for k in names[:3]
    ]
    more = f" and {len(names) - 3} fields more" if len(names) > 3 else ""
    return "; ".join(told) + more


def flat_fields(value: Any, path: str) -> dict[str, Any]:
    """{'path.a.b': value} of nested dicts."""
    if not isinstance(value, Mapping):
        return {path: value}
    parts = (flat_fields(part, f"{path}.{name}") for name, part in value.items())
    return {k: v for part in parts for k, v in part.items()}


class Preempted(Stopped):
    """The job was told to stop, and has stopped after `step`; the same command goes on."""

    def __init__(self, step: int):
        super().__init__(f"stopped after step {step}; the same command goes on from there")
        self.step = step


class Preemption:
    """Tells all processes at the same step that one of them got SIGTERM; use it as a context.

    With several processes jax.distributed holds the signal, from `start_processes` on. A process
    that is alone holds it within the context; elsewhere SIGTERM ends it.
    """

    def __init__(self) -> None:
        self._told = False
        self._restore: Callable[[], object] = lambda: None

    def __enter__(self) -> "Preemption":
        main = threading.current_thread() is threading.main_thread()
        if main and not jax.distributed.is_initialized():
            before = signal.signal(signal.SIGTERM, self._tell)
            handler = signal.SIG_DFL if before is None else before
            self._restore = lambda: signal.signal(signal.SIGTERM, handler)
        return self

    def __exit__(self, *_: Any) -> None:
        self._restore()

    def _tell(self, *_: Any) -> None:
        self._told = True

    def reached(self, step: int) -> bool:
        """Whether to save and stop at this step, from then on always.

        All processes must call it equally often, at best at every step: with several of them it
        turns true at the first call that none has made when the signal is known to all. Calls are
        counted, so `step` may start anew in another stage.
        """
        if jax.distributed.is_initialized():
            self._told |= multihost_utils.reached_preemption_sync_point(next(_calls))
        return self._told


def to_host(tree: Any) -> Any:
    """The tree with every array as a whole numpy array, in all processes.

    Arrays whose parts lie with several processes are gathered on every device, one at a time.
    """
    with jax.transfer_guard("allow"):
        return jax.tree.map(_to_host, tree)


def _to_host(leaf: Any) -> Any:
    if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated:
        return jax.device_get(leaf)
    return multihost_utils.process_allgather(leaf, tiled=True)
