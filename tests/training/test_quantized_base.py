"""Runs on quantized base weights (GGUF blocks or NF4) match runs on the dequantized weights."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

from deltaw.errors import UserError
from deltaw.export.merge_plan import MergeOptions, prepare_merge
from deltaw.export.merged import assemble
from deltaw.hub import gguf, gguf_loading
from deltaw.hub.loading import load
from deltaw.inference.open_run import open_run
from deltaw.kernels import block_linear
from deltaw.lora import LoRAConfig, attach, detach, merge
from deltaw.lora.fingerprint import base_fingerprint
from deltaw.lora.layers import LoRAForeignLinear
from deltaw.lora.layers_quantized import BlockEmbedding, BlockLinear
from deltaw.lora.stored import block_weight, count_logical_parameters
from deltaw.runs.fit import fit
from deltaw.runtime.nf4 import quantize_nf4
from tests.byte_models import save_model, tiny_llama
from tests.conftest import refusal
from tests.hub.test_gguf import write_gguf
from tests.training.runs import losses

BF16 = 2.0**-8


@pytest.fixture(scope="module", autouse=True)
def _separate_cache(tmp_path_factory):
    """Use a separate cache and convert in this process, because a child process would import everything first."""

    def convert(path, dtype, into, log):
        assert gguf.convert_in_process(str(path), dtype, str(into)) == 0

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DELTAW_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(gguf, "_convert_in_child", convert)
        yield


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "tiny.Q8_0.gguf"
    write_gguf(path)
    return path


@pytest.fixture(scope="module")
def wide_folder(tmp_path_factory):
    """A Llama with a row length divisible by the NF4 block size."""
    folder = tmp_path_factory.mktemp("wide") / "model"
    return save_model(tiny_llama(hidden_size=64, intermediate_size=128, initializer_range=0.2), folder)


def short_run(settings, folder, model, precision, **changes):
    train = {"epochs": 3, "learning_rate": 1e-2, "drift": False}
    return settings(folder, model=str(model), precision=precision, train=train, **changes)


def test_gguf_weights_equal_dequantized_weights(gguf_file):
    plain, quantized = (load(str(gguf_file), precision=p, device="cpu", threads=1) for p in ("bf16", "gguf"))
    tokens = torch.arange(3, 40)[None]
    for name, module in quantized.model.named_modules():
        if isinstance(module, BlockLinear | BlockEmbedding):
            # This includes queries and keys, which have permuted rows in the file.
            assert torch.equal(module.plain_weight(), plain.model.get_submodule(name).weight), name
    assert sum(isinstance(m, BlockLinear) for m in quantized.model.modules()) == 8
    assert quantized.model.lm_head.weight is quantized.model.model.embed_tokens.weight
    with torch.no_grad():
        ours, theirs = (m.model(tokens).logits.float() for m in (quantized, plain))
    assert float((ours - theirs).norm() / theirs.norm()) < BF16
    assert base_fingerprint(quantized.model) == base_fingerprint(plain.model)
    assert count_logical_parameters(quantized.model) == count_logical_parameters(plain.model)
    assert quantized.model.generation_config.eos_token_id == plain.model.generation_config.eos_token_id
    quantized_bytes = sum(p.nbytes for p in quantized.model.parameters())
    assert quantized_bytes < 0.55 * sum(p.nbytes for p in plain.model.parameters())  # Q8_0 is 34 bytes for 32 numbers


def test_gguf_run_trains_resumes_and_merges(gguf_file, settings, tmp_path):
    result, plain = (fit(short_run(settings, tmp_path / p, gguf_file, p)) for p in ("gguf", "bf16"))
    run = result.output
    ours, plain_losses = (losses(outcome.output) for outcome in (result, plain))
    assert ours[-1] < 0.98 * ours[0] and ours == pytest.approx(plain_losses, rel=1e-2)

    resumed = fit({"train": {"epochs": 4}}, resume=run).output
    assert losses(resumed)[: len(ours)] == ours and len(losses(resumed)) > len(ours)
    refusal(fit, {"precision": "bf16", "train": {"epochs": 5}}, resume=run, match="precision")

    opened = open_run(str(run), device="cpu", log=str)
    assert isinstance(opened.model.lm_head, BlockLinear)
    layer = opened.model.model.layers[0].self_attn.q_proj
    assert block_weight(layer).format == "Q8_0" and float(layer.lora_B.norm()) > 0
    refusal(merge, opened.model, match="stored in blocks of Q8_0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no warning about a different base model
        open_run(str(run), precision="bf16", device="cpu", log=str)
    with prepare_merge(run, MergeOptions(), str) as job:
        assert "dequantized values" in " ".join(assemble(job).notes)

    # The plan counts the size of the blocks.
    weights = result.plan.parts["weights"]
    loaded = load(str(gguf_file), precision="gguf", device="cpu", threads=1).model
    assert result.plan.total_parameters == plain.plan.total_parameters
    assert weights == pytest.approx(sum(p.nbytes for p in loaded.parameters()), rel=0.02)
    assert weights < 0.6 * plain.plan.parts["weights"]


def test_run_on_gguf_starts_from_adapter(gguf_file, settings, tmp_path):
    first = fit(short_run(settings, tmp_path / "first", gguf_file, "gguf"))
    runs = {
        "continue": {},
        "bf16": {"precision": "bf16"},  # fingerprints of the blocks and of their values are equal
        "stack": {"start_mode": "stack", "lora": {"rank": 2}},
    }
    for name, changes in runs.items():
        options = {"precision": "gguf", "start_from": str(first.output)} | changes
        result = fit(short_run(settings, tmp_path / name, gguf_file, options.pop("precision"), **options))
        assert losses(result.output)[0] < losses(first.output)[0]
        assert result.plan.peak_resident_bytes > 0


def test_nf4_run_matches_run_on_rounded_weights(wide_folder, settings, tmp_path):
    rounded = load(str(wide_folder), precision="nf4", device="cpu", threads=1).model
    report = quantize_nf4(rounded.base_model)
    assert (report.layers, report.unquantized) == (14, [])
    plain = load(str(wide_folder), precision="bf16", device="cpu", threads=1).model
    assert base_fingerprint(rounded) == base_fingerprint(plain)
    blocks = {name: module for name, module in rounded.named_modules() if isinstance(module, BlockLinear)}
    for name, module in blocks.items():
        weight = plain.get_submodule(name).weight
        assert not torch.equal(weight, module.plain_weight())
        weight.data.copy_(module.plain_weight())
    assert len(blocks) == 14
    save_model(plain, tmp_path / "rounded")
    # The first caller fills these caches. A dry run must not leave fake tensors in them.
    block_linear.nf4_levels.cache_clear()
    block_linear.dynamic_codes.cache_clear()
    result = fit(short_run(settings, tmp_path / "nf4", wide_folder, "nf4"))
    assert type(block_linear.nf4_levels()) is type(block_linear.dynamic_codes()) is torch.Tensor
    plain_result = fit(short_run(settings, tmp_path / "bf16", tmp_path / "rounded", "bf16"))
    assert result.plan.total_parameters == plain_result.plan.total_parameters
    assert result.plan.parts["weights"] < plain_result.plan.parts["weights"]
    ours = result.output
    theirs = plain_result.output
    assert losses(ours) == pytest.approx(losses(theirs), rel=1e-2) and losses(ours)[-1] < losses(ours)[0]
    opened = open_run(str(ours), device="cpu", log=str)
    assert block_weight(opened.model.model.layers[0].mlp.up_proj).format == "NF4"
    with prepare_merge(ours, MergeOptions(), str) as job:
        assert "NF4" in " ".join(assemble(job).notes)


def test_unsupported_methods_on_blocks_are_rejected_by_name(gguf_file, settings, tmp_path):
    for match, changes in {
        "and cannot be trained": {"method": "full"},
        "DoRA needs the norms": {"lora": {"dora": True}},
        "changes the weight, which is stored in blocks of Q8_0": {"lora": {"init": "pissa"}},
        "cannot be trained in full": {"lora": {"train_modules": ["lm_head"]}},
        "rows are stored in blocks of Q8_0": {"lora": {"target_modules": ["embed_tokens"]}},
        "stored in blocks": {"lora": {"trainable_token_indices": [3]}},
    }.items():
        refusal(fit, short_run(settings, tmp_path / "refused", gguf_file, "gguf", **changes), match=match)


@pytest.mark.slow
def test_soft_prompt_trains_on_quantized_base(gguf_file, settings, tmp_path):
    runs = (fit(short_run(settings, tmp_path / p, gguf_file, p, method="prompt")).output for p in ("gguf", "bf16"))
    ours, plain_losses = map(losses, runs)
    assert ours == pytest.approx(plain_losses, rel=1e-2) and ours[0] != ours[-1]


def test_unquantized_model_and_truncated_file_are_rejected(wide_folder, gguf_file, settings, tmp_path):
    with pytest.raises(UserError, match=r"precision: gguf requires a \.gguf file"):
        fit(short_run(settings, tmp_path / "refused", wide_folder, "gguf"))
    loaded = load(str(gguf_file), precision="gguf", device="cpu", threads=1)
    short_file = tmp_path / "short.gguf"
    short_file.write_bytes(gguf_file.read_bytes()[:-4000])
    refusal(gguf_loading.fill_from_blocks, tiny_llama(), loaded.folder, short_file, match="the file is truncated")


class Packed(nn.Parameter):
    """A weight as another library stores it."""


Packed.__module__ = "torchao.quantization"


def check_foreign(model, x, library):
    base_output = model["q_proj"](x).detach()
    attach(model, LoRAConfig(rank=4, alpha=8, target_modules=["q_proj"]))
    layer = model["q_proj"]
    assert isinstance(layer, LoRAForeignLinear) and torch.equal(layer(x), base_output)  # B is zero at first
    with torch.no_grad():
        layer.lora_B.normal_()
    y = layer(x)
    torch.testing.assert_close(y, base_output + 2 * (x @ layer.lora_A) @ layer.lora_B, rtol=1e-5, atol=1e-5)
    y.sum().backward()
    assert float(layer.lora_A.grad.norm()) > 0
    refusal(merge, model, match=f"quantized by {library}")
    with pytest.raises(UserError, match="DoRA needs the norms"):
        attach(nn.ModuleDict({"q_proj": make_foreign_linear()}), LoRAConfig(dora=True, target_modules=["q_proj"]))


def make_foreign_linear():
    linear = nn.Linear(64, 32, bias=False)
    linear.weight = Packed(torch.randn(32, 64), requires_grad=False)
    return linear


def test_layer_quantized_by_other_library_computes_its_product():
    check_foreign(nn.ModuleDict({"q_proj": make_foreign_linear()}), torch.randn(5, 64), "torchao")


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes_layer_is_adapted_with_its_product(bits):
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is optional")
    plain = nn.Linear(64, 32, bias=False)
    if bits == 4:
        quantized = bnb.nn.Linear4bit(64, 32, bias=False, compute_dtype=torch.float32, quant_type="nf4")
        quantized.weight = bnb.nn.Params4bit(plain.weight.data.clone(), quant_type="nf4", requires_grad=False)
    else:
        quantized = bnb.nn.Linear8bitLt(64, 32, bias=False, has_fp16_weights=False)
        quantized.load_state_dict(plain.state_dict())
    check_foreign(nn.ModuleDict({"q_proj": quantized.to("cpu")}), torch.randn(5, 64), "bitsandbytes")


def make_torchao_model(config):
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is optional")
    model = nn.ModuleDict({"q_proj": nn.Linear(64, 32, bias=False)})
    quantization.quantize_(model, getattr(quantization, config)())
    return model


def test_torchao_layer_is_adapted_with_its_product():
    model = make_torchao_model("Int8WeightOnlyConfig")
    before = copy.deepcopy(model["q_proj"])
    numbers = model["q_proj"].weight.dequantize().detach()
    check_foreign(model, torch.randn(5, 64), "torchao")
    layer = model["q_proj"]
    x = torch.randn(3, 64, requires_grad=True)
    layer(x).sum().backward()
    full_weight = numbers + layer.delta_weight()
    torch.testing.assert_close(x.grad, full_weight.detach().sum(0).expand(3, 64), rtol=1e-4, atol=1e-4)
    detach(model)
    assert torch.equal(model["q_proj"](x), before(x))


def test_torchao_product_without_gradient_raises_if_gradient_is_needed():
    model = make_torchao_model("Int8DynamicActivationInt8WeightConfig")
    check_foreign(model, torch.randn(5, 64), "torchao")  # the input of the lowest layer needs no gradient
    refusal(model["q_proj"], torch.randn(5, 64, requires_grad=True), match="Int8Tensor gives its input no gradient")
    with torch.no_grad():
        model["q_proj"](torch.randn(5, 64, requires_grad=True))
