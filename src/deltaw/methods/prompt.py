"""Prompt tuning: k vectors in front of every row are trained, and nothing of the model is.

"The Power of Scale for Parameter-Efficient Prompt Tuning" (Lester et al. 2021, arXiv 2104.08691). The
vectors are the embeddings of virtual tokens (:mod:`deltaw.runtime.virtual_tokens`): k ids are prepended to
each row, and all the rest is as with any tokens. Rows that share the prompt have it computed once.

It knows models and their embeddings; not data files or training.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deltaw.errors import UserError
from deltaw.methods.places import Place, as_before, inside, names_of, put_loaded, train_places
from deltaw.methods.prompt_file import ALWAYS_WHOLE, PromptFile, read_prompt, write_prompt
from deltaw.methods.settings import PromptSettings
from deltaw.runtime.virtual_tokens import (
    VirtualTokens,
    attach,
    attached,
    detach,
    input_embedding,
    own_embedding,
    weight_of,
)

_ENDINGS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
}


class Prompt:
    """Train ``settings.length`` vectors in front of every row.

    Args:
        settings: of what is trained; what is loaded brings its own length.
        tokenizer: makes tokens of ``settings.text``; needed for that alone.
    """

    name = "prompt"
    usual_rate = 0.03
    falls_with_width = False

    def __init__(
        self, settings: PromptSettings | None = None, tokenizer: PreTrainedTokenizerBase | None = None
    ) -> None:
        self.settings = settings or PromptSettings()
        self.tokenizer = tokenizer
        self.virtual_tokens = self.settings.length
        self._places: list[Place] = []
        self._virtual_ids: np.ndarray | None = None

    def prepare(
        self,
        model: nn.Module,
        *,
        seed: int,
        extra_modules: Sequence[str] = (),
        calibrate: Callable[[], None] | None = None,
    ) -> str:
        embedding = input_embedding(model)
        weight = weight_of(embedding)
        tokens, said = self._first_tokens(int(weight.shape[0]), seed)
        with torch.no_grad():
            start = embedding(tokens.to(weight.device))
        self._places = train_places(model, inside(extra_modules, names_of(model)))
        layer = attach(model, start)
        self._know(layer)
        total = sum(p.numel() for p in model.parameters())
        trained = sum(p.numel() for _, p in self.parameters(model))
        lines = [
            f"prompt: {trained:,} of {total:,} parameters trained ({trained / total:.2%}): "
            f"{self.settings.length} vectors of {layer.prompt.shape[1]} in front of every row, {said}"
        ]
        lines += [f"  extra trained modules: {', '.join(extra_modules)}"] if extra_modules else []
        return "\n".join(lines)

    @contextlib.contextmanager
    def evaluating(self, model: nn.Module) -> Iterator[None]:
        """Nothing is drawn at random at any time."""
        yield

    @contextlib.contextmanager
    def without(self, model: nn.Module) -> Iterator[None]:
        """Rows are then to be given undressed: the model's own embedding knows real tokens only."""
        with own_embedding(model), as_before(self._places):
            yield

    def parameters(self, model: nn.Module) -> list[tuple[str, nn.Parameter]]:
        return [("prompt", _layer(model).prompt), *((place.name, place.now) for place in self._places)]

    def rate_factor(self, name: str) -> float:
        return 1.0

    def after_step(self, model: nn.Module) -> None:
        """Nothing: the optimizer changes the vectors themselves."""

    def with_virtual_tokens(self, tokens: np.ndarray) -> np.ndarray:
        """The row behind the ids of the virtual tokens: (length,) to (k + length,).

        An encoder's first token stands behind the prompt too, where PEFT has it.
        """
        if self._virtual_ids is None:
            raise RuntimeError("which ids are virtual is known once the method was prepared or loaded")
        return np.concatenate([self._virtual_ids.astype(tokens.dtype), tokens])

    def save(
        self,
        model: nn.Module,
        folder: str | os.PathLike[str],
        *,
        base_model: str,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        task = next((t for ending, t in _ENDINGS.items() if type(model).__name__.endswith(ending)), None)
        trained = {place.name.rpartition(".")[0] for place in self._places}
        modules = _whole_modules(model, [*trained, *(ALWAYS_WHOLE if task == "SEQ_CLS" else ())])
        current = names_of(model)
        config = model.config.get_text_config() if isinstance(model, PreTrainedModel) else None
        file = PromptFile(
            prompt=_layer(model).prompt,
            whole={name: current[name] for name in inside(modules, current)},
            init="TEXT" if self.settings.init == "text" else "SAMPLE_VOCAB",
            text=self.settings.text,
            base_model=base_model,
            task_type=task,
            whole_modules=modules,
            heads=getattr(config, "num_attention_heads", 1),
            layers=getattr(config, "num_hidden_layers", 1),
        )
        write_prompt(Path(folder), file, metadata or {})

    def load(self, model: nn.Module, folder: str | os.PathLike[str]) -> str:
        file = read_prompt(Path(folder))
        model.requires_grad_(False)
        layer = attach(model, file.prompt)
        try:
            self._places = put_loaded(model, file.whole, {}, str(folder))
        except UserError:
            detach(model)
            raise
        layer.prompt.requires_grad_(False)
        self._know(layer)
        text = file.text if file.init == "TEXT" else None
        self.settings = PromptSettings(len(layer.prompt), "text" if text else "random", text or None)
        self.virtual_tokens = self.settings.length
        whole = sorted({name.rpartition(".")[0] for name in file.whole})
        extras = f", and {', '.join(whole)}" if whole else ""
        return f"a soft prompt of {len(layer.prompt)} vectors{extras} from {folder}"

    def can_share_prefixes(self) -> bool:
        """A prompt that stands in front of all rows is the first thing that they share."""
        return True

    def _know(self, layer: VirtualTokens) -> None:
        self._virtual_ids = np.arange(layer.first_id, layer.first_id + len(layer.prompt), dtype=np.int32)

    def _first_tokens(self, vocabulary: int, seed: int) -> tuple[Tensor, str]:
        """The tokens (k,) whose embeddings the vectors start as, and a few words on them.

        Embeddings of tokens lie where the model knows its way; a start from noise of the same spread learned
        more slowly, one from N(0, 1), PEFT's default, has many times their norm.
        """
        length, text = self.settings.length, self.settings.text
        if text is None:
            generator = torch.Generator().manual_seed(seed)
            return torch.randint(
                vocabulary, (length,), generator=generator
            ), "started as tokens drawn at random"
        if self.tokenizer is None:
            raise UserError(
                "the model has no tokenizer to make tokens of prompt.text",
                where="prompt.init",
                hint="set prompt.init: random",
            )
        # With the marks that the tokenizer puts around a text, as PEFT has them.
        ids = [int(i) for i in self.tokenizer(text)["input_ids"]]
        if not ids or max(ids) >= vocabulary:
            raise UserError(
                "prompt.text has no tokens that the model knows",
                where="prompt.text",
                hint="give another text",
            )
        if len(ids) == length:
            said = "started as prompt.text"
        elif len(ids) > length:
            said = f"started as the first {length} of prompt.text's {len(ids)} tokens"
        else:
            said = f"started as prompt.text's {len(ids)} tokens, repeated"
        repeated = ids * -(-length // len(ids))
        return torch.tensor(repeated[:length]), said


def _layer(model: nn.Module) -> VirtualTokens:
    layer = attached(model)
    if layer is None:
        raise UserError("the model has no soft prompt", hint="prepare the method or load a prompt first")
    return layer


def _whole_modules(model: nn.Module, endings: Sequence[str]) -> list[str]:
    """The modules that PEFT takes such ``modules_to_save`` for, without those inside of others."""
    ends = tuple(endings)
    hits = [name for name, _ in model.named_modules() if name and ends and name.endswith(ends)]
    return [name for name in hits if not any(name.startswith(f"{other}.") for other in hits)]
