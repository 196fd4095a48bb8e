"""The page of a cohort on which survival was evaluated: order, calibration, and the bound."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dymo_med.files import write_text
from dymo_med.inference.page_parts import Row, estimate, estimates, report_link
from dymo_med.inference.report import environment, guarded, percent, words
from dymo_med.metrics import patient_weights
from dymo_med.survival import FollowUp, kaplan_meier
from dymo_med.survival.bound import COVERAGE
from dymo_med.types import Scores

_COLOURS = ("#1f5a82", "#6d7681", "#a9570c")
_SOFT = "#55616e"
_GROUPS = 3
# On fewer patients no curves are drawn.
_FEWEST = 12


def write_survival_page(
    out: Path,
    facts: Row,
    scores: Sequence[Scores],
    metrics: Sequence[Row],
    listed: Sequence[Row],
    failures: Sequence[Row],
    **_: Any,
) -> None:
    """Write `index.html` and `plots/survival.png` of a task of survival.

    Args:
        out: Folder of the evaluation; reports in it are linked.
        facts: What `run.json` says.
        scores: Every scenario, in order.
        metrics: Rows of `metrics.csv`.
        listed: Rows of `predictions.csv` of the first scenario.
        failures: Rows of `failures.csv`.
        **_: What the page of a classification shows besides; of survival it is in tables only.
    """
    (out / "plots").mkdir(exist_ok=True)
    picture = out / "plots" / "survival.png"
    picture.unlink(missing_ok=True)
    some = [s for s in scores if s.patients >= _FEWEST]
    if some:
        _plot(picture, facts, some[0])
    page = environment().get_template("survival.html.j2")
    shown = _view(out, facts, metrics, listed, failures)
    write_text(out / "index.html", guarded(page.render(shown, drawn=bool(some))))


def _view(
    out: Path,
    facts: Row,
    metrics: Sequence[Row],
    listed: Sequence[Row],
    failures: Sequence[Row],
) -> dict[str, Any]:
    """Return what the template needs."""
    text, own, methods = words()["survival"], facts["selector"], facts["methods"]
    found = {(r["scenario"], r["method"], r["metric"]): r for r in metrics}
    scenarios = [s for s in facts["scenarios"] if (s, own, "concordance") in found]
    others = [m for m in methods if f"{own} - {m}" in {r["method"] for r in metrics}]
    names = dict.fromkeys(r["metric"] for r in metrics if r["method"] == own)
    shown = [m for m in names if m in text["names"] or m.rpartition("_")[0] in text["at"]]
    horizons = facts["follow_up"]["horizons"]
    return {
        "f": facts,
        "unit": facts["follow_up"]["unit"],
        "horizons": [f"{h:g}" for h in horizons],
        "methods": methods,
        "others": others,
        "coverage": percent(COVERAGE),
        "concordance": estimates(found, scenarios, methods, "concordance"),
        "differences": estimates(
            found, scenarios, [f"{own} - {m}" for m in others], "integrated_brier"
        ),
        "bounds": [
            (s, estimate(found[s, own, "bound_coverage"], 100), estimate(found[s, own, "bound"]))
            for s in scenarios
            if (s, own, "bound_coverage") in found
        ],
        "heads": [_head(text, m) for m in shown],
        "metrics": [
            (s, m, [estimate(found.get((s, m, metric))) for metric in shown])
            for s in scenarios
            for m in methods
            if (s, m, "concordance") in found
        ],
        "records": [
            {
                "id": row["record_id"],
                "link": report_link(out, row["record_id"]),
                "time": f"{row['time']:.3g}",
                "event": text["happened" if row["event"] else "censored"],
                "risks": [percent(row[f"risk_{h:g}"]) for h in horizons],
                "bound": "" if row["bound"] is None else f"{row['bound']:.3g}",
            }
            for row in listed
            if row["method"] == own
        ],
        "failures": failures,
    }


def _head(text: Mapping[str, Any], metric: str) -> str:
    """Return a metric's name for people."""
    name, _, horizon = metric.rpartition("_")
    if name in text["at"]:
        return str(text["at"][name].format(horizon=horizon))
    return str(text["names"][metric])


def _plot(path: Path, facts: Row, scores: Scores) -> None:
    """Draw predicted and observed survival of thirds of patients, and calibration at horizons."""
    from matplotlib.figure import Figure

    text, follow_up = words()["survival"], FollowUp.from_dict(facts["follow_up"])
    bins, horizons = follow_up.bins, follow_up.horizons
    p = torch.from_numpy(scores.probabilities[facts["selector"]])
    weights = patient_weights(scores.patient_ids)
    times, events = scores.known["time"], scores.known["event"] > 0
    order = bins.restricted_mean(p).numpy().argsort(kind="stable").argsort(kind="stable")
    third = order * _GROUPS // len(order)
    figure = Figure(figsize=(8.4, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    grid = np.linspace(0, bins.last, 200)
    for k, colour in enumerate(_COLOURS):
        who = third == _GROUPS - 1 - k
        seen = kaplan_meier(times[who], events[who], weights[who])
        left.step(grid, seen(grid), where="post", color=colour, lw=1.6, label=text["groups"][k])
        curve = bins.survival(p[torch.from_numpy(who)], grid.tolist()).numpy()
        left.plot(grid, np.average(curve, 0, weights[who]), color=colour, lw=1.2, ls="--")
    left.set(xlabel=text["axis"].format(unit=bins.unit), ylabel=text["alive"], ylim=(0, 1.02))
    left.set_xlim(0, bins.last)
    left.legend(frameon=False, fontsize=8)
    right.plot((0, 1), (0, 1), color="#b8c0c8", lw=1)
    for horizon, colour in zip(horizons, _COLOURS * len(horizons), strict=False):
        risk = 1 - bins.survival(p, [horizon]).numpy()[:, 0]
        part = risk.argsort(kind="stable").argsort(kind="stable") * 4 // len(risk)
        points = []
        for q in range(4):
            who = part == q
            share = 1 - float(kaplan_meier(times[who], events[who], weights[who])(horizon))
            points.append((np.average(risk[who], weights=weights[who]), share))
        x, y = zip(*points, strict=True)
        label = text["horizon"].format(horizon=f"{horizon:g}", unit=bins.unit)
        right.plot(x, y, "o-", color=colour, ms=4, lw=1, label=label)
    right.set(xlabel=text["predicted"], ylabel=text["observed"], xlim=(0, 1), ylim=(0, 1))
    right.legend(frameon=False, fontsize=8)
    for axes in (left, right):
        axes.tick_params(labelsize=8, colors=_SOFT)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    figure.savefig(path, dpi=130, metadata={"Software": None})
