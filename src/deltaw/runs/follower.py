"""A process from 1 on: it has the settings from process 0, and computes its part until the run is over.

It writes nothing and shows nothing; what it trained is what process 0 saves.
"""

from __future__ import annotations

import contextlib
import warnings

from deltaw.errors import UserError
from deltaw.runs.fit import Decoding, load_for, sampler_of
from deltaw.runs.resuming import assemble_alike, receive_settings
from deltaw.runtime.sharded import sharded_blocks
from deltaw.training.guarantee import UntrainedParameterError
from deltaw.training.monitoring.rates import follow_rate
from deltaw.training.parallel.group import Group, LostProcess
from deltaw.training.process import guest
from deltaw.training.session import read_data, take_part
from deltaw.training.state import NotFiniteError

# Its exit status where the run failed; process 0 says why.
FAILED = 2


def follow(group: Group, decoding: Decoding | None = None) -> int:
    """Take part in the run of process 0; the exit status.

    Args:
        decoding: as :func:`deltaw.runs.fit.fit` has it.

    Raises:
        UserError: this process cannot take part, as where the model is not on its machine.
    """
    try:
        with guest(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # process 0 shows its own
            return _follow(group, decoding)
    except LostProcess:
        return FAILED
    except (NotFiniteError, UntrainedParameterError):
        # Process 0 found the same. Were this process to end first, torchrun would end that one as it saves.
        with contextlib.suppress(LostProcess):
            group.obey()
        return FAILED
    except UserError as error:
        what = f"process {group.rank} of {group.size}: {error.what}"
        raise UserError(what, where=error.where, hint=error.hint) from error


def _follow(group: Group, decoding: Decoding | None) -> int:
    told = receive_settings(group)
    if told is None:
        return 0
    # Process 0 alone adds the gradients of general answers.
    config = told.with_train(keep_general=0.0)
    task, data = read_data(config, check=False)
    loaded = load_for(config, task, data, processes=group)
    session = assemble_alike(
        config, task, data, loaded, group, None, samples=sampler_of(decoding, loaded, config, task)
    )
    sharded = sharded_blocks(loaded.model)
    if sharded is not None:
        group.gather = sharded.gather
    group.evaluate = lambda number: take_part(session, number)
    try:
        follow_rate(session, group)
        with session.running():
            session.train(skip_not_finite=config.train.not_finite == "skip")
            group.obey()
    finally:
        session.close()
    return 0
