"""Several processes as one run: how they find each other, stop together, and part when one of them fails.

A process that dies leaves the others in the middle of an exchange. What they notice first ends them: the broken
connection (gloo says so at once), or the heartbeats that no longer come, after which the coordination service of
jax.distributed ends every process that is left. A process that fails but lives, with a full disk, say, would go on to
send heartbeats while it waits for the others at its own end, and they for it: `parting` lets it go.
"""

import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax
import numpy as np
from jax.experimental import multihost_utils

FAREWELL_SECONDS = 5  # for processes that fail alike, with a mistake in the config, say: they end in order
MOST_BYTES = 2**26  # that travel from one process to the others at once


def connect(coordinator: str, num_processes: int | None, process_id: int | None, heartbeat_seconds: int) -> None:
    """Waits for the others. coordinator: host:port of process 0, or auto; '' for one process, which waits for none."""
    if not coordinator:
        return
    if heartbeat_seconds < 10:
        raise ValueError(f'--heartbeat_timeout_seconds={heartbeat_seconds}: at least 10')
    if coordinator == 'auto':
        jax.distributed.initialize(heartbeat_timeout_seconds=heartbeat_seconds)
        return
    if jax.config.jax_platforms == 'cpu' or not jax.config.jax_cpu_collectives_implementation:
        jax.config.update('jax_cpu_collectives_implementation', 'gloo')
    jax.distributed.initialize(coordinator, num_processes, process_id, heartbeat_timeout_seconds=heartbeat_seconds)


@contextmanager
def parting() -> Iterator[None]:
    """Ends this process at an error without waiting for the others; one process alone raises it as ever.

    Its connections break with it, so that the others, who may wait for it, end too.
    """
    try:
        yield
    except BaseException as error:
        if not jax.distributed.is_initialized():
            raise
        code = _tell(error)
        farewell = threading.Thread(target=jax.distributed.shutdown, daemon=True)
        farewell.start()
        farewell.join(FAREWELL_SECONDS)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _tell(error: BaseException) -> int:
    """The exit code; prints what nobody has printed yet."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    if isinstance(error, jax.errors.JaxRuntimeError) and (lost := lost_another(str(error))):
        print(f'error: {lost}', file=sys.stderr)
        return 3
    traceback.print_exception(error)
    return 1


def lost_another(message: str) -> str:
    """One line for an error of the runtime by which one process learns that another is gone; '' for other errors."""
    signs = 'Connection reset', 'Connection closed', 'Connection refused', 'Broken pipe', 'heartbeat', 'Timed out'
    if not any(sign.lower() in message.lower() for sign in signs):
        return ''
    return (
        f'process {jax.process_index()} of {jax.process_count()} has lost another, which died or cannot be reached '
        f'({message.splitlines()[0][:200]}); start all of them again: they go on from the newest checkpoint'
    )


@contextmanager
def stop_requests() -> Iterator[Callable[[int], bool]]:
    """Whether all processes shall stop after this step, since one of them has received SIGTERM: asked after each step.

    Several agree through JAX's preemption service on the first step that none of them has begun. At the end SIGTERM
    does again what it did before.
    """
    if jax.process_count() > 1:
        try:
            yield multihost_utils.reached_preemption_sync_point
        finally:
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the service would keep it, and nobody asks any more
        return
    received = []
    try:
        before = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    except ValueError:  # not in the main thread, where no handler can be set
        yield lambda step: False
        return
    try:
        yield lambda step: bool(received)
    finally:
        signal.signal(signal.SIGTERM, before)


def from_process_0(data: bytes) -> bytes:
    """What process 0 gives, on every process; what the others give does not matter."""
    if jax.process_count() == 1:
        return data
    whole, rest = multihost_utils.broadcast_one_to_all(np.array(divmod(len(data), MOST_BYTES), np.int32))
    sizes, pieces = [MOST_BYTES] * int(whole) + [int(rest)] * bool(rest), []
    for i, size in enumerate(sizes):
        mine = data[i * MOST_BYTES : i * MOST_BYTES + size] if jax.process_index() == 0 else bytes(size)
        pieces.append(multihost_utils.broadcast_one_to_all(np.frombuffer(mine, np.uint8)).tobytes())
    return b''.join(pieces)
