"""Vision-language models as text models: a view of the language model that also reads image features.

A vision-language model has a vision tower, a connector and a language model. The text view is the causal class of
transformers over the modules of the language model, so packing, fused blocks, planning and decoding work as for a text
model. Image features enter it as embeddings of additional token ids (:mod:`deltaw.runtime.image_tokens`).

The view computes the same outputs only if images are part of one causal sequence. Image tokens have ordinary text
positions or positions on a grid (:mod:`deltaw.hub.mrope`). :func:`text_view` rejects other families by their
configuration, and :func:`deltaw.runtime.image_tokens.verify_view` compares both models.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from deltaw.errors import UserError
from deltaw.hub.checkpoint import read_checkpoint
from deltaw.hub.mrope import CAUSAL_MODELS, read_encoded_positions
from deltaw.hub.parameter_names import match_names
from deltaw.hub.transformers_private import attention_name, configurations_of, quiet, set_attention_name
from deltaw.kernels.torch_private import without_dispatch
from deltaw.lora.complete_names import NameMap, set_complete_names

AUTO_MODEL = "AutoModelForImageTextToText"


def is_vision_language(config: PretrainedConfig) -> bool:
    """Return True if a configuration is that of a vision-language model with a separate language model."""
    supported = configurations_of(AUTO_MODEL)
    has_text = config.get_text_config(decoder=True) is not config
    return supported is not None and type(config) in supported and has_text


def loads_as_text_view(config: PretrainedConfig, task_class: str) -> bool:
    """Return True if a task loads a model as text view.

    Args:
        task_class: Auto class of the task. Models that it contains are loaded as such.
    """
    task_configs = configurations_of(task_class)
    is_text = task_class == "AutoModelForCausalLM" and task_configs is not None and type(config) not in task_configs
    return is_text and is_vision_language(config)


@dataclass(eq=False)
class VisionLanguageModel:
    """Vision-language model with its text view.

    Attributes:
        model: Complete model.
        view: Causal language model that shares the language model and the output layer with it.
        prefix: Name of the language model within the complete model.
    """

    model: PreTrainedModel
    view: PreTrainedModel
    prefix: str

    @torch.no_grad()
    def features(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """Return the features of each image, of shape (tokens, d), as the language model reads them.

        Args:
            inputs: Outputs of the model's processor for images: ``pixel_values``, and further ones of the family.
        """
        return _image_features(self.model, inputs)


def _image_features(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    output = image_owner(model).get_image_features(**inputs, return_dict=True)
    features = getattr(output, "pooler_output", output)
    return list(features) if not isinstance(features, Tensor) or features.dim() == 3 else [features]


class VisionTower:
    """Computes image features with the vision encoder and the connector of a complete model.

    The language model has no weights.

    Args:
        model: Complete model.

    Attributes:
        language_name: Name of the language model.
        owner: Module that contains the language model, the vision encoder and the connector.
        prefix: Name of the owner with a final dot, or an empty string.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        language = model.get_decoder()
        self.model = model
        self._is_verified = False
        self.language_name = next(name for name, module in model.named_modules() if module is language)
        owner = self.language_name.rpartition(".")[0]
        self.owner = model.get_submodule(owner)
        self.prefix = f"{owner}." if owner else ""
        configs = (m.config for part in self.parts.values() for m in part.modules() if isinstance(m, PreTrainedModel))
        self._attention = next(filter(None, map(attention_name, configs)), "sdpa")

    @property
    def parts(self) -> dict[str, nn.Module]:
        """Vision encoder, connector, and other modules beside the language model, by their names in the owner."""
        name = self.language_name.removeprefix(self.prefix)
        return {child: module for child, module in self.owner.named_children() if child != name}

    def set_parts(self, parts: Mapping[str, nn.Module]) -> None:
        """Compute features with these modules, which may belong to a text view and have its attention."""
        for name, part in parts.items():
            setattr(self.owner, name, part)
            for config in (vars(module).get("config") for module in part.modules()):
                if isinstance(config, PretrainedConfig):
                    set_attention_name(config, self._attention)

    @property
    def has_separators(self) -> bool:
        """True if features include parameters besides the connector's outputs, such as line breaks."""
        return any(True for _ in self.owner.named_parameters(recurse=False))

    @functools.cached_property
    def connector(self) -> str | None:
        """Name of the innermost module with exactly the parameters outside of vision encoder and language model.

        It maps features of the vision encoder to embeddings. None if there is no such module.
        """
        language = self.model.get_decoder()
        config = getattr(self.model.config, "vision_config", None)
        modules = dict(self.model.named_modules())
        inside = [n for n, m in modules.items() if m is language or (config and getattr(m, "config", None) is config)]
        prefixes = (*(f"{name}." for name in inside), "lm_head.")
        others = {name for name, _ in self.model.named_parameters() if not name.startswith(prefixes)}
        others -= {f"{self.prefix}{name}" for name, _ in self.owner.named_parameters(recurse=False)}
        return next((n for n in reversed(modules) if others and _parameter_names(n, modules[n]) == others), None)

    @property
    def bytes(self) -> int:
        """Size of the weights."""
        return sum(p.numel() * p.element_size() for part in self.parts.values() for p in part.parameters())

    def require_connector(self) -> nn.Module:
        """Return the connector.

        Raises:
            UserError: if the model has no connector.
        """
        if self.connector is None:
            raise self._connector_error()
        return self.model.get_submodule(self.connector)

    def features(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """Return the (tokens, d) features of each image as the language model reads them, with gradients.

        Args:
            inputs: Outputs of the model's processor.
        """
        return _image_features(self.model, self.select_inputs(inputs))

    def select_inputs(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the inputs that ``get_image_features`` accepts, in the precision of the vision encoder."""
        names = inspect.signature(image_owner(self.model).get_image_features).parameters
        parameters = (parameter for part in self.parts.values() for parameter in part.parameters())
        dtype = next(parameter.dtype for parameter in parameters if parameter.is_floating_point())
        return {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items() if k in names}

    @torch.no_grad()
    def connector_inputs(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """Return the (tokens, width) connector inputs of each image.

        Raises:
            UserError: if the connector does not map them to the features one by one.
        """
        connector = self.require_connector()
        recorded = list[Tensor]()
        handle = connector.register_forward_pre_hook(lambda module, args: recorded.extend(args[:1]))
        try:
            features = self.features(inputs)
        finally:
            handle.remove()
        try:
            rows = torch.cat([t.reshape(-1, t.shape[-1]) for t in recorded])
            expected = torch.cat(features)
            mapped = expected if self._is_verified else connector(rows)
            is_equal = mapped.shape == expected.shape and torch.allclose(mapped, expected, rtol=1e-2, atol=1e-3)
        except (TypeError, ValueError, RuntimeError) as error:  # it needs other arguments or shapes
            raise self._connector_error() from error
        if not is_equal:
            raise self._connector_error()
        self._is_verified = True
        return list(rows.split([len(image) for image in features]))

    def _connector_error(self) -> UserError:
        message = f"the connector of a {self.model.config.model_type} model cannot be trained on stored features"
        return UserError(message, location="method", hint="train the language model: method: lora")

    def with_view(self, view: PreTrainedModel) -> VisionLanguageModel:
        """Return the complete model with the language model of a view, which both share."""
        setattr(self.owner, self.language_name.removeprefix(self.prefix), view.base_model)
        self.model.set_output_embeddings(view.get_output_embeddings())
        return VisionLanguageModel(self.model, view, self.language_name)

    @torch.no_grad()
    def load(self, folder: Path, prefix: str = "") -> VisionTower:
        """Load the weights except those of the language model, and return the tower.

        Args:
            folder: Folder of the model.
            prefix: Start of the names of the parameters and buffers to load.

        Raises:
            UserError: if the weights are incomplete or need a conversion.
        """
        checkpoint = read_checkpoint(folder)
        names = match_names(self.model, checkpoint.tensors)
        for name, parameter in self.model.named_parameters():
            if parameter.is_meta or not name.startswith(prefix):
                continue
            if name not in names.stored:
                message = f"the weights in the folder are missing '{name}', or store it in another form"
                raise UserError(message, location=str(folder), hint="save the model again with save_pretrained")
            parameter.copy_(checkpoint.tensors[names.stored[name]].load())
        for name, buffer in self.model.named_buffers():
            if name in names.stored and name.startswith(prefix):
                buffer.copy_(checkpoint.tensors[names.stored[name]].load())
        return self


def image_owner(model: PreTrainedModel) -> Any:
    """Return the module that has ``get_image_features``."""
    return model if hasattr(model, "get_image_features") else model.base_model


def _parameter_names(prefix: str, module: nn.Module) -> set[str]:
    return {f"{prefix}.{name}" for name, _ in module.named_parameters()}


def load_tower(folder: Path, config: PretrainedConfig, dtype: torch.dtype, *, values: bool = True) -> VisionTower:
    """Load a complete model without the weights of its language model, which stay on the meta device.

    Args:
        values: False to load no weights at all, for a dry run or :meth:`VisionTower.load`.

    Raises:
        UserError: as :meth:`VisionTower.load`.
    """
    auto = getattr(transformers, AUTO_MODEL)
    with no_init_weights(), quiet(), without_dispatch():
        model: Any = auto.from_config(config, dtype=dtype).requires_grad_(False).eval()
        for module in (model.get_decoder(), model.get_output_embeddings()):
            module.to("meta")
    if not values:
        tower = VisionTower(model)
        for module in (module for part in tower.parts.values() for module in part.modules()):
            for name, parameter in module.named_parameters(recurse=False):
                empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                setattr(module, name, nn.Parameter(empty, requires_grad=False))
        return tower
    return VisionTower(model).load(folder)


def require_supported(config: PretrainedConfig) -> None:
    """Reject families with images that are not part of one causal sequence, as far as their configuration shows it.

    Raises:
        UserError: if the family is not supported.
    """
    kind = config.model_type
    text = config.get_text_config(decoder=True)
    complete: Any = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]
    if hasattr(getattr(config, "vision_config", None), "deepstack_visual_indexes"):
        raise unsupported_family(kind, "several of its blocks read features of images")
    if "mrope" in str(getattr(text, "rope_parameters", None)) and text.model_type not in CAUSAL_MODELS:
        raise unsupported_family(kind, "its image tokens have three-dimensional positions")
    if "token_type_ids" in inspect.signature(complete.forward).parameters:
        raise unsupported_family(kind, "its image tokens attend to each other in both directions")
    if type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING and text.model_type not in CAUSAL_MODELS:
        raise unsupported_family(kind, f"transformers has no causal model of type {text.model_type}")


def text_view(model: PreTrainedModel) -> VisionLanguageModel:
    """Return a vision-language model with its text view. Both share all parameters of the language model.

    Raises:
        UserError: if the family is not supported.
    """
    kind = model.config.model_type
    config = model.config.get_text_config(decoder=True)
    language: Any = model.get_decoder()
    require_supported(model.config)
    with torch.device("meta"), quiet():
        causal = CAUSAL_MODELS.get(config.model_type)
        view: Any = transformers.AutoModelForCausalLM.from_config(config) if causal is None else causal(config)
    head = model.get_output_embeddings()
    if type(view.base_model) is not type(language) or head is None:
        raise unsupported_family(kind, f"its language model is a {type(language).__name__}")
    if causal is not None:
        read_encoded_positions(language)
    setattr(view, view.base_model_prefix, language)
    view.set_output_embeddings(head)
    view.generation_config = model.generation_config
    prefix = next(name for name, module in model.named_modules() if module is language)
    base = view.base_model_prefix
    modules = tuple((name, prefix if name == base else name) for name, _ in view.named_children())
    set_complete_names(view, NameMap(prefix, modules, model.config))
    return VisionLanguageModel(model, view.eval(), prefix)


def unsupported_family(kind: str, reason: str) -> UserError:
    """Return the error for a family of models."""
    hint = "use another family, for example llava, llava_onevision, smolvlm, idefics3 or internvl"
    return UserError(f"a {kind} model is not supported: {reason}", location="model", hint=hint)
