"""Which blocks of a model can be fused, found by their parts, tried, and put in place for a while.

A block is recognized by what it has, not by its name, and then tried: on a few tokens its fused form must
give what its own code gives. Knows transformers' decoder blocks; what a fused block computes is said in
``fused_halves``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.host.choices import Choice
from deltaw.kernels import rows
from deltaw.kernels.layout import Layout
from deltaw.runtime.blocks import blocks_of
from deltaw.runtime.fused import FusedBlock, FusedNorm
from deltaw.runtime.fused_halves import AttentionHalf, GatedHalf, Norm

# Names of activation functions in transformers' modules, and the kernels' names for them.
_ACTIVATIONS = {
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "PytorchGELUTanh": "gelu_tanh",
    "GELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "GELUActivation": "gelu",
    "GELU": "gelu",
    "ReLU": "relu",
}


def norm_of(module: nn.Module | None) -> Norm | None:
    """The norm that a module is, found by trying it; None where it is none that is known here."""
    weight = getattr(module, "weight", None)
    if module is None or not isinstance(weight, Tensor) or weight.dim() != 1:
        return None
    if list(module.children()):
        return None
    eps = next((getattr(module, name) for name in ("variance_epsilon", "eps") if hasattr(module, name)), None)
    if not isinstance(eps, float):
        return None
    if isinstance(module, nn.LayerNorm):
        return Norm(module, eps, 0.0, True)
    if getattr(module, "bias", None) is not None:
        return None
    # Whether the weight is kept as such or as its difference from one, its own forward says.
    with torch.no_grad(), _real():
        sample = torch.linspace(-1.5, 2.0, weight.numel(), dtype=torch.float32)[None]
        copy = type(module).__new__(type(module))
        copy.__dict__.update(module.__dict__)
        copy._parameters = {"weight": nn.Parameter(torch.full((weight.numel(),), 0.5), requires_grad=False)}
        given = copy(sample)
        for offset in (0.0, 1.0):
            expected, _ = rows.norm_reference(
                sample, torch.full((weight.numel(),), 0.5), None, offset=offset, eps=eps, centred=False
            )
            if torch.allclose(given, expected, rtol=1e-4, atol=1e-5):
                return Norm(module, eps, offset, False)
    return None


@contextlib.contextmanager
def _real() -> Iterator[None]:
    """Tensors with values, whatever mode is on."""
    with torch._C._DisableTorchDispatch():
        yield


class NotingLayout(Layout):
    """A layout that notes what attention is told beside it: scaling, window and soft cap of each layer."""

    noted: list[tuple[float, int | None, float | None]]

    def note(self, scaling: float, window: int | None, softcap: float | None) -> None:
        self.noted.append((scaling, window, softcap))


@dataclass
class FusedBlocks:
    """The fused blocks of a model, and what is known of them.

    Attributes:
        blocks: those that were recognized; may be none.
        choice: whether they are used, and why or why not.
        norm: the norm behind the last block, where it is one that is known.
    """

    blocks: list[FusedBlock]
    choice: Choice[bool]
    norm: FusedNorm | None = None

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """While open, the blocks' forward is the fused one; afterwards it is what it was."""
        all_parts: list[tuple[nn.Module, FusedBlock | FusedNorm]] = [(b.block, b) for b in self.blocks]
        if self.norm is not None:
            all_parts.append((self.norm.module, self.norm))
        used = [part for part in all_parts if self.choice.value and "forward" not in vars(part[0])]
        for module, fused in used:
            vars(module)["forward"] = fused
        try:
            yield
        finally:
            for module, fused in used:
                del vars(module)["forward"]
                if isinstance(fused, FusedBlock):
                    fused.forget()


def recognize(model: nn.Module) -> FusedBlocks:
    """The blocks that have the parts of a fused one, not yet tried."""
    found = blocks_of(model)
    if found is None:
        return FusedBlocks([], Choice(False, "the model has no list of blocks"))
    blocks: list[FusedBlock] = []
    for block in found[1]:
        fused = _recognized(block)
        if isinstance(fused, str):
            return FusedBlocks([], Choice(False, f"{type(block).__name__} is not known here: {fused}"))
        blocks.append(fused)
    norm = norm_of(getattr(model, "norm", None))
    return FusedBlocks(blocks, Choice(True, "not tried"), None if norm is None else FusedNorm(norm))


def _recognized(block: nn.Module) -> FusedBlock | str:
    """The fused form of a block, or what it lacks."""
    children = dict(block.named_children())
    attention = next((m for m in children.values() if _has(m, "q_proj", "k_proj", "v_proj", "o_proj")), None)
    gated = next((m for m in children.values() if _has(m, "gate_proj", "up_proj", "down_proj")), None)
    if attention is None or gated is None:
        return "no attention with queries, keys and values apart, or no gated MLP"
    activation = getattr(gated, "act_fn", None)
    kind = _ACTIVATIONS.get(type(activation).__name__)
    if kind is None:
        return f"the activation {type(activation).__name__}"
    names = ["input_layernorm", "post_attention_layernorm"]
    if "pre_feedforward_layernorm" in children:
        names += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    norms = [norm_of(children.get(name)) for name in names]
    if any(norm is None for norm in norms):
        return "a norm"
    before, behind = norms[0], norms[1]
    head_size = getattr(attention, "head_dim", None)
    heads = [norm_of(getattr(attention, name, None)) for name in ("q_norm", "k_norm")]
    if not isinstance(head_size, int) or any(n and n.weight.numel() != head_size for n in heads):  # type: ignore[union-attr]
        return "the size of its heads"
    known = {id(p) for n in (*norms, *heads) if n is not None for p in n.module.parameters()}
    layers = [
        *(getattr(attention, f"{x}_proj") for x in "qkvo"),
        *(getattr(gated, f"{x}_proj") for x in ("gate", "up", "down")),
    ]
    if not all(isinstance(layer, nn.Linear) for layer in layers):
        return "a projection that is no linear layer"
    known |= {id(p) for layer in layers for p in layer.parameters()}
    if any(id(p) not in known for p in block.parameters()):
        return "parameters beside its norms and projections"
    assert before is not None and behind is not None
    if len(norms) == 2:
        halves = (
            AttentionHalf(before, attention, head_size, heads[0], heads[1], None),
            GatedHalf(behind, gated, kind, None),
        )
    else:
        assert norms[2] is not None
        halves = (
            AttentionHalf(before, attention, head_size, heads[0], heads[1], behind),
            GatedHalf(norms[2], gated, kind, norms[3]),
        )
    return FusedBlock(block, *halves)


def _has(module: nn.Module, *names: str) -> bool:
    return all(isinstance(getattr(module, name, None), nn.Module) for name in names)


def try_blocks(fused: FusedBlocks, run: Any, layout: NotingLayout, tolerance: float) -> FusedBlocks:
    """Run the model's own blocks once, note what their attention is told, and compare.

    Args:
        run: runs the model's backbone over ``layout``.
        tolerance: of the relative difference of norms between a fused block's output and the block's own.
    """
    seen: list[tuple[FusedBlock, Tensor, tuple[Any, ...], dict[str, Any], Tensor]] = []
    layout.noted = []

    def watch(block: FusedBlock) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            result = output[0] if isinstance(output, tuple) else output
            seen.append((block, hidden, args[1:], kwargs, result))

        return hook

    hooks = [b.block.register_forward_hook(watch(b), with_kwargs=True) for b in fused.blocks]
    try:
        with torch.no_grad():
            run()
    finally:
        for hook in hooks:
            hook.remove()
    if len(layout.noted) != len(fused.blocks) or len(seen) != len(fused.blocks):
        return FusedBlocks([], Choice(False, "attention is not called once in each block"))
    worst = 0.0
    for (block, hidden, args, kwargs, own), told in zip(seen, layout.noted, strict=True):
        block.attention.scaling, block.attention.window, block.attention.softcap = told
        named = {k: v for k, v in kwargs.items() if k != "hidden_states"}
        if not block.serves(hidden, layout):
            continue
        with torch.no_grad():
            ours = block(hidden, *args, **named)
        if not isinstance(own, Tensor) or ours.shape != own.shape:
            return FusedBlocks([], Choice(False, "a block gives more than its output"))
        if has_values_of(own):
            change = (own.float() - hidden.float()).norm()
            worst = max(worst, float((ours.float() - own.float()).norm() / change))
    if not worst < tolerance:
        return FusedBlocks([], Choice(False, f"outputs differ from the model's own by {worst:.1e}"))
    why = f"same outputs as the model's own (relative difference {worst:.1e})"
    return FusedBlocks(fused.blocks, Choice(True, why), fused.norm)


def has_values_of(tensor: Tensor) -> bool:
    """Whether there are numbers to compare."""
    return type(tensor) is Tensor or isinstance(tensor, nn.Parameter)
