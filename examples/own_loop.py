"""LoRA in a custom training loop, for any torch module. A small network learns a new target.

python examples/own_loop.py
"""

from __future__ import annotations

import torch
from torch import nn

import deltaw


def main() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 1))
    inputs = torch.randn(256, 32)
    before = network(inputs).detach()
    targets = before + inputs[:, :1]

    summary = deltaw.attach(network, deltaw.LoRAConfig(rank=4, alpha=8, target_modules=["0", "2"]), seed=0)
    print(summary)
    optimizer = torch.optim.AdamW((p for _, p in deltaw.adapter_parameters(network)), lr=2e-2)
    for step in range(200):
        loss = nn.functional.mse_loss(network(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0 or step == 199:
            print(f"step {step}: loss {loss.item():.5f}")

    with deltaw.disabled(network):
        print("base outputs unchanged:", torch.equal(network(inputs), before))
    adapted = network(inputs).detach()
    deltaw.merge(network)
    print(f"merging moved the outputs by {(network(inputs) - adapted).abs().max():.1e} at most")
    deltaw.unmerge(network)
    deltaw.detach(network)
    print("detached, every bit as before:", torch.equal(network(inputs), before))


if __name__ == "__main__":
    main()
