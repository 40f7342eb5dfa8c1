"""Starts JAX's runtime for several processes, under whichever launcher: flags, variables, Slurm, pods."""

import contextlib
import dataclasses
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.experimental import multihost_utils

from utils.errors import ConfigError, raise_all

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


_leaving = threading.Event()
_held: list[socket.socket] = []


@dataclasses.dataclass(frozen=True, kw_only=True)
class Launch:
    """One process of several.

    Attributes:
        coordinator: host:port of process 0; None: what the launcher says, as the next two.
        processes: how many there are.
        process: which one this is, from 0.
        timeout: seconds to wait for the others.
        heartbeat: seconds after which a silent process counts as dead.
    """

    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None
    timeout: int = 300
    heartbeat: int = HEARTBEAT_SECONDS

    def __post_init__(self):
        problems = []
        host, _, port = (self.coordinator or "any:1").rpartition(":")
        if not host or not 1 <= int(port if port.isdecimal() and len(port) < 6 else 0) < 65536:
            problems.append(f"coordinator={self.coordinator!r:.60}, expected host:port")
        if self.processes is not None and self.processes < 1:
            problems.append(f"processes={self.processes}, expected a number from 1")
        if self.process is not None and not 0 <= self.process < (
            self.processes or self.process + 1
        ):
            problems.append(f"process={self.process}, expected one of 0..{self.processes - 1}")
        problems += [
            f"{name}={value}, expected seconds from 1"
            for name, value in (("timeout", self.timeout), ("heartbeat", self.heartbeat))
            if value < 1
        ]
        raise_all("--distributed", problems)


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
        _claim_port(int(launch.coordinator.rpartition(":")[2]))
    where = f"{launch.coordinator or 'the launcher'}"
    who = f"process {'?' if launch.process is None else launch.process}"
    late = f"not all of {launch.processes or 'the'} processes came to {where} within {launch.timeout} s"

    def give_up() -> None:
        say(f"{who}: {late}: are all started, each with an id of its own and the same count?")
        os._exit(ConfigError.exit_code)

    # XLA's client would end the process without a word of sense when its own time is over.
    timer = threading.Timer(launch.timeout, give_up)
    timer.daemon = True
    timer.start()
    explicit = None not in (launch.coordinator, launch.processes, launch.process)
    try:
        jax.distributed.initialize(
            launch.coordinator,
            launch.processes,
            launch.process,
            cluster_detection_method="deactivate" if explicit else None,
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
    """What nobody handles ends the others too: the interpreter's own end would wait for them."""
    sys.__excepthook__(*error)
    leave(1)


def _client():
    """That of JAX's coordination service, for which there is no public name."""
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


def _claim_port(port: int) -> None:
    """XLA's service crashes where its port is taken: by others, or by a second process 0 meanwhile."""
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    try:
        # The datagram port of the same number, which nobody else needs, is the lock of those who
        # find the stream port free at once. It is held to the end of the process.
        lock = socket.socket(family, socket.SOCK_DGRAM)
        lock.bind(("", port))
        _held.append(lock)
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
