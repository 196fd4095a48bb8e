"""How good a bundle is, and what its answers rest on, over many patients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Interval:
    """A figure with its 95 % interval; None where it is not defined (a class did not occur)."""

    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class PerformanceRow:
    """How good a selector was on held-back patients who had about as much as somebody has.

    Attributes:
        method: The selector.
        level: `pattern`: patients looked at with these modalities and no others; `count`: with as
            many of them; `all`: as they came.
        group: The observed modalities joined by `+`, their number, or nothing.
        patients: How many patients these cases are of.
        cases: How many cases; of `count` a patient is several, with other modalities hidden.
        auroc: Area under the ROC curve.
        brier: Brier score.
        ece: Expected calibration error.
    """

    method: str
    level: Literal["pattern", "count", "all"]
    group: str
    patients: int
    cases: int
    auroc: Interval
    brier: Interval
    ece: Interval


@dataclass(frozen=True)
class Performance:
    """How good a bundle is, by what patients have (`training.performance`).

    Attributes:
        rows: Of the default selector and of `observed_only`; patterns and counts of at least
            `fewest` patients, and all.
        patients: Held-back patients by pattern, few as they may be.
        fewest: On fewer patients no figure is given.
    """

    rows: tuple[PerformanceRow, ...]
    patients: Mapping[str, int]
    fewest: int

    def row(self, method: str, pattern: str) -> PerformanceRow | None:
        """Return the figures that come closest to a patient; None for a selector without any.

        Args:
            method: A selector.
            pattern: The patient's observed modalities joined by `+`, in canonical order.
        """
        known = {(r.level, r.group): r for r in self.rows if r.method == method}
        count = str(len([name for name in pattern.split("+") if name]))
        for key in (("pattern", pattern), ("count", count), ("all", "")):
            if key in known:
                return known[key]
        return None


@dataclass(frozen=True)
class UseRow:
    """What happens when a modality's content is exchanged between patients of the same pattern.

    Attributes:
        part: A modality, or a group of them.
        patients: Held-back patients who could exchange it.
        change: Mean change of probability (half the sum over classes); None for too few patients.
            Likewise `p`.
        auroc_loss: How much AUROC is lost; not defined for a regression.
        loss: How much log-loss is added; of a regression, mean absolute error.
        p: Of the permutation test that the content does not matter to `loss`, one-sided.
        alone: AUROC of the bundle's answers from it alone.
        reference: AUROC of a plain reference from it alone.
    """

    part: str
    patients: int
    change: float | None
    auroc_loss: Interval
    loss: Interval
    p: float | None
    alone: Interval
    reference: Interval

    @property
    def verdict(self) -> Literal["used", "unused", "unproven", "untested"]:
        """Whether answers rest on its content.

        `unused`: they change by less than 0.02, and from it alone they are no better than chance.
        `used`: without it they are worse beyond chance (p at most 0.05). `unproven`: neither.
        """
        if self.change is None or self.p is None:
            return "untested"
        tells = self.alone.low is not None and self.alone.low > 0.5
        if self.change < 0.02 and not tells:
            return "unused"
        return "used" if self.p <= 0.05 else "unproven"

    @property
    def neglected(self) -> bool:
        """Whether a plain reference finds in it what the bundle does not."""
        tells = self.reference.low is not None and self.reference.low > 0.5
        known = self.alone.low is not None and self.alone.low > 0.5
        return self.verdict in ("unused", "unproven") and tells and not known


@dataclass(frozen=True)
class Use:
    """Which modalities a bundle uses (`training.use`).

    Attributes:
        rows: Modalities in canonical order, then groups of them.
        patients: Held-back patients.
        permutations: How often contents were exchanged.
    """

    rows: tuple[UseRow, ...]
    patients: int
    permutations: int

    def of(self, part: str) -> UseRow | None:
        """Return the row of a modality or group."""
        return next((row for row in self.rows if row.part == part), None)


@dataclass(frozen=True)
class DrawRow:
    """Whether draws of recoveries are what they claim, in one respect (`training.draw_checks`).

    Attributes:
        check: `coverage`: how much of what was hidden lies in the central 90 % of its draws.
            `martingale`: by how much the mean answer over draws, of the last class, differs from
            the answer without recoveries. It should not, if network and imputer are right.
        part: A modality; of a martingale, a group of patterns.
        patients: On whom.
        value: With its 95 % interval over patients.
    """

    check: Literal["coverage", "martingale"]
    part: str
    patients: int
    value: Interval

    @property
    def failing(self) -> bool:
        """Whether it is clearly amiss: coverage below 80 %, or answers that drift by over 2 %."""
        if self.value.value is None or self.value.low is None or self.value.high is None:
            return False
        if self.check == "coverage":
            return self.value.high < 0.8
        return abs(self.value.value) > 0.02 and not self.value.low <= 0 <= self.value.high


@dataclass(frozen=True)
class DrawCheck:
    """Whether an imputer's draws are what they claim.

    Attributes:
        rows: Coverage of modalities in canonical order, then groups of patterns.
        draws: How many there were for each patient.
    """

    rows: tuple[DrawRow, ...]
    draws: int

    @property
    def failing(self) -> tuple[DrawRow, ...]:
        """What is clearly amiss."""
        return tuple(row for row in self.rows if row.failing)
