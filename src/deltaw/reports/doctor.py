"""`deltaw doctor` as a person reads it, and as one object for programs."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from deltaw.kernels.arithmetic import STORED, TORCH
from deltaw.reports.diagnosis import SEVERITIES, Finding, Severity, diagnose, worst
from deltaw.reports.machine import Facts, gather
from deltaw.training.callbacks import Say, silent
from deltaw.version import __version__

_STYLES = {"ok": "green", "note": "cyan", "warning": "yellow", "problem": "red"}


@dataclass(frozen=True)
class Examination:
    """A machine, and what is to be said about it."""

    facts: Facts
    findings: list[Finding]

    @property
    def status(self) -> Severity:
        """The worst of the findings."""
        return worst(self.findings)

    def as_dict(self) -> dict[str, object]:
        """Plain values, ready for JSON."""
        facts = self.facts
        choice, now = facts.kernels, facts.measured
        return {
            "deltaw": __version__,
            "versions": dict(facts.versions),
            "status": self.status,
            "processor": {
                "name": facts.processor,
                "cores": facts.cores,
                "processors": facts.processors,
                "machine_processors": facts.machine_processors,
                "quota": facts.quota,
                "threads": facts.threads.value,
                "threads_why": facts.threads.why,
                "load": facts.load,
                "openmp": facts.openmp,
            },
            "kernels": {
                "chosen": choice.arithmetic.as_dict(),
                "variants": [
                    {**asdict(variant), "lacking": list(variant.lacking), "usable": variant.usable}
                    for variant in facts.variants
                ],
                "sizes": asdict(choice.sizes),
                "rates": choice.rates,
                "rates_now": None if now is None else now.rates,
                "disturbed": choice.disturbed or (now is not None and now.disturbed),
            },
            "memory": {
                "limit_bytes": facts.memory_limit.value,
                "limit_why": facts.memory_limit.why,
                "free_bytes": facts.free_memory,
                "swap_used_bytes": facts.swap[0],
                "swap_total_bytes": facts.swap[1],
            },
            "disks": [
                {
                    "purpose": disk.purpose,
                    "path": str(disk.path),
                    "free_bytes": disk.free,
                    "writable": disk.writable,
                    "held_bytes": disk.held,
                }
                for disk in facts.disks
            ],
            "cache_bytes": dict(facts.cache),
            "packages": [package.as_dict() for package in facts.packages],
            "optional": dict(facts.optional),
            "gpus": [asdict(gpu) | {"capability": list(gpu.capability)} for gpu in facts.gpus],
            "environment": dict(facts.environment),
            "model": None if facts.model is None else asdict(facts.model),
            "findings": [finding.as_dict() for finding in self.findings],
        }

    def render(self) -> RenderableType:
        """A heading, the rates, and the findings."""
        facts = self.facts
        versions = facts.versions
        parts: list[RenderableType] = [
            Text(
                f"deltaw {__version__}, Python {versions['python']}, torch {versions['torch']}, "
                f"{versions['system']}"
            ),
            Text(f"{facts.processor}: {facts.cores} cores, {facts.processors} processors"),
            Text(),
            self._rates(),
            Text(
                f"billion operations a second with {facts.kernels.threads} threads, hidden size "
                f"{facts.kernels.sizes.hidden}; * is used"
            ),
            Text(),
            self._findings(),
            Text(),
            Text(self._verdict()),
        ]
        return Group(*parts)

    def _rates(self) -> Table:
        """Products by kernels and arithmetic, what runs use marked by a star."""
        choice = self.facts.kernels
        table = Table(box=None, pad_edge=False)
        table.add_column("products by")
        for stored in STORED:
            table.add_column(stored, justify="right")
        names = dict.fromkeys(name for stored in STORED for name in choice.rates[stored])
        for name in [*(n for n in names if n != TORCH), *(n for n in names if n == TORCH)]:
            cells = []
            for stored in STORED:
                rate = choice.rates[stored].get(name)
                way = choice.arithmetic.of(stored)
                used = name == (TORCH if way == TORCH else f"{choice.arithmetic.kernels}:{way}")
                cells.append("" if rate is None else f"{'* ' if used else ''}{rate:,.0f}")
            table.add_row("the math library (torch)" if name == TORCH else name, *cells)
        return table

    def _findings(self) -> Table:
        table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column(no_wrap=True)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for finding in self.findings:
            said = Text(finding.what)
            if finding.hint:
                said.append(f"\n{finding.hint}", style="dim")
            table.add_row(Text(finding.severity, style=_STYLES[finding.severity]), finding.topic, said)
        return table

    def _verdict(self) -> str:
        counts = dict.fromkeys(SEVERITIES, 0)
        for finding in self.findings:
            counts[finding.severity] += 1
        if counts["problem"]:
            return f"{_counted(counts['problem'], 'problem')}: training is not possible before that is solved"
        if counts["warning"]:
            return f"training works; {_counted(counts['warning'], 'warning')} above cost time or memory"
        return "training works, and nothing holds it back"


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")


def examine(model: str | None = None, output: str = "runs", say: Say = silent) -> Examination:
    """Look at this machine, and say what it means for training; see :func:`deltaw.reports.machine.gather`."""
    facts = gather(model, output, say=say)
    return Examination(facts, diagnose(facts))
