"""LoRA+: B learns at a rate of its own, as in PEFT."""

from __future__ import annotations

import copy

import torch
from peft.optimizers import create_loraplus_optimizer

from deltaw.lora import LoRAConfig, LoRALayer, attach
from deltaw.methods.lora import LoRA
from deltaw.training.optimizer import adamw, set_rate
from tests.lora.models import copy_to_peft, inputs, ours_as_peft, peft_factors, randomise, tiny, with_peft


def test_ten_steps_equal_pefts():
    base = tiny("llama")
    targets = ["q_proj", "v_proj", "down_proj"]
    theirs = with_peft(base, r=4, lora_alpha=8, target_modules=targets, lora_dropout=0.0).eval()
    ours = copy.deepcopy(base)
    attach(ours, LoRAConfig(rank=4, alpha=8, target_modules=targets))
    randomise(ours)
    copy_to_peft(ours, theirs)
    method = LoRA(LoRAConfig(), b_rate=16.0)
    named = method.parameters(ours)
    mine = adamw([p for _, p in named], 1e-3, factors=[method.rate_factor(name) for name, _ in named])
    set_rate(mine, 1e-3)
    other = create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0, loraplus_weight_decay=0.0
    )
    for optimizer in (mine, other):
        for group in optimizer.param_groups:
            # A larger epsilon than usual, or Adam would divide rounding errors by rounding errors.
            group["eps"] = 1e-4
    batch = inputs("llama")
    for _ in range(10):
        for model, optimizer in ((ours, mine), (theirs, other)):
            optimizer.zero_grad()
            model(**batch).logits.float().pow(2).mean().backward()
            optimizer.step()
    reference = peft_factors(theirs)
    for name, layer in ((n, m) for n, m in ours.named_modules() if isinstance(m, LoRALayer)):
        for factor, their_factor in zip((layer.lora_A, layer.lora_B), reference[name], strict=True):
            torch.testing.assert_close(ours_as_peft(factor), their_factor, rtol=1e-5, atol=1e-6)
