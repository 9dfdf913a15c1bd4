"""Kernels and arithmetic are chosen by measured rates.

Cached rates that are invalid or belong to another machine are ignored.
"""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from transformers import GPT2Config, LlamaConfig

from deltaw.cache.results import load_result, store_result
from deltaw.errors import UserError
from deltaw.kernels import linear, loader, variants
from deltaw.kernels.arithmetic import WEIGHT_TYPES, Arithmetic, supported_arithmetics
from deltaw.machine import kernel_choice, product_rates
from deltaw.machine.kernel_choice import KernelChoice, choose_arithmetic, choose_kernels
from deltaw.machine.product_rates import Candidate, ProductRates, Sizes, sizes_of, valid_rates
from tests.caches import fake_version, modify_source

SIZES = Sizes(128, 256, 128)
compiled_only = pytest.mark.skipif(loader.library() is None, reason=loader.unavailable_reason() or "")


def candidates_of(rates):
    """Return the candidates of a table of rates, in its order."""
    names = [(stored, *name.rpartition(":")) for stored, by_name in rates.items() for name in by_name]
    return [Candidate(stored, kernels or None, arithmetic) for stored, kernels, _, arithmetic in names]


def choice_of(fp32, bf16, int8, threads=1):
    rates = dict(zip(WEIGHT_TYPES, (fp32, bf16, int8), strict=True))
    return KernelChoice(choose_arithmetic(rates, candidates_of(rates)), SIZES, threads, rates)


KERNELS = {"a:dot": 100, "torch": 10}
TORCH = {"torch": 10}


@pytest.fixture
def measurements(monkeypatch, tmp_path):
    """Clear overrides and caches, replace the measurement, and return the list of its calls."""
    monkeypatch.delenv(variants.MEASURED)
    monkeypatch.delenv(variants.VARIABLE, raising=False)
    monkeypatch.setenv("DELTAW_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(product_rates, "_used", {})
    monkeypatch.setattr(product_rates, "_imported_rates", {})
    calls = []

    def measure(sizes, threads):
        calls.append((sizes, threads))
        rates = {stored: {} for stored in WEIGHT_TYPES}
        for number, candidate in enumerate(product_rates.candidates()):
            rates[candidate.weight_type][candidate.name] = 100.0 + number + len(calls)
        return ProductRates(rates, disturbed=False)

    monkeypatch.setattr(product_rates, "measure", measure)
    return calls


CLOSE, FAR = ({"high:dot": 100, "low:dot": low, "torch": 50} for low in (105, 150))


FASTEST_ARITHMETIC = [
    ([{"a:dot": 9, "torch": 8}, {"a:dot": 5, "a:wide": 9}, {"a:dot": 9, "a:tiles": 20}], "a dot wide tiles"),
    ([{"a:dot": 100, "torch": 104}, {"a:dot": 100, "torch": 900}, {"a:dot": 900, "torch": 50}], "a dot torch dot"),
    # A process uses one variant for all types. A lower one is chosen only if it is clearly faster.
    ([CLOSE] * 3, "high dot dot dot"),
    ([FAR] * 3, "low dot dot dot"),
]


@pytest.mark.parametrize(("rates", "expected"), FASTEST_ARITHMETIC)
def test_fastest_arithmetic_is_chosen_per_type(rates, expected):
    kernels, fp32, bf16, int8 = expected.split()
    assert choice_of(*rates).arithmetic == Arithmetic(kernels, fp32=fp32, bf16=bf16, int8=int8)


def test_torch_is_chosen_without_kernels():
    assert choice_of(TORCH, TORCH, TORCH).arithmetic == Arithmetic()


BOTH = ("int8_logits", "int8_gradients")
SUMS = "summed_classes"


ENABLED_APPROXIMATIONS = [
    ({"a:dot": 300}, {"a:dot": 600}, {*BOTH, SUMS}),
    ({"a:dot": 300}, {"a:dot": 310}, {SUMS}),
    ({"a:dot": 600}, {"a:dot": 500}, {SUMS}),
    ({"a:dot": 100}, {"a:dot": 100, "torch": 900}, {SUMS}),  # int8 approximations need compiled kernels
    (
        {"a:dot": 100, "torch": 300},
        {"a:dot": 900, "torch": 50},
        {"int8_logits", SUMS},
    ),  # gradients are computed by torch
]


@pytest.mark.parametrize(("bf16", "int8", "approximations"), ENABLED_APPROXIMATIONS)
def test_approximations_are_enabled_if_clearly_faster(bf16, int8, approximations, monkeypatch):
    rates = KERNELS, {"torch": 10, **bf16}, {"torch": 10, **int8}
    assert set(choice_of(*rates).approximations) == approximations
    for approximation in approximations:
        with monkeypatch.context() as patch:
            patch.setenv(variants.APPROXIMATION_SWITCHES[approximation], "0")
            assert set(choice_of(*rates).approximations) == approximations - {approximation}
    assert choice_of(TORCH, TORCH, TORCH).approximations == ()


def test_arithmetic_round_trips_through_dict():
    approximate = Arithmetic("a", "dot", "wide", "dot", int8_logits=True)
    for arithmetic in (approximate, replace(approximate, int8_gradients=True), Arithmetic("a"), Arithmetic()):
        assert Arithmetic.from_dict(arithmetic.as_dict()) == arithmetic


def test_rates_are_measured_once_and_cached(measurements):
    first = choose_kernels(SIZES, 1)
    assert choose_kernels(SIZES, 1).rates == first.rates and len(measurements) == 1
    product_rates._used.clear()  # as in another process
    assert choose_kernels(SIZES, 1).rates == first.rates and len(measurements) == 1


MACHINE_CHANGES = {"processor": ("processor_name", lambda: "another")}
MACHINE_CHANGES |= {"flags": ("processor_flags", lambda: {"another"}), "cache": ("second_level_cache", lambda: 1)}
MACHINE_CHANGES |= {"kernels": ("_libraries", lambda names: [["another", "build"]])}


@pytest.mark.parametrize("change", ["threads", "sizes", "torch", "code", "variable", *MACHINE_CHANGES])
def test_cached_rates_of_another_machine_are_ignored(change, measurements, tmp_path, monkeypatch):
    choose_kernels(SIZES, 1)
    product_rates._used.clear()
    if change == "torch":
        fake_version(monkeypatch, "torch")
    elif change == "code":
        modify_source(monkeypatch, tmp_path / "source", "machine/product_rates.py")
    elif change == "variable":
        monkeypatch.setenv("MKL_ENABLE_INSTRUCTIONS", "AVX2")
    elif change in MACHINE_CHANGES:
        monkeypatch.setattr(kernel_choice, *MACHINE_CHANGES[change])
    choose_kernels(Sizes(128, 512, 128) if change == "sizes" else SIZES, 2 if change == "threads" else 1)
    assert len(measurements) == 2


TOO_FAST = {stored: {"avx9:dot": 1e6, "torch": 1.0} for stored in WEIGHT_TYPES}


@pytest.mark.parametrize("content", [7, {}, *({"rates": rates} for rates in ({}, {"fp32": {"torch": 1.0}}, TOO_FAST))])
def test_invalid_cache_file_is_ignored(content, measurements):
    choose_kernels(SIZES, 1)
    ((key, _),) = product_rates._used.values()
    product_rates._used.clear()
    store_result(product_rates.KIND, key, content)
    choose_kernels(SIZES, 1)
    assert len(measurements) == 2


@pytest.mark.parametrize("rate", [0, -5.0, "fast", None, float("inf"), float("nan"), 1e9])
def test_implausible_rates_are_rejected(rate):
    candidates = [Candidate(stored, None, "torch") for stored in WEIGHT_TYPES]
    for value, is_valid in ((100, True), (rate, False)):
        assert (valid_rates({stored: {"torch": value} for stored in WEIGHT_TYPES}, candidates) is not None) == is_valid


def test_disturbed_measurement_is_not_cached(measurements, monkeypatch):
    real = product_rates.measure
    disturbed = lambda *arguments: ProductRates(real(*arguments).rates, disturbed=True)  # noqa: E731
    monkeypatch.setattr(product_rates, "measure", disturbed)
    assert "busy" in choose_kernels(SIZES, 1).why("bf16")
    ((key, _),) = product_rates._used.values()
    assert load_result(product_rates.KIND, key) is None
    choose_kernels(SIZES, 1)
    assert len(measurements) == 1, "this process must reuse its measurement"


def test_child_processes_reuse_rates(measurements, monkeypatch):
    first = choose_kernels(SIZES, 1)
    environment = product_rates.child_environment()
    product_rates._used.clear()
    monkeypatch.setenv("DELTAW_CACHE", "/nowhere/that/can/be/written")
    monkeypatch.setenv(variants.MEASURED, environment[variants.MEASURED])
    assert choose_kernels(SIZES, 1).rates == first.rates and len(measurements) == 1
    # Rates that a child process measured are passed to the next child.
    monkeypatch.delenv(variants.MEASURED)
    rates = product_rates.used_rates()
    product_rates._used.clear()
    product_rates.import_rates(rates)
    assert json.loads(product_rates.child_environment()[variants.MEASURED]) == rates
    assert choose_kernels(SIZES, 1).rates == first.rates and len(measurements) == 1


@compiled_only
def test_override_restricts_choice(measurements, monkeypatch):
    def forced(override):
        loader.use_arithmetic(None)
        monkeypatch.setenv(variants.VARIABLE, override)
        return choose_kernels(SIZES, 1).arithmetic

    name = loader.usable_variants()[-1].name  # generic, or another variant without AMX
    assert "tiles" not in supported_arithmetics(loader.open_variant(name).library, "bf16")
    with loader.temporary_arithmetic():
        arithmetic = forced(name)
        assert arithmetic.kernels == name and "torch" not in arithmetic.as_dict().values()
        assert forced(f"{name}:torch") == Arithmetic(name)
        with pytest.raises(UserError, match=f"'{name}' have no arithmetic 'tiles'"):
            forced(f"{name}:tiles")
        assert forced("none") == Arithmetic()
        loader.use_arithmetic(Arithmetic())
        assert loader.unavailable_reason() == "compiled kernels are switched off (DELTAW_KERNELS=none)"


@compiled_only
def test_products_use_torch_if_chosen():
    x = torch.randn(8, 64)
    weight = torch.randn(32, 64)
    original = loader.arithmetic()
    with loader.temporary_arithmetic(replace(original, fp32="torch")):
        assert not linear.can_multiply(x, linear.LinearProduct(weight))
        assert linear.can_multiply(x.bfloat16(), linear.LinearProduct(weight.bfloat16()))
        assert torch.equal(linear.linear(x, linear.LinearProduct(weight))[0], x @ weight.t())
        assert loader.supports(x), "everything else stays compiled"
    assert linear.can_multiply(x, linear.LinearProduct(weight)) and loader.arithmetic() == original


def test_choice_reports_reason_and_faster_precision(monkeypatch):
    monkeypatch.delenv(variants.VARIABLE, raising=False)  # otherwise the reason would mention it
    bf16 = {"a:dot": 158.0, "a:wide": 290.0, "torch": 160.0}
    choice = choice_of({"a:dot": 300.0, "torch": 290.0}, bf16, {"a:dot": 900.0, "torch": 50.0}, 2)
    assert choice.value("bf16") == choice.value("nf4") == "a, bf16 products wide"
    assert choice.why("bf16") == "290 GFLOP/s; torch 160, dot 158"
    assert "int8 would take about 32 % of the time of products" in str(choice.faster_precision("bf16"))
    assert choice.faster_precision("int8") is None
    slower = {**choice.rates, "int8": {"a:dot": 350.0, "torch": 50.0}}
    assert KernelChoice(choice.arithmetic, SIZES, 2, slower).faster_precision("bf16") is None


CONFIG_SIZES = [
    (LlamaConfig(hidden_size=576, intermediate_size=1536, num_attention_heads=9), (576, 1536, 576)),
    (LlamaConfig(hidden_size=64, intermediate_size=96, num_attention_heads=4, head_dim=32), (64, 96, 128)),
    (GPT2Config(n_embd=48, n_head=4), (48, 192, 48)),
    (object(), (1024, 4096, 1024)),
]


@pytest.mark.parametrize(("config", "sizes"), CONFIG_SIZES)
def test_sizes_are_derived_from_model_config(config, sizes):
    assert sizes_of(config) == Sizes(*sizes)


@compiled_only
def test_measurement_covers_candidates_and_restores_state():
    """Rates are plausible, and torch's random state, threads and arithmetic are unchanged."""
    before = loader.arithmetic()
    state = torch.get_rng_state()
    threads = torch.get_num_threads()
    assert valid_rates(product_rates.measure(SIZES, 1).rates, product_rates.candidates()) is not None
    assert loader.arithmetic() == before and torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)


def test_override_none_measures_only_torch(monkeypatch):
    monkeypatch.setenv(variants.VARIABLE, "none")
    with loader.temporary_arithmetic():
        loader.use_arithmetic(None)
        rates = product_rates.measure(Sizes(64, 64, 64), 1).rates
    assert all(list(by_name) == ["torch"] for by_name in rates.values()) and rates.keys() == set(WEIGHT_TYPES)
