"""Parameter-efficient training methods: a protocol (``base``), an implementation per file, and a ``registry``.

Importing the package registers the built-in methods without importing their implementations.
"""

from __future__ import annotations

from deltaw.lora.config import PEFT_NAMES, LoRAConfig
from deltaw.methods.settings import HeadSettings, InputSettings, LastSettings, PromptSettings, RandomSettings
from deltaw.settings.method_registry import MethodEntry, register

for _entry in (
    MethodEntry(
        "lora",
        "deltaw.methods.lora:LoRA",
        LoRAConfig,
        "rank, alpha and targets of the low-rank update",
        peft_type="LORA",
        aliases=PEFT_NAMES,
        search=("lora.rank=[4, 8, 16, 32]", "lora.alpha/rank=[1, 2, 4]"),
        compared_by_default=True,
    ),
    MethodEntry(
        "head", "deltaw.methods.whole_parameters:Head", HeadSettings, "only the output layer", compared_by_default=True
    ),
    MethodEntry("input", "deltaw.methods.single_weights:Input", InputSettings, "the input layer"),
    MethodEntry(
        "prompt",
        "deltaw.methods.prompt:SoftPrompt",
        PromptSettings,
        "a soft prompt",
        peft_type="PROMPT_TUNING",
        search=("prompt.length=[5, 10, 20, 50]",),
        compared_by_default=True,
    ),
    MethodEntry("bias", "deltaw.methods.whole_parameters:Bias", compared_by_default=True),
    MethodEntry(
        "random",
        "deltaw.methods.single_weights:Random",
        RandomSettings,
        "a random subset of weights",
        search=("random.weights=0.001..0.05:log",),
        compared_by_default=True,
    ),
    MethodEntry(
        "last",
        "deltaw.methods.whole_parameters:Last",
        LastSettings,
        "the last blocks",
        search=("last.blocks=[1, 2, 4]",),
    ),
    MethodEntry("full", "deltaw.methods.whole_parameters:Full", compared_by_default=True),
):
    register(_entry)
