"""Open a run, an adapter or a base model for inference. Trust rules are in :mod:`deltaw.methods.trust`."""

from __future__ import annotations

from deltaw.data.chat_template import with_chat_template
from deltaw.errors import UserError
from deltaw.hub.folders import adapter_folder
from deltaw.hub.loading import LoadedModel, load
from deltaw.inference.opened_run import OpenedRun
from deltaw.inference.prompting import read_prompting
from deltaw.machine.choices import choose_device, choose_precision
from deltaw.methods.files import method_from_folder, read_classes, read_num_outputs, stored_names
from deltaw.methods.trust import AdapterFolder, is_adapter, read_folder
from deltaw.progress import Detail, LogFunction, track_progress
from deltaw.runtime.quantized_weights import quantize_int8
from deltaw.settings import method_registry, task_registry
from deltaw.settings.config import SETTINGS, RunConfig
from deltaw.training.evaluation.general import model_identity, quantized_identity
from deltaw.training.preparation import quantize_weights, saved_calibration, uses_library
from deltaw.training.task import task_of


def open_run(
    reference: str,
    *,
    model: str | None = None,
    precision: str = "auto",
    device: str = "auto",
    sampler: str = "auto",
    task: str | None = None,
    trust_remote_code: bool = False,
    log: LogFunction,
) -> OpenedRun:
    """Load a run (base model and adapter), a PEFT adapter, or a base model.

    Args:
        reference: Folder or hub id of an adapter, or any model reference.
        model: Base model, if it differs from the one that the folder names.
        precision: Precision of the weights. "auto" uses the precision of the run if the device supports it.
        device: Device to load the model on.
        sampler: See :class:`deltaw.decoding.model.AdaptedModel`.
        task: Task of a base model. Ignored for an adapter, which defines its task.
        trust_remote_code: Run Python files of the base model, independent of the settings in the folder.
        log: Receives messages.

    Raises:
        UserError: if a file cannot be loaded, or the folder contains a reference that the caller has to allow.
    """
    folder = adapter_folder(reference, required=False)
    opened_folder = None
    adapter = is_adapter(folder)
    if adapter or (folder / SETTINGS).is_file():
        opened_folder = read_folder(folder, trust_remote_code=trust_remote_code)
    config = None if opened_folder is None else opened_folder.run
    if config is not None and model is None:
        precision = run_precision(config, precision, device, log)
    task_name = task or task_registry.default_task()
    base = model or reference
    classes = None
    if opened_folder is not None:
        task_name = opened_folder.task
        base = opened_folder.base(model)
        classes = read_classes(folder)
    dtype = choose_precision(choose_device(device).value, precision).value
    code = trust_remote_code
    section = None if opened_folder is None else opened_folder.section
    task_object = task_of(task_name, base, dtype, trust_remote_code=code, log=log, section=section)
    if config is not None and task_object.tokenizer is not None:
        task_object.tokenizer = with_chat_template(task_object.tokenizer, config.data.chat_template)
    fixed_outputs = task_registry.entry_of(task_name).outputs
    outputs = len(classes) if classes is not None else fixed_outputs
    if adapter and outputs is None and task_object.trains_head:
        outputs = read_num_outputs(folder)
    log_loading = log if not adapter else lambda line: None if line.startswith("new,") else log(line)
    loaded = load(
        base,
        precision=precision,
        device=device,
        task=task_name,
        num_labels=outputs,
        trust_remote_code=trust_remote_code,
        log=log_loading,
    )
    task_object.initialize_head(loaded.model, loaded.new_modules, ())  # the part that needs no rows
    if task_object.inputs is not None:
        task_object.inputs.attach(loaded.model, stored_names(folder) if adapter else ())
    identity = _quantize(loaded, precision, opened_folder, log)
    predicts_numbers = task_registry.entry_of(task_name).serves == "numbers"
    if classes is None and task_object.trains_head and fixed_outputs is None and not predicts_numbers:
        numbers = range(loaded.model.config.num_labels or 0)
        classes = getattr(task_object, "class_names", None) or tuple(str(number) for number in numbers)
    method = None
    if adapter:
        method = method_from_folder(folder, task_object.tokenizer)
        if config is not None and config.method == method.name and not method_registry.is_built_in(method.name):
            method.settings = getattr(config, method.name, method.settings)
        log(Detail(method.load(loaded.model, folder)))
        task_object.read_adapter_metadata(loaded.model, folder)
    name = task_object.name
    generates_text = task_object.generates_text
    adapted = loaded.model, method, task_object.tokenizer, loaded.reference, name, generates_text
    prompting = read_prompting(folder)
    return OpenedRun(
        *adapted, loaded, config, task_object, classes, identity, opened_folder, prompting, sampler=sampler
    )


def run_precision(config: RunConfig, precision: str, device: str, log: LogFunction) -> str:
    """Replace precision "auto" by the precision of the run, or log the reason if the device does not support it."""
    if precision == "auto" and config.precision != "auto":
        used = choose_device(device).value
        try:
            return choose_precision(used, config.precision).value
        except UserError as error:
            reason = f"{error.message} ({error.hint})" if error.hint else error.message
            log(f"precision {choose_precision(used).value} instead of the run's {config.precision}: {reason}")
    return precision


def _quantize(loaded: LoadedModel, precision: str, folder: AdapterFolder | None, log: LogFunction) -> str | None:
    """Quantize the weights as the precision requires. Return the identity of the weights."""
    identity = model_identity(loaded.model, precision)
    device = str(loaded.choices["device"].value)
    if precision == "int8" and not uses_library(loaded.model, device):
        roundings = None if folder is None else saved_calibration(folder.folder, identity)
        with track_progress("quantizing the weights to int8"):
            report = quantize_int8(loaded.model.base_model, roundings=roundings)
        identity = quantized_identity(identity, report.roundings)
        log(Detail(f"precision int8: {report}"))
    else:
        for line in quantize_weights(loaded.model, precision, (), identity, device)[0]:
            log(Detail(line))
    return identity
