"""Terminology of everything that users or developers read.

Each pattern is a word or phrase that was replaced by a standard term. The list contains only phrases without an
ordinary meaning in this project.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PATHS = ("src/deltaw", "docs", "examples", "benchmarks", "README.md")
KINDS = {".py", ".cpp", ".h", ".md", ".yaml", ".txt"}
DATA = {"general_prompts.py"}  # questions for a model, not prose about the project

# Maps the pattern of a replaced phrase to the term to use.
REPLACED = {
    r"\btwins?\b": "reference implementation",
    r"\bmend(?:s|ed|ing)?\b": "hint, fix",
    r"\bdressed\b": "with virtual tokens prepended",
    r"\bmasters\b": "master weights",
    r"\bportions?\b": "microbatch, share",
    r"\b(?:kept|put|weights|gradients?|logits|layers) in(?:to)? bytes\b": "int8-quantized",
    r"\bwithout values\b": "fake tensors",
    r"\bcarr(?:y|ies|ied|ying) out\b": "run",
    r"\bturn(?:s|ed)? (?:it )?round\b": "search under a memory budget",
    r"\bnobody (?:looks|watches)\b": "name the condition",
    r"\b(?:common|shared) beginnings?\b": "shared prefix",
    r"\bin common at (?:the|their) beginning\b": "shared prefix",
    r"\bforests?\b": "prefix tree",
    r"\bflat rows?\b": "packed rows",
    r"\blean (?:blocks?|way|path)\b": "fused block",
    r"\bblocks? (?:(?:that )?(?:is|are) )?computed again\b": "activation checkpointing",
    r"\bentrances?\b": "layer entry point",
    r"\bjudg(?:ed|ing)\b": "evaluate",
    r"\bopened runs?\b": "inference session",
    r"\b(?:the )?house words?\b": "the project's terms",
    r"\bone whole road\b": "the whole data flow",
    r"\b(?:put|left|laid) aside\b": "skipped, dropped, stored",
}
# Maps British to American spellings. Words used by Python (`cancelled`, `afterwards`) are allowed.
BRITISH = {r"(?:\b|_)labell(?:ed|ing)(?:\b|_)": "labeled, labeling", r"colour\w*": "color"}
BRITISH |= {r"\bcentred?\b": "center, centered", r"\bgrey\w*": "gray", r"\b(?:mis)?spelt\b": "spelled"}
BRITISH |= {r"\blicences?\b": "license", r"\btowards\b": "toward", r"\bbehaviours?\b": "behavior"}
BRITISH |= {r"(?:ormal|nitial|ptim|uant|oken|erial|ummar|ecogn|organ|inim|axim)is(?:e[ds]?|ing|ation)\b": "-ize"}
PATTERNS = {re.compile(p.replace(" ", r"[\s#/*]+"), re.IGNORECASE): term for p, term in (REPLACED | BRITISH).items()}


def replaced_words(text: str) -> list[tuple[int, str, str]]:
    """Return line number, phrase and replacement term of each match. Phrases may span lines."""
    matches = ((match, term) for pattern, term in PATTERNS.items() for match in pattern.finditer(text))
    return sorted((text.count("\n", 0, m.start()) + 1, " ".join(m[0].split()), term) for m, term in matches)


@pytest.mark.parametrize("root_path", PATHS)
def test_replaced_words_are_not_used(root_path: str) -> None:
    path = ROOT / root_path
    files = [path] if path.is_file() else sorted(path.rglob("*"))
    files = [file for file in files if file.suffix in KINDS and file.name not in DATA]
    assert files
    violations = [
        f"{file.relative_to(ROOT)}:{line}: {phrase!r}; use {term!r}"
        for file in files
        for line, phrase, term in replaced_words(file.read_text(encoding="utf-8"))
    ]
    assert not violations, "\n".join(violations)


def test_replaced_phrases_are_detected_in_any_case_and_across_lines() -> None:
    text = "# Tensors without\n# values are made.\nA Twin of it; the masterstroke of a twinset mends nothing."
    violations = [(line, phrase) for line, phrase, _ in replaced_words(text)]
    assert violations == [(1, "without # values"), (3, "Twin"), (3, "mends")]
