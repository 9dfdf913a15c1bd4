"""Kernels and arithmetic are chosen by rates, and by none that another machine or a hand wrote."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from transformers import GPT2Config, LlamaConfig

from deltaw.cache import recall, remember
from deltaw.errors import UserError
from deltaw.kernels import linear, loader, variants
from deltaw.kernels.arithmetic import STORED, Arithmetic, offered
from deltaw.machine import kernel_choice, product_rates
from deltaw.machine.kernel_choice import KernelChoice, choose_kernels, chosen_of
from deltaw.machine.product_rates import Candidate, Measured, Sizes, believable, sizes_of
from tests.caches import other_text, other_version

SIZES = Sizes(128, 256, 128)
compiled_only = pytest.mark.skipif(loader.library() is None, reason=loader.why_not() or "")


def candidates_of(rates):
    """The candidates that a table of rates is of, in its order."""
    named = [(stored, *name.rpartition(":")) for stored, by_name in rates.items() for name in by_name]
    return [Candidate(stored, kernels or None, way) for stored, kernels, _, way in named]


def choice_of(fp32, bf16, int8, threads=1):
    rates = dict(zip(STORED, (fp32, bf16, int8), strict=True))
    return KernelChoice(chosen_of(rates, candidates_of(rates)), SIZES, threads, rates)


KERNELS, TORCH = {"a:dot": 100, "torch": 10}, {"torch": 10}


@pytest.fixture
def measuring(monkeypatch, tmp_path):
    """A process that was told nothing, with a cache of its own; counts what it measures."""
    monkeypatch.delenv(variants.MEASURED)
    monkeypatch.delenv(variants.VARIABLE, raising=False)
    monkeypatch.setenv("DELTAW_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(product_rates, "_used", {})
    monkeypatch.setattr(product_rates, "_learned", {})
    calls = []

    def measure(sizes, threads):
        calls.append((sizes, threads))
        rates = {stored: {} for stored in STORED}
        for number, candidate in enumerate(product_rates.candidates()):
            rates[candidate.stored][candidate.name] = 100.0 + number + len(calls)
        return Measured(rates, disturbed=False)

    monkeypatch.setattr(product_rates, "measure", measure)
    return calls


CLOSE, FAR = ({"high:dot": 100, "low:dot": low, "torch": 50} for low in (105, 150))


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        ([{"a:dot": 9, "torch": 8}, {"a:dot": 5, "a:wide": 9}, {"a:dot": 9, "a:tiles": 20}], "a dot wide tiles"),
        ([{"a:dot": 100, "torch": 104}, {"a:dot": 100, "torch": 900}, {"a:dot": 900, "torch": 50}], "a dot torch dot"),
        # The whole choice is one variant, since a process calls one: a lower one where it is clearly faster.
        ([CLOSE] * 3, "high dot dot dot"),
        ([FAR] * 3, "low dot dot dot"),
    ],
)
def test_the_fastest_arithmetic_of_each_type_is_chosen_and_torch_where_it_is_clearly_faster(rates, expected):
    kernels, fp32, bf16, int8 = expected.split()
    assert choice_of(*rates).arithmetic == Arithmetic(kernels, fp32=fp32, bf16=bf16, int8=int8)


def test_without_kernels_torch_computes():
    assert choice_of(TORCH, TORCH, TORCH).arithmetic == Arithmetic()


BOTH, SUMS = ("int8_logits", "int8_gradients"), "summed_classes"


@pytest.mark.parametrize(
    ("bf16", "int8", "offered"),
    [
        ({"a:dot": 300}, {"a:dot": 600}, {*BOTH, SUMS}),
        ({"a:dot": 300}, {"a:dot": 310}, {SUMS}),
        ({"a:dot": 600}, {"a:dot": 500}, {SUMS}),
        ({"a:dot": 100}, {"a:dot": 100, "torch": 900}, {SUMS}),  # nothing in int8 by torch
        ({"a:dot": 100, "torch": 300}, {"a:dot": 900, "torch": 50}, {"int8_logits", SUMS}),  # with which gradients stay
    ],
)
def test_int8_is_offered_where_it_is_clearly_faster_and_sums_of_classes_with_kernels(bf16, int8, offered, monkeypatch):
    rates = KERNELS, {"torch": 10, **bf16}, {"torch": 10, **int8}
    assert set(choice_of(*rates).approximations) == offered
    for what in offered:
        with monkeypatch.context() as patch:
            patch.setenv(variants.LEFT_OUT_BY[what], "0")
            assert set(choice_of(*rates).approximations) == offered - {what}
    assert choice_of(TORCH, TORCH, TORCH).approximations == ()


def test_an_arithmetic_is_read_as_it_was_written():
    rough = Arithmetic("a", "dot", "wide", "dot", int8_logits=True)
    for written in (rough, replace(rough, int8_gradients=True), Arithmetic("a"), Arithmetic()):
        assert Arithmetic.read(written.as_dict()) == written


def test_rates_are_measured_once_and_remembered(measuring):
    first = choose_kernels(SIZES, 1)
    assert choose_kernels(SIZES, 1).rates == first.rates and len(measuring) == 1
    product_rates._used.clear()  # another process
    assert choose_kernels(SIZES, 1).rates == first.rates and len(measuring) == 1


OTHERS = {
    "processor": ("processor_name", lambda: "another"),
    "flags": ("processor_flags", lambda: {"another"}),
    "cache": ("second_level_cache", lambda: 1),
    "kernels": ("_libraries", lambda names: [["another", "build"]]),
}


@pytest.mark.parametrize("change", ["threads", "sizes", "torch", "code", "variable", *OTHERS])
def test_rates_of_another_machine_are_not_believed(change, measuring, tmp_path, monkeypatch):
    choose_kernels(SIZES, 1)
    product_rates._used.clear()
    if change == "torch":
        other_version(monkeypatch, "torch")
    elif change == "code":
        other_text(monkeypatch, tmp_path / "source", "machine/product_rates.py")
    elif change == "variable":
        monkeypatch.setenv("MKL_ENABLE_INSTRUCTIONS", "AVX2")
    elif change in OTHERS:
        monkeypatch.setattr(kernel_choice, *OTHERS[change])
    choose_kernels(Sizes(128, 512, 128) if change == "sizes" else SIZES, 2 if change == "threads" else 1)
    assert len(measuring) == 2


TOO_FAST = {stored: {"avx9:dot": 1e6, "torch": 1.0} for stored in STORED}


@pytest.mark.parametrize("nonsense", [7, {}, *({"rates": of} for of in ({}, {"fp32": {"torch": 1.0}}, TOO_FAST))])
def test_a_file_that_somebody_wrote_is_not_believed(nonsense, measuring):
    choose_kernels(SIZES, 1)
    ((key, _),) = product_rates._used.values()
    product_rates._used.clear()
    remember(product_rates.KIND, key, nonsense)
    choose_kernels(SIZES, 1)
    assert len(measuring) == 2


@pytest.mark.parametrize("rate", [0, -5.0, "fast", None, float("inf"), float("nan"), 1e9])
def test_rates_that_no_processor_has_are_not_believed(rate):
    candidates = [Candidate(stored, None, "torch") for stored in STORED]
    for given, believed in ((100, True), (rate, False)):
        assert (believable({stored: {"torch": given} for stored in STORED}, candidates) is not None) == believed


def test_what_was_measured_beside_other_programs_is_not_remembered(measuring, monkeypatch):
    real = product_rates.measure
    monkeypatch.setattr(product_rates, "measure", lambda *of: Measured(real(*of).rates, disturbed=True))
    assert "busy" in choose_kernels(SIZES, 1).why("bf16")
    ((key, _),) = product_rates._used.values()
    assert recall(product_rates.KIND, key) is None
    choose_kernels(SIZES, 1)
    assert len(measuring) == 1, "this process keeps to it all the same"


def test_processes_that_this_one_starts_choose_alike(measuring, monkeypatch):
    own = choose_kernels(SIZES, 1)
    handed = product_rates.for_children()
    product_rates._used.clear()
    monkeypatch.setenv("DELTAW_CACHE", "/nowhere/that/can/be/written")
    monkeypatch.setenv(variants.MEASURED, handed[variants.MEASURED])
    assert choose_kernels(SIZES, 1).rates == own.rates and len(measuring) == 1
    # And the other way: what a child measured, the next child is told.
    monkeypatch.delenv(variants.MEASURED)
    told = product_rates.used()
    product_rates._used.clear()
    product_rates.learn(told)
    assert json.loads(product_rates.for_children()[variants.MEASURED]) == told
    assert choose_kernels(SIZES, 1).rates == own.rates and len(measuring) == 1


@compiled_only
def test_what_the_user_forces_narrows_the_choice(measuring, monkeypatch):
    def forced(value):
        loader.compute_with(None)
        monkeypatch.setenv(variants.VARIABLE, value)
        return choose_kernels(SIZES, 1).arithmetic

    name = loader.usable()[-1].name  # the generic one, or another without AMX
    assert "tiles" not in offered(loader.open_variant(name).library, "bf16")
    with loader.computing():
        found = forced(name)
        assert found.kernels == name and "torch" not in found.as_dict().values()
        assert forced(f"{name}:torch") == Arithmetic(name)
        with pytest.raises(UserError, match=f"'{name}' have no arithmetic 'tiles'"):
            forced(f"{name}:tiles")
        assert forced("none") == Arithmetic()
        loader.compute_with(Arithmetic())
        assert loader.why_not() == "compiled kernels are switched off (DELTAW_KERNELS=none)"


@compiled_only
def test_products_go_to_torch_where_that_was_chosen():
    x, weight, own = torch.randn(8, 64), torch.randn(32, 64), loader.arithmetic()
    with loader.computing(replace(own, fp32="torch")):
        assert not linear.can_multiply(x, linear.Product(weight))
        assert linear.can_multiply(x.bfloat16(), linear.Product(weight.bfloat16()))
        assert torch.equal(linear.linear(x, linear.Product(weight))[0], x @ weight.t())
        assert loader.serves(x), "everything else stays compiled"
    assert linear.can_multiply(x, linear.Product(weight)) and loader.arithmetic() == own


def test_a_run_says_what_was_chosen_and_what_would_be_faster(monkeypatch):
    monkeypatch.delenv(variants.VARIABLE, raising=False)  # a choice that it narrowed names it
    bf16 = {"a:dot": 158.0, "a:wide": 290.0, "torch": 160.0}
    choice = choice_of({"a:dot": 300.0, "torch": 290.0}, bf16, {"a:dot": 900.0, "torch": 50.0}, 2)
    assert choice.value("bf16") == choice.value("nf4") == "a, bf16 products wide"
    assert choice.why("bf16") == "290 GFLOP/s; torch 160, dot 158"
    assert "int8 would take about 32 % of the time of products" in str(choice.faster_precision("bf16"))
    assert choice.faster_precision("int8") is None
    slower = {**choice.rates, "int8": {"a:dot": 350.0, "torch": 50.0}}
    assert KernelChoice(choice.arithmetic, SIZES, 2, slower).faster_precision("bf16") is None


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        (LlamaConfig(hidden_size=576, intermediate_size=1536, num_attention_heads=9), (576, 1536, 576)),
        (LlamaConfig(hidden_size=64, intermediate_size=96, num_attention_heads=4, head_dim=32), (64, 96, 128)),
        (GPT2Config(n_embd=48, n_head=4), (48, 192, 48)),
        (object(), (1024, 4096, 1024)),
    ],
)
def test_sizes_follow_from_a_models_configuration(config, sizes):
    assert sizes_of(config) == Sizes(*sizes)


@compiled_only
def test_measuring_times_each_candidate_and_leaves_the_process_as_it_was():
    """Some rate of each, of the order of the others; torch's random numbers and the arithmetic are
    untouched."""
    before, state, threads = loader.arithmetic(), torch.get_rng_state(), torch.get_num_threads()
    assert believable(product_rates.measure(SIZES, 1).rates, product_rates.candidates()) is not None
    assert loader.arithmetic() == before and torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)


def test_a_process_that_forces_none_measures_torch_alone(monkeypatch):
    monkeypatch.setenv(variants.VARIABLE, "none")
    with loader.computing():
        loader.compute_with(None)
        rates = product_rates.measure(Sizes(64, 64, 64), 1).rates
    assert {stored: list(of) for stored, of in rates.items()} == {stored: ["torch"] for stored in STORED}
