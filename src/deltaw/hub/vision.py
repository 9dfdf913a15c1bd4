"""Vision-language models as text models: a view of the language model that also reads image features.

A vision-language model has a vision tower, a connector and a language model. The text view is the causal class of
transformers over the language model's own modules, so packing, fused blocks, planning and decoding work as for a text
model. Image features enter it as embeddings of additional token ids (:mod:`deltaw.runtime.image_tokens`).

The view computes the same outputs only if images are part of one causal sequence with one-dimensional positions.
:func:`text_view` rejects other families by their configuration, and :func:`verify_view` compares both models.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from deltaw.errors import UserError
from deltaw.hub.transformers_private import configurations_of, quiet
from deltaw.lora.complete_names import NameMap, complete_names, set_complete_names
from deltaw.runtime.image_tokens import image_embeddings

AUTO_MODEL = "AutoModelForImageTextToText"
# Maximum relative difference of the logits of both models in fp32.
TOLERANCE = 1e-4


def is_vision_language(config: PretrainedConfig) -> bool:
    """Return True if a configuration is that of a vision-language model with a separate language model."""
    supported = configurations_of(AUTO_MODEL)
    has_text = config.get_text_config(decoder=True) is not config
    return supported is not None and type(config) in supported and has_text


def is_view(config: PretrainedConfig, task_class: str) -> bool:
    """Return True if a task loads a model as text view.

    Args:
        task_class: Auto class of the task. Models that it contains are loaded as such.
    """
    own = configurations_of(task_class)
    is_text = task_class == "AutoModelForCausalLM" and own is not None and type(config) not in own
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

    def full_name(self, name: str) -> str:
        """Return the name in the complete model of a module or parameter of the view."""
        names = complete_names(self.view)
        assert names is not None
        return names.to_complete(name)

    @torch.no_grad()
    def features(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """Return the features of each image, of shape (tokens, d), as the language model reads them.

        Args:
            inputs: Outputs of the model's processor for images: ``pixel_values``, and further ones of the family.
        """
        owner: Any = self.model if hasattr(self.model, "get_image_features") else self.model.base_model
        output = owner.get_image_features(**inputs, return_dict=True)
        features = getattr(output, "pooler_output", output)
        return list(features) if not isinstance(features, Tensor) or features.dim() == 3 else [features]


def text_view(model: PreTrainedModel) -> VisionLanguageModel:
    """Return a vision-language model with its text view. Both share all parameters of the language model.

    Raises:
        UserError: if the family is not supported.
    """
    kind, config = model.config.model_type, model.config.get_text_config(decoder=True)
    language: Any = model.get_decoder()
    if "mrope" in str(getattr(config, "rope_parameters", None)):
        raise _unsupported(kind, "its image tokens have three-dimensional positions")
    if "token_type_ids" in inspect.signature(model.forward).parameters:
        raise _unsupported(kind, "its image tokens attend to each other in both directions")
    try:
        with torch.device("meta"), quiet():
            view = transformers.AutoModelForCausalLM.from_config(config)
    except ValueError as error:
        raise _unsupported(kind, f"transformers has no causal model of type {config.model_type}") from error
    head = model.get_output_embeddings()
    if type(view.base_model) is not type(language) or head is None:
        raise _unsupported(kind, f"its language model is a {type(language).__name__}")
    setattr(view, view.base_model_prefix, language)
    view.set_output_embeddings(head)
    view.generation_config = model.generation_config
    prefix = next(name for name, module in model.named_modules() if module is language)
    base = view.base_model_prefix
    modules = tuple((name, prefix if name == base else name) for name, _ in view.named_children())
    set_complete_names(view, NameMap(prefix, modules, model.config))
    return VisionLanguageModel(model, view.eval(), prefix)


def empty_view(config: PretrainedConfig, **options: Any) -> PreTrainedModel:
    """Return the view of a new model with this configuration, on the default device.

    Args:
        config: Configuration of the complete model.
        options: Options of ``AutoModelForImageTextToText.from_config``, for example ``dtype``.

    Raises:
        UserError: if the family is not supported.
    """
    return text_view(getattr(transformers, AUTO_MODEL).from_config(config, **options)).view


@torch.no_grad()
def verify_view(parts: VisionLanguageModel, tokens: Tensor, inputs: Mapping[str, Tensor], image_token: int) -> None:
    """Check that both models compute the same logits for a prompt with an image.

    Args:
        parts: Model with its view.
        tokens: (length,) prompt with a placeholder for each token of the image.
        inputs: Image inputs of the complete model.
        image_token: Id of the placeholder.

    Raises:
        UserError: if the logits differ, for example because image tokens attend to each other in both directions.
    """
    expected = parts.model(input_ids=tokens[None], **inputs).logits[0].float()
    features = torch.cat(parts.features(inputs))
    with image_embeddings(parts.view, features) as first_id:
        is_image = tokens == image_token
        ids = tokens.masked_scatter(is_image, torch.arange(first_id, first_id + int(is_image.sum())))
        actual = parts.view(input_ids=ids[None]).logits[0].float()
    difference = float((actual - expected).norm() / expected.norm())
    if not difference <= TOLERANCE:
        reason = f"its outputs differ by {difference:.1%} if images are read as tokens of one causal sequence"
        raise _unsupported(parts.model.config.model_type, reason)


def _unsupported(kind: str, reason: str) -> UserError:
    hint = "use another family, for example llava, llava_onevision, smolvlm, idefics3 or internvl"
    return UserError(f"a {kind} model is not supported: {reason}", location="model", hint=hint)
