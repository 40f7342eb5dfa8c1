"""Several processes that run one program: how they start and end, and what they tell each other.

They start under whichever launcher there is: flags, variables, Slurm, pods. JAX's own collectives carry what
they tell, so all processes must come by in the same order. Where there is one process, nothing is sent.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import PartitionSpec

from utils import errors
from utils.errors import ConfigError, TrainError, raise_all, reason
from utils.fields import Config, Range, field, integer
from utils.sharding import MESH_AXES, current_mesh, path_name
from utils.files import flatten

# A process is given up on when it has been silent for so long; the others leave then.
HEARTBEAT_SECONDS = 15
# An error of one process ends all. It is looked for so often; what others know of, they say themselves
# within the second time.
_LOOK_SECONDS, _GRACE_SECONDS = 0.5, 1
# The first process is the last to leave: XLA ends whoever has lost it, with an exit code of its own.
_LINGER_SECONDS = 3
_ENDED = "altiplano/ended"

_VARIABLES = {
    "coordinator": "JAX_COORDINATOR_ADDRESS",
    "processes": "JAX_NUM_PROCESSES",
    "process": "JAX_PROCESS_ID",
}


# How long the others may take until they come by: rewards, digests of a checkpoint, an export.
WAIT_SECONDS = 1800

_leaving, _barriers = threading.Event(), itertools.count()


def _is_address(text: Any) -> bool:
    found = re.fullmatch(r".+:([0-9]{1,5})", str(text))
    return bool(found) and 1 <= int(found[1]) < 1 << 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Launch(Config):
    """One process of several; what is None the launcher says."""

    coordinator: str | None = field(None, "address of process 0", Range("host:port", _is_address))
    processes: int | None = field(None, "number of processes", integer(1))
    process: int | None = field(None, "number of this process, from 0", integer(0))
    timeout: int = field(300, "seconds to wait for the others", integer(1))
    heartbeat: int = field(HEARTBEAT_SECONDS, "seconds until a silent process is dead", integer(1))

    def __post_init__(self) -> None:
        raise_all("--distributed", self.problems())

    def problems(self) -> list[str]:
        found = super().problems()
        if not found and self.processes and (self.process or 0) >= self.processes:
            found.append(f"process={self.process}, expected one of 0..{self.processes - 1}")
        return found


def read_launch(flag: str | None, environment: Mapping[str, str]) -> Launch | None:
    """How this process was started; None: alone.

    Args:
        flag: "coordinator=host:port,processes=4,process=0", where "auto" is what Slurm, Open MPI or a
            TPU pod says, and `timeout` and `heartbeat` may be added; None: the environment's.
        environment: JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, or the launcher's.

    Raises:
        ConfigError: the flag or a variable is wrong.
    """
    if flag is None:
        if not launched(environment):
            return None
        given = {key: environment[name] for key, name in _VARIABLES.items() if name in environment}
    else:
        parts = [part.strip() for part in flag.split(",") if part.strip() != "auto"]
        given = dict(part.partition("=")[::2] for part in parts)
    known = [field.name for field in dataclasses.fields(Launch)]
    problems = [
        f"{key}={value!r:.40}, expected " + ("a number" if key in known else f"one of {known}")
        for key, value in given.items()
        if key not in known or key != "coordinator" and not re.fullmatch(r"\d{1,9}", value)
    ]
    raise_all("--distributed", problems)
    return Launch(**{k: v if k == "coordinator" else int(v) for k, v in given.items()})


def launched(environment: Mapping[str, str]) -> bool:
    """Whether several were started. Of a TPU pod on bare machines only "auto" knows."""
    counts = "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"
    hosts = "TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES"
    return (
        _VARIABLES["coordinator"] in environment
        or any(environment.get(name, "1") != "1" for name in counts)
        or any("," in environment.get(name, "") for name in hosts)
    )


def start(launch: Launch, say: Callable[[str], None]) -> None:
    """Connects to the other processes; before JAX's first use.

    Args:
        launch: see Launch.
        say: tells a line to the user.

    Raises:
        ConfigError: they did not come together within the time.
    """
    # JAX would take SIGTERM; and its CPU devices know of other processes through gloo alone.
    jax.config.update("jax_enable_preemption_service", False)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if launch.process == 0 and launch.coordinator is not None:
        _check_port(int(launch.coordinator.rpartition(":")[2]))
    who = f"process {'?' if launch.process is None else launch.process}"
    where, count = launch.coordinator or "the launcher", launch.processes or "the"
    late = f"not all of {count} processes came to {where} within {launch.timeout} s"

    def give_up() -> None:
        say(f"{who}: {late}: are all started, each with an id of its own and the same count?")
        os._exit(ConfigError.exit_code)

    # XLA's client would end the process without a word of sense when its own time is over.
    timer = threading.Timer(launch.timeout, give_up)
    timer.daemon = True
    timer.start()
    known = launch.coordinator, launch.processes, launch.process
    try:
        jax.distributed.initialize(
            *known,
            cluster_detection_method=None if None in known else "deactivate",
            initialization_timeout=launch.timeout + 30,
            heartbeat_timeout_seconds=launch.heartbeat,
        )
        multihost_utils.sync_global_devices("start")
    except (RuntimeError, ValueError, OSError) as e:
        raise ConfigError(f"{who} cannot start: {' '.join(str(e).split()):.300}") from e
    finally:
        timer.cancel()
    threading.Thread(target=_watch, args=(say,), daemon=True).start()
    sys.excepthook = _on_bug


def _on_bug(*error: Any) -> None:
    """Ends all processes on an unhandled exception: a normal exit would hang waiting for the others."""
    sys.__excepthook__(*error)
    leave(1)


def _client():
    """The client of JAX's coordination service, which has no public name."""
    return multihost_utils.distributed.global_state.client


def _watch(say: Callable[[str], None]) -> None:
    """Ends this process soon after another one has left with an error, whatever this one waits for."""
    while not _leaving.wait(_LOOK_SECONDS):
        try:
            told = _client().key_value_dir_get(_ENDED)
        except jax.errors.JaxRuntimeError:  # the first process is gone, and XLA ends this one
            return
        if told and not _leaving.wait(_GRACE_SECONDS):
            name, code = told[0]
            say(f"process {name.rpartition('/')[2]} has ended with an error, which it says itself")
            os._exit(int(code))


def _check_port(port: int) -> None:
    """XLA's service crashes where its port is taken."""
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    try:
        socket.create_server(("", port), family=family, dualstack_ipv6=dual).close()
    except OSError as e:
        raise ConfigError(
            f"--distributed: port {port} of the coordinator is taken ({e.strerror}); use another one"
        ) from e


def lost(error: Exception) -> bool:
    """Whether an error says that another process is gone."""
    known = "Gloo", "coordination service", "Connection closed by peer", "Connection reset"
    return jax.distributed.is_initialized() and any(text in str(error) for text in known)


def leave(code: int) -> None:
    """Before the end: all are here, or, with an exit code, perhaps only this process knows of it."""
    if not jax.distributed.is_initialized():
        return
    _leaving.set()
    if code == 0:
        return jax.distributed.shutdown()
    sys.stdout.flush()
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # nobody is there to be told
        _client().key_value_set(f"{_ENDED}/{jax.process_index()}", str(code))
    if jax.process_index() == 0:
        time.sleep(_LINGER_SECONDS)
    os._exit(code)


def abandon(code: int) -> None:
    """Ends a process that has lost another one: with that one's exit code, if it has told of it."""
    sys.stdout.flush()
    time.sleep(_LINGER_SECONDS)  # meanwhile `_watch` may do it
    os._exit(code)


def several() -> bool:
    """Whether there are other processes."""
    return jax.process_count() > 1


def is_first() -> bool:
    """Whether this is the process that writes and prints."""
    return jax.process_index() == 0


def barrier() -> None:
    """Returns once all processes are here.

    Raises:
        TrainError: some did not come; they are named.
    """
    if not several():
        return
    try:
        # Not one of the collectives: those wait for ever, and do not say for whom.
        _client().wait_at_barrier(f"altiplano/{next(_barriers)}", WAIT_SECONDS * 1000)
    except (jax.errors.JaxRuntimeError, ValueError) as e:
        raise TrainError(f"processes did not come together: {reason(e):.600}") from e


def agree(flag: bool | int = 0, error: Exception | None = None) -> int:
    """The largest flag of all processes; raises on all of them if one brings an error.

    Args:
        flag: what this process says, from 0.
        error: what happened to this process; it is raised here, and one that names this process
            elsewhere, with the same exit code.
    """
    if not several():
        if error is not None:
            raise error
        return int(flag)
    barrier()
    told = multihost_utils.process_allgather(np.asarray([flag, error is not None], np.int32))
    if not told[:, 1].any():
        return int(told[:, 0].max())
    mine = "" if error is None else json.dumps([type(error).__name__, str(error)])
    texts = gather(mine)
    process = int(np.flatnonzero(told[:, 1])[0])
    if error is None:
        name, message = json.loads(texts[process])
        kind = getattr(errors, name, TrainError)
        text = message if kind is not TrainError or name == "TrainError" else f"{name}: {message}"
        error = kind(f"process {process}: {text}")
        error.everywhere = True
    raise error


def gather(text: str) -> list[str]:
    """The texts of all processes, in their order."""
    if not several():
        return [text]
    data = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(data)))
    width = 1 << int(sizes.max()).bit_length()  # few shapes, as each is compiled
    rows = multihost_utils.process_allgather(np.pad(data, (0, width - len(data))))
    return [rows[i, :n].tobytes().decode() for i, n in enumerate(sizes.reshape(-1))]


def together(make: Callable[[], Any]) -> Any:
    """Returns `make()` once all processes have called theirs; raises on all if one fails."""
    value, error = None, None
    try:
        value = make()
    except Exception as e:  # whatever it is, the others wait to hear of it
        error = e
    agree(error=error)
    return value


def from_first(make: Callable[[], Any]) -> Any:
    """Returns the first process's `make()` on all processes, as JSON holds it; raises its error."""
    if not several():
        return make()
    value = together(make if is_first() else lambda: None)
    return json.loads(gather(json.dumps(value) if is_first() else "")[0])


def to_first(tree: Any) -> Any:
    """A tree's arrays in the host memory of the first process, one after the other; else None."""
    if not several():
        return tree

    def fetch(x: jax.Array) -> np.ndarray | None:
        x = multihost_utils.process_allgather(x, tiled=True)
        return x if is_first() else None

    return jax.tree.map(fetch, tree)


def check_same(values: dict[str, Any]) -> None:
    """All processes were started alike.

    Args:
        values: by names that a user knows, nested dicts among them; what JSON can say.

    Raises:
        ConfigError: on all processes; names a process that is not like the first, and each value.
    """
    rows = [json.loads(row) for row in gather(json.dumps(flatten(values, "."), default=str))]
    for process, row in enumerate(rows):
        names = [name for name in rows[0] | row if row.get(name) != rows[0].get(name)]
        if names:
            listed = "; ".join(
                f"{name} is {row.get(name)!r:.60}, and {rows[0].get(name)!r:.60} there"
                for name in names[:5]
            )
            error = ConfigError(
                f"process {process} is not like process 0: {listed}; start all with the same "
                "flags, files and code"
            )
            error.everywhere = True
            raise error


_WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}


def check_replicas(tree: Any, specs: Any) -> None:
    """Compares a checksum of each array's bits between the devices that hold the same part of it.

    Args:
        tree: arrays on the context mesh; without one nothing is to be compared.
        specs: the PartitionSpec of each, as in `Trainer.specs`.

    Raises:
        TrainError: two copies differ; the array and the process of the odd one are named.
    """
    if current_mesh() is None:
        return
    mesh = jax.sharding.get_mesh()
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    flat = tuple(structure.flatten_up_to(specs))
    sums = np.asarray(_checksums(tuple(x for _, x in leaves), flat))
    for (path, _), spec, of_leaf in zip(
        leaves, flat, sums.reshape(len(leaves), *mesh.devices.shape)
    ):
        shared = {axis for axes in spec if axes for axis in np.atleast_1d(axes)}
        first = of_leaf
        for i, axis in enumerate(MESH_AXES):
            if axis not in shared:
                first = first.take([0], axis=i)
        if (of_leaf != first).any():
            place = tuple(np.argwhere(of_leaf != first)[0])
            device = mesh.devices[place]
            raise TrainError(
                f"{path_name(path)} is not the same on all devices that hold a copy of it: device "
                f"{device.id} of process {device.process_index} has another one; go on from the "
                "last checkpoint, without that machine if it happens again"
            )


@functools.partial(jax.jit, static_argnums=1)
def _checksums(arrays: tuple, specs: tuple) -> jax.Array:
    """[arrays, devices] uint32."""

    def local(*parts: jax.Array) -> jax.Array:
        return jnp.stack([_checksum(part) for part in parts])[:, None]

    everywhere = PartitionSpec(None, MESH_AXES)
    sums = jax.shard_map(local, in_specs=specs, out_specs=everywhere, check_vma=False)(*arrays)
    return jax.lax.with_sharding_constraint(sums, PartitionSpec())


def _checksum(x: jax.Array) -> jax.Array:
    words = jax.lax.bitcast_convert_type(x, _WORDS[x.dtype.itemsize]).reshape(-1)
    # Odd factors: a change of one word always changes the sum, and so does an exchange of two.
    factors = 2 * jnp.arange(len(words), dtype=jnp.uint32) + 1
    return jnp.sum(words.astype(jnp.uint32) * factors, dtype=jnp.uint32)
