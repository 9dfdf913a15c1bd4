"""LoRA+: B has its own learning rate, as in PEFT."""

from __future__ import annotations

import torch
from peft.optimizers import create_loraplus_optimizer

from deltaw.lora import LoRAConfig
from deltaw.methods.lora import LoRA
from deltaw.training.optimizer import adamw, set_rate
from tests.lora.models import factor_pairs, inputs, ours_and_peft, ours_as_peft, tiny


def test_ten_steps_match_peft():
    targets = ["q_proj", "v_proj", "down_proj"]
    ours, theirs = ours_and_peft(tiny("llama"), LoRAConfig(rank=4, alpha=8, target_modules=targets))
    method = LoRA(LoRAConfig(), loraplus_lr_ratio=16.0)
    named = method.parameters(ours)
    our_optimizer = adamw([p for _, p in named], 1e-3, factors=[method.rate_factor(name) for name, _ in named])
    set_rate(our_optimizer, 1e-3)
    ratios = {"loraplus_lr_ratio": 16.0, "loraplus_weight_decay": 0.0}
    their_optimizer = create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=1e-3, **ratios)
    for group in (*our_optimizer.param_groups, *their_optimizer.param_groups):
        # With the usual epsilon Adam would divide rounding errors by rounding errors.
        group["eps"] = 1e-4
    batch = inputs("llama")
    for _ in range(10):
        for model, optimizer in ((ours, our_optimizer), (theirs, their_optimizer)):
            optimizer.zero_grad()
            model(**batch).logits.float().pow(2).mean().backward()
            optimizer.step()
    for _, factor, their_factor in factor_pairs(ours, theirs):
        torch.testing.assert_close(ours_as_peft(factor), their_factor, rtol=1e-5, atol=1e-6)
