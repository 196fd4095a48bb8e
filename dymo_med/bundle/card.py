"""The model card of a bundle."""

from __future__ import annotations

from dymo_med.bundle.model import ModelBundle
from dymo_med.conformal import AS_THEY_CAME, COVERAGE, FEWEST
from dymo_med.references import References
from dymo_med.tasks import OverClasses
from dymo_med.types import DrawCheck, Interval, Use


def references_card(references: References, task: OverClasses) -> str:
    """Return what a model card says of references."""
    rows = "".join(f"| {name} | {loss:.3f} |\n" for name, loss in references.losses.items())
    key = task.error_name
    text = f"""
Plain references (no network; a few lines of scikit-learn on cells and measurements of scans),
trained on the same patients. {references.why}
"""
    if references.better:
        text += f"""
**Warning:** on held-back patients {", ".join(references.better)} answered better than the network,
beyond chance.
"""
    if not rows:
        return text
    return f"""{text}
| held-back patients ({references.patients}), as they are and with modalities hidden | {key} |
|---|---|
{rows}"""


def use_card(use: Use, task: OverClasses) -> str:
    """Return what a model card says of which modalities are used."""

    def number(one: float | None) -> str:
        return "-" if one is None else f"{one:.3f}"

    def shown(one: Interval) -> str:
        if one.value is None or one.low is None or one.high is None:
            return "-"
        return f"{one.value:.3f} ({one.low:.3f} to {one.high:.3f})"

    rows = "".join(
        f"| {r.part} | {r.patients} | {r.verdict} | {number(r.change)} | {shown(r.auroc_loss)} |"
        f" {shown(r.loss)} | {number(r.p)} | {shown(r.alone)} | {shown(r.reference)} |\n"
        for r in use.rows
    )
    key = task.error_name
    return f"""
Use audit: contents are exchanged between held-back patients who have the same modalities
({use.patients} patients, {use.permutations} permutations; 95 % intervals). Unused: answers change
by less than 0.02, and from it alone they are no better than chance. Reference: plain, on it alone.

| part | patients | verdict | change | AUROC lost | {key} added | p | AUROC alone | reference |
|---|---|---|---|---|---|---|---|---|
{rows}"""


def draws_card(check: DrawCheck) -> str:
    """Return what a model card says of draws of recoveries."""
    rows = "".join(
        f"| {r.check} | {r.part} | {r.patients} |"
        + (
            " - | "
            if r.value.value is None
            else f" {r.value.value:.3f} ({r.value.low:.3f} to {r.value.high:.3f}) | "
        )
        + f"{'**fails**' if r.failing else 'passes' if r.value.value is not None else '-'} |\n"
        for r in check.rows
    )
    return f"""
Draws of recoveries ({check.draws} each) on held-back patients with modalities hidden. Coverage: how
much of what was hidden lies in the central 90 % of its draws (0.9 is right). Martingale: by how
much the mean answer over draws differs from that without (0 if network and imputer are right).

| check | of | patients | value | |
|---|---|---|---|---|
{rows}"""


def _rests_on(bundle: ModelBundle) -> str:
    """Return on how many patients sets and limits rest, as a sentence."""
    bounds = {} if bundle.conformal is None else bundle.conformal.scores.get(bundle.choice.name, {})
    n = bounds[AS_THEY_CAME].patients if AS_THEY_CAME in bounds else 0
    sets = f"Prediction sets ({COVERAGE:.0%}) rest on {n} other patients"
    if n < FEWEST:
        sets += f", fewer than the {FEWEST} that could rule a class out"
    if bundle.calibration.patients is None:
        return f"{sets}."
    classes = len(bundle.task.classes)
    most = (bundle.calibration.patients + 1) / (bundle.calibration.patients + classes)
    return f"{sets}; no probability is stated above {most:.3f}, which is what so many support."


def model_card(bundle: ModelBundle) -> str:
    """Return the model card as Markdown."""
    p = bundle.provenance
    counts = "\n".join(
        f"| {split} | {p['records'][split]} | {p['labelled_records'][split]} |"
        f" {len(p['patients'][split])} |"
        for split in p["records"]
    )
    modalities = "\n".join(
        f"| {s.name} | {s.kind} | {' x '.join(map(str, s.shape))} |"
        f" {p['observed_share'][s.name]:.0%} |"
        for s in bundle.specs
    )
    rates = ", ".join(
        f"{c} {r:.1%}" for c, r in zip(bundle.task.classes, bundle.base_rates, strict=True)
    )
    judged = bundle.task.error_short, bundle.task.error_key
    selectors = "\n".join(
        f"| {name} | {r[judged[1]]:.3f} | {r['accuracy']:.1%} | {r['spoilt']:.1%} |"
        f" {r['rescued']:.1%} |"
        for name, r in bundle.choice.results.items()
    )
    predicts = bundle.task.predicts
    references = (
        "" if bundle.references is None else references_card(bundle.references, bundle.task)
    )
    references += "" if bundle.use is None else use_card(bundle.use, bundle.task)
    references += "" if bundle.draw_check is None else draws_card(bundle.draw_check)
    comparators = "".join(
        f"| {name} | {c.validation[judged[1]]:.3f} | {c.temperature:.3f} |\n"
        for name, c in bundle.comparators.items()
    )
    if comparators:
        comparators = f"""
Comparators, trained like the backbone and no part of this bundle's answers; {judged[0]} on the
validation split over subsets of modalities, before calibration:

| comparator | {judged[0]} | temperature |
|---|---|---|
{comparators}"""
    return f"""# {bundle.name}

{bundle.description}

Decision support for research. Not a medical device, not for diagnosis.

- Predicts `{bundle.task.target}`: {predicts}.
- Trained on cohort `{p["cohort"]}`; class shares among training patients: {rates}.
- Imputer `{bundle.imputer_entry["name"]}`, backbone `{bundle.backbone_entry["name"]}`, temperature
  {bundle.calibration.temperature:.3f}, fitted on {bundle.calibration.fitted_on} patients.
- {_rests_on(bundle)}
- Default selector: `{bundle.choice.name}`. {bundle.choice.why}

| split | records | labelled | patients |
|---|---|---|---|
{counts}

| modality | kind | shape | observed in training |
|---|---|---|---|
{modalities}

Selectors on {bundle.choice.patients} patients who were not trained on (modalities hidden at random,
each selector fitted on other patients than it is scored on; spoilt and put right: against
measurements alone):

| selector | {judged[0]} | accuracy | spoilt | put right |
|---|---|---|---|---|
{selectors}
{references}{comparators}
The test split was not read while this bundle was made. Run `dymo-med evaluate` for its
performance, and on your own patients before you rely on it.

Limits: answers assume patients, scanners and protocols like those of the training cohort.
Recovered scans and values are guesses by a model; the report marks every one of them.
"""
