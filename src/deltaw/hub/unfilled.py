"""A model of the right shape whose values are whatever stood in memory, from a configuration alone.

Memory that nothing was written to takes no room, so a large model can stand here before its weights do.
Knows configurations and transformers' classes; reads no weights.
"""

from __future__ import annotations

from pathlib import Path

import transformers
from transformers import PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from deltaw import tasks
from deltaw.errors import UserError
from deltaw.host.choices import dtype_of
from deltaw.hub.folders import first_line
from deltaw.hub.transformers_private import configurations_of


def unfilled(
    folder: Path, config: PretrainedConfig, task: str, dtype: str, attention: str, trust_remote_code: bool
) -> tuple[PreTrainedModel, str]:
    """The model, tied as its configuration says, and the attention that it ended up with.

    Raises:
        UserError: the architecture does not fit the task, or its configuration makes no model.
    """
    auto = getattr(transformers, tasks.entry_of(task).auto_model)
    while True:
        try:
            with no_init_weights():
                model = auto.from_config(
                    config,
                    dtype=dtype_of(dtype),
                    attn_implementation=attention,
                    trust_remote_code=trust_remote_code,
                )
            break
        except (ValueError, OSError, RuntimeError, KeyError) as error:
            if "Unrecognized configuration class" in str(error):
                raise does_not_fit(config, task, folder) from error
            if attention == "sdpa" and "scaled_dot_product_attention" in str(error):
                attention = "eager"
                continue
            raise UserError(
                f"the model cannot be made: {first_line(error)}",
                where=str(folder),
                hint="check that config.json is whole",
            ) from error
    model.tie_weights()  # is left out together with the first values
    return model, attention


def does_not_fit(config: PretrainedConfig, task: str, folder: Path) -> UserError:
    """The refusal of a model that is not made for ``task``; it names what it is made for."""
    does = tasks.entry_of(task).does
    fits = [
        other.name
        for other in tasks.entries()
        if other.name != task and type(config) in (configurations_of(other.auto_model) or ())
    ]
    return UserError(
        f"a {config.model_type} model does not {does}",
        where=str(folder),
        hint=f"it can be loaded for task: {', '.join(fits)}" if fits else "choose another model",
    )
