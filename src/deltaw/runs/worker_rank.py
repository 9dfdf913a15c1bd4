"""Worker processes (rank 1 and higher) of a distributed run.

They receive the settings from process 0 and compute their share of each step. Only process 0 writes files and output.
"""

from __future__ import annotations

import contextlib
import warnings

from deltaw.errors import UserError
from deltaw.runs.load_model import load_model
from deltaw.runs.process_agreement import assemble_session, receive_settings
from deltaw.runtime.sharded import sharded_blocks
from deltaw.training.monitoring.rates import follow_rate
from deltaw.training.parallel.group import Group, LostProcess
from deltaw.training.process import preserved_process_state
from deltaw.training.session import compute_evaluation_share, read_data
from deltaw.training.state import NotFiniteError
from deltaw.training.trained_check import UntrainedParameterError

# Exit status of a worker of a failed run. Process 0 reports the error.
WORKER_FAILED = 2


def follow(group: Group) -> int:
    """Take part in the run of process 0 and return the exit status.

    Raises:
        UserError: If this process cannot take part, for example because the model is not on its machine.
    """
    try:
        with preserved_process_state(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # process 0 shows the same warnings
            return _follow(group)
    except LostProcess:
        return WORKER_FAILED
    except (NotFiniteError, UntrainedParameterError):
        # Process 0 raises the same error. If this process exited first, torchrun would kill process 0 while it saves.
        with contextlib.suppress(LostProcess):
            group.obey()
        return WORKER_FAILED
    except UserError as error:
        message = f"process {group.rank} of {group.size}: {error.message}"
        raise UserError(message, location=error.location, hint=error.hint) from error


def _follow(group: Group) -> int:
    if (received := receive_settings(group)) is None:
        return 0
    # Only process 0 adds the gradients of general answers.
    config = received.with_train(keep_general=0.0)
    task, data = read_data(config, check=False)
    loaded = load_model(config, task, data, processes=group)
    session = assemble_session(config, task, data, loaded, group, None)
    if (sharded := sharded_blocks(loaded.model)) is not None:
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
