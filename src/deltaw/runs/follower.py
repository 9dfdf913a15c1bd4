"""Worker processes (rank 1 and higher) of a distributed run.

They receive the settings from process 0 and compute their share of each step. Only process 0 writes files and output.
"""

from __future__ import annotations

import contextlib
import warnings

from deltaw.errors import UserError
from deltaw.runs.fit import Backend, load_model, make_sampler_factory
from deltaw.runs.resuming import assemble_session, receive_settings
from deltaw.runtime.sharded import sharded_blocks
from deltaw.training.guarantee import UntrainedParameterError
from deltaw.training.monitoring.rates import follow_rate
from deltaw.training.parallel.group import Group, LostProcess
from deltaw.training.process import preserved_process_state
from deltaw.training.session import compute_evaluation_share, read_data
from deltaw.training.state import NotFiniteError

# Exit status of a failed run. Process 0 reports the error.
FAILED = 2


def follow(group: Group, decoding: Backend | None = None) -> int:
    """Take part in the run of process 0 and return the exit status.

    Args:
        decoding: Decoding backend (see :func:`deltaw.runs.fit.fit`).

    Raises:
        UserError: If this process cannot take part, for example because the model is not on its machine.
    """
    try:
        with preserved_process_state(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # process 0 shows the same warnings
            return _follow(group, decoding)
    except LostProcess:
        return FAILED
    except (NotFiniteError, UntrainedParameterError):
        # Process 0 raises the same error. If this process exited first, torchrun would kill process 0 while it saves.
        with contextlib.suppress(LostProcess):
            group.obey()
        return FAILED
    except UserError as error:
        message = f"process {group.rank} of {group.size}: {error.message}"
        raise UserError(message, location=error.location, hint=error.hint) from error


def _follow(group: Group, decoding: Backend | None) -> int:
    received = receive_settings(group)
    if received is None:
        return 0
    # Only process 0 adds the gradients of general answers.
    config = received.with_train(keep_general=0.0)
    task, data = read_data(config, check=False)
    loaded = load_model(config, task, data, processes=group)
    session = assemble_session(
        config, task, data, loaded, group, None, make_sampler=make_sampler_factory(decoding, loaded, config, task)
    )
    sharded = sharded_blocks(loaded.model)
    if sharded is not None:
        group.gather = sharded.gather
    group.evaluate = lambda number: compute_evaluation_share(session, number)
    try:
        follow_rate(session, group)
        with session.running():
            session.train(skip_not_finite=config.train.not_finite == "skip")
            group.obey()
    finally:
        session.close()
    return 0
