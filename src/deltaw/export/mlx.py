"""An adapter in the format of mlx-lm: ``adapters.safetensors`` and its own ``adapter_config.json``.

mlx-lm puts an update on every module that ``keys`` names in the last ``num_layers`` layers, with one rank and
one scale, and then reads what the file has. A module that the file has nothing for keeps a B of zeros, so it
changes nothing. A is (in, r) and B (r, out) there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from deltaw.errors import UserError
from deltaw.export.described_base import DescribedBase, describe_base, read_updates, require_same_base
from deltaw.export.output_folder import appearing, check_target
from deltaw.export.plain_adapter import PlainAdapter, PlainUpdate, require_lora
from deltaw.export.portable import WrittenFolder, uniform
from deltaw.lora.files import CONFIG_NAME
from deltaw.lora.fingerprint import FINGERPRINT_KEY
from deltaw.tensor_files import save_tensors

FORMAT = "mlx"
WEIGHTS = "adapters.safetensors"
_LAYER = re.compile(r"model\.layers\.(?P<number>\d+)\.(?P<inside>.+)")
# Families whose modules mlx-lm names as transformers does.
_SAME_NAMES = (
    "llama",
    "mistral",
    "smollm3",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "phi3",
)


def export_mlx(
    run: Path,
    folder: Path,
    *,
    model: str | None = None,
    trust_remote_code: bool = False,
    overwrite: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> WrittenFolder:
    """Write the adapter in ``run`` for mlx-lm's ``--adapter-path``.

    Args:
        run: a run's folder, or an adapter's in PEFT's format.
        folder: to make.
        model: the base model, where it is not the one that the folder names.
        trust_remote_code: run the Python files that came with the base model.
        overwrite: whether a folder with files is replaced.
        say: told a line where something should be known.

    Raises:
        UserError: the adapter holds more than the format can, the base is another one or of a family that
            mlx-lm names otherwise, or the folder cannot be written. Nothing is written then.
    """
    require_lora(run, FORMAT)
    check_target(folder, overwrite=overwrite)
    base = describe_base(run, model, say=say, precision="bf16", trust_remote_code=trust_remote_code)
    adapter = read_updates(run, base, FORMAT, say=say)
    _refuse(adapter, base, run)
    fingerprint = require_same_base(base, adapter.fingerprint, run, say)
    alike = uniform(adapter.updates)
    tensors: dict[str, Tensor] = {}
    for update, (factor_A, factor_B) in zip(adapter.updates, alike.factors, strict=True):
        tensors[f"{update.module}.lora_a"] = factor_A.t().contiguous()
        tensors[f"{update.module}.lora_b"] = factor_B.t().contiguous()
    layers, keys = _keys(adapter.updates, int(base.config.num_hidden_layers))
    settings = {
        "fine_tune_type": "lora",
        "model": base.files.reference,
        "num_layers": layers,
        "lora_parameters": {"rank": alike.rank, "scale": alike.scaling, "dropout": 0.0, "keys": keys},
    }
    metadata = {"format": "mlx"} | ({FINGERPRINT_KEY: fingerprint} if fingerprint else {})
    with appearing(folder, overwrite=overwrite, say=say) as partial:
        save_tensors(partial / WEIGHTS, tensors, metadata)
        text = json.dumps(settings, indent=2, ensure_ascii=False)
        (partial / CONFIG_NAME).write_text(text + "\n", encoding="utf-8")
    return WrittenFolder(folder, len(adapter.updates), alike.rank, alike.alpha, alike.padded, alike.folded)


def _keys(updates: list[PlainUpdate], layers: int) -> tuple[int, list[str]]:
    """How many of the last layers have updates, and the modules: of a layer by their names inside it."""
    found = [(_LAYER.fullmatch(update.module), update.module) for update in updates]
    numbers = [int(match["number"]) for match, _ in found if match is not None]
    keys = {module if match is None else match["inside"] for match, module in found}
    # mlx-lm takes 0 for none of the layers.
    return (layers - min(numbers) if numbers else 0), sorted(keys)


def _refuse(adapter: PlainAdapter, base: DescribedBase, run: Path) -> None:
    if base.config.model_type not in _SAME_NAMES:
        raise UserError(
            f"the modules of '{base.config.model_type}' models have other names in mlx-lm",
            where=str(run),
            hint=f"known are {', '.join(_SAME_NAMES)}; otherwise merge the adapter (deltaw merge) and "
            "convert the model with mlx_lm.convert",
        )
    if adapter.invocation is not None:
        raise UserError(
            "the adapter acts only from its invocation tokens on, and mlx-lm would apply it to every token",
            where=str(run),
            hint="serve it with deltaw serve, or llama.cpp (--format gguf-adapter)",
        )
    outer = [u.module for u in adapter.updates if u.embedding or u.module == "lm_head"]
    if outer and base.config.tie_word_embeddings:
        raise UserError(
            f"the adapter changes '{outer[0]}', which is tied: mlx-lm would change both weights",
            where=str(run),
            hint="merge it instead (deltaw merge) and convert the model with mlx_lm.convert",
        )
