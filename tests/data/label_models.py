"""A word tokenizer with the special tokens of an encoder."""

from __future__ import annotations

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

WORDS = ("good", "bad", "film", "a", "the", "plot", "very", "is", "it", "so")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer that renders ``[CLS] a [SEP]`` and ``[CLS] a [SEP] b [SEP]``, with segments 0 and 1."""
    vocabulary = {word: number for number, word in enumerate((*SPECIAL, *WORDS))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    single = "[CLS]:0 $A:0 [SEP]:0"
    special = [("[CLS]", 2), ("[SEP]", 3)]
    pair = f"{single} $B:1 [SEP]:1"
    backend.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=special)
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep")}
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names, model_input_names=inputs)
