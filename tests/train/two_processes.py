"""What one of two processes does in test_processes.py: python -m tests.train.two_processes TASK.

Further arguments: the flags of start_processes, or none where a launcher is in the environment.
Prints one line 'result: JSON'.
"""

import json
import os
import signal
import sys
import time
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tokred.train import processes


def whoami() -> Any:
    return [jax.process_index(), jax.process_count(), processes.is_main(), jax.device_count()]


def config() -> Any:
    config = {"optimizer": {"lr": 0.01, "b2": 0.99}, "seed": 0}
    processes.require_same_config(config)
    config["optimizer"]["lr"] = 0.1 if jax.process_index() else 0.01
    try:
        processes.require_same_config(config)
    except ValueError as error:
        return str(error)


def host() -> Any:
    mesh = Mesh(np.array(jax.devices()), ("data",))
    whole = np.arange(8.0).reshape(4, 2)

    def put(spec: PartitionSpec) -> jax.Array:
        return jax.make_array_from_callback(
            whole.shape, NamedSharding(mesh, spec), lambda index: whole[index]
        )

    tree = {"split": put(PartitionSpec("data")), "same": put(PartitionSpec()), "local": np.ones(2)}
    with jax.transfer_guard("disallow"):
        got = processes.to_host(tree)
    assert all(type(leaf) is np.ndarray for leaf in got.values())
    return {name: leaf.tolist() for name, leaf in got.items()}


def preempt() -> Any:
    """The step at which a loop stops after process 1 alone got SIGTERM, and one of a next loop."""
    stopped, until = None, time.time() + 30
    with processes.Preemption() as preemption:
        for step in range(1_000_000):
            if step == 20 and jax.process_index() == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            if preemption.reached(step) or time.time() > until:
                stopped = step
                break
            time.sleep(0.005)
        return [stopped, preemption.reached(0)]


def fail() -> Any:
    """Process 1 fails, process 0 waits for it."""
    processes.PATIENCE = 2.0
    multihost_utils.sync_global_devices("both are here")
    if jax.process_index() == 1:
        raise ValueError("a failure of one process")
    multihost_utils.sync_global_devices("never met")


TASKS = {task.__name__: task for task in (whoami, config, host, preempt, fail)}

if __name__ == "__main__":
    task, *flags = sys.argv[1:]
    coordinator, count, index = flags or (None, None, None)
    started = processes.start_processes(
        coordinator, int(count) if count else None, int(index) if index else None
    )
    assert started
    print("\nresult:", json.dumps(TASKS[task]()), flush=True)
    processes.stop_processes()
