"""Class names that are almost equal, or probably misspelled."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Mapping

import yaml

# Maximum number of groups in a description.
_MAX_GROUPS = 5
# Punctuation that is ignored at the end of a name. Grades and languages end with other signs ("A+", "C#").
_TRAILING = ".,:;!?…。、"


def name_key(name: str) -> str:
    """Return a text that is equal for almost equal names.

    It ignores case, surrounding and repeated white space, Unicode compatibility forms, invisible characters and
    punctuation at the end.
    """
    normalized = unicodedata.normalize("NFKC", name).casefold()
    visible = "".join(character for character in normalized if unicodedata.category(character) != "Cf")
    words = " ".join(visible.split())
    return words.rstrip(_TRAILING + " ") or words


def almost_equal_names(counts: Mapping[str, int]) -> list[list[str]]:
    """Return the groups of names that are almost equal, the most frequent name first.

    Args:
        counts: Number of rows of each name.
    """
    groups: dict[str, list[str]] = {}
    for name in sorted(counts, key=lambda name: (-counts[name], name)):
        groups.setdefault(name_key(name), []).append(name)
    return [group for group in groups.values() if len(group) > 1]


def merged_classes(counts: Mapping[str, int]) -> dict[str, str]:
    """Return the mapping for ``data.classes`` that merges almost equal names.

    The class is called like the most frequent name, without superfluous white space.
    """
    pairs = {name: " ".join(group[0].split()) for group in almost_equal_names(counts) for name in group}
    return {name: merged for name, merged in pairs.items() if name != merged}


def count_classes(counts: Mapping[str, int], merged: Mapping[str, str]) -> dict[str, int]:
    """Return the number of rows of each class after merging labels."""
    result: Counter[str] = Counter()
    for label, count in counts.items():
        result[merged.get(label, label)] += count
    return result


def match_classes(names: set[str], classes: tuple[str, ...]) -> dict[str, str]:
    """Return the class of each name that is not a class but almost equal to exactly one."""
    candidates: dict[str, list[str]] = {}
    for name in classes:
        candidates.setdefault(name_key(name), []).append(name)
    matches = {name: candidates.get(name_key(name), []) for name in names - {*classes}}
    return {name: matched[0] for name, matched in sorted(matches.items()) if len(matched) == 1}


def merge_setting(merged: Mapping[str, str]) -> str:
    """Return the setting that merges classes, as YAML on one line."""
    text = yaml.safe_dump(dict(merged), default_flow_style=True, allow_unicode=True, width=10**9, sort_keys=False)
    return f"data.classes: {text.strip()}"


def similar_names(counts: Mapping[str, int]) -> dict[str, str]:
    """Return the frequent name for each rare one that is probably misspelled, because they differ by one edit.

    Almost equal names count as one.
    """
    similar: dict[str, str] = {}
    counts = count_classes(counts, merged_classes(counts))
    names = sorted(counts, key=lambda name: (counts[name], name))
    for index, rare in enumerate(names[: 10**6 // max(1, len(names))]):
        rare_key = name_key(rare)
        for frequent in reversed(names[index + 1 :]):
            frequent_key = name_key(frequent)
            is_rare = counts[rare] <= max(2, counts[frequent] // 50) and counts[rare] < counts[frequent]
            is_rare = is_rare and min(len(rare_key), len(frequent_key)) > 3
            if is_rare and _is_one_edit(rare_key, frequent_key):
                similar[rare] = frequent
                break
    return similar


def almost_equal_text(counts: Mapping[str, int]) -> tuple[str, dict[str, str]]:
    """Return a description of almost equal names, or '', and the mapping that merges them."""
    groups = [", ".join(_with_count(name, counts) for name in group) for group in almost_equal_names(counts)]
    text = f"classes with almost equal names are different classes: {'; '.join(groups[:_MAX_GROUPS])}"
    return text if groups else "", merged_classes(counts)


def similar_text(counts: Mapping[str, int]) -> tuple[str, dict[str, str]]:
    """Return a description of names that are probably misspelled, or '', and the mapping that corrects them."""
    similar = similar_names(counts)
    counts = count_classes(counts, merged_classes(counts))
    pairs = [f"{_with_count(rare, counts)} is almost {_with_count(name, counts)}" for rare, name in similar.items()]
    text = f"classes that may be typing errors: {'; '.join(pairs[:_MAX_GROUPS])}"
    return text if pairs else "", similar


def _with_count(name: str, counts: Mapping[str, int]) -> str:
    return f"'{name}' ({counts[name]:,} row{'s' * (counts[name] != 1)})"


def _is_one_edit(left: str, right: str) -> bool:
    """Return True if the texts differ by one inserted, removed, replaced or swapped nondigit character."""
    start = _shared_prefix(left, right)
    end = _shared_prefix(left[start:][::-1], right[start:][::-1])
    left = left[start : len(left) - end]
    right = right[start : len(right) - end]
    swapped = len(left) == 2 and left == right[::-1]
    return (swapped or max(len(left), len(right)) <= 1) and not any(map(str.isdigit, left + right))


def _shared_prefix(left: str, right: str) -> int:
    return next((n for n, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))
