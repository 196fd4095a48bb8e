"""Whether a bundle can be evaluated on a cohort, and on which of its records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from dymo_med.bundle import ModelBundle, hashed_id
from dymo_med.bundle_segmentation import SegmentationBundle
from dymo_med.data.missingness import Scenario, expanded, hidden_share, parse_scenario
from dymo_med.errors import BundleError, ConfigError, Problem
from dymo_med.registry import nearest
from dymo_med.types import SPLITS, Cohort, CohortRecord, ModalitySpec, Split, Task

_ANOTHER = "Choose a bundle that was trained for this cohort, or correct cohort.yaml"


def known_split(name: str) -> Split:
    """Return a split's name once it is known to be one.

    Raises:
        ConfigError: If it is not.
    """
    for known in SPLITS:
        if name == known:
            return known
    raise ConfigError(
        Problem(
            "--split",
            f"there is no split '{name}'",
            expected=" or ".join(SPLITS),
            remedy=nearest(name, list(SPLITS)),
        )
    )


def scenarios_of(
    scenarios: Sequence[str], specs: Sequence[ModalitySpec], cohort: Cohort
) -> tuple[Scenario, ...]:
    """Return the scenarios, each once.

    Raises:
        ConfigError: If one is unknown, or replays would mix or hide nothing.
    """
    texts = expanded(scenarios, specs)
    rules = tuple(dict.fromkeys(parse_scenario(text, specs) for text in texts))
    ids = {record.record_id for record in cohort.records}
    problems = []
    for rule in rules:
        where = f"scenario '{rule.text}'"
        if sum(other.text == rule.text for other in rules) > 1:
            problems.append(
                Problem(
                    where,
                    "two different files hide under this name",
                    expected="one file per scenario",
                    remedy="Replay one",
                )
            )
        if rule.kind == "replay" and not ids & set(rule.taken):
            problems.append(
                Problem(
                    where,
                    f"it names no record of cohort {cohort.name}",
                    expected="record ids of this cohort",
                    remedy="Replay what was hidden from this cohort",
                )
            )
    if problems:
        raise ConfigError(*problems)
    return rules


def scenario_notes(rules: Sequence[Scenario], modalities: int) -> tuple[str, ...]:
    """Return a sentence for every scenario that hides far from the share it is asked for.

    That of `rate`, which rounds, is told only where it hides nothing.

    Args:
        rules: Scenarios.
        modalities: M.
    """
    notes = []
    for rule in rules:
        share = hidden_share(rule, modalities)
        if share is None or abs(share - rule.share) < 0.0005:
            continue
        of = f"of a complete record's {modalities} modalities"
        if rule.kind != "rate":
            notes.append(f"{rule.text} hides {share:.3f} {of}: one always stays.")
        elif share == 0:
            notes.append(f"{rule.text} hides nothing {of}: it rounds. See mean-rate.")
    return tuple(notes)


def adopted(cohort: Cohort, task: Task) -> Cohort:
    """Return a cohort whose targets are as a bundle's task would have read them.

    Args:
        cohort: Whose task the bundle's accepts.
        task: The bundle's.
    """
    records = tuple(task.adopt(cohort.task, record) for record in cohort.records)
    return replace(cohort, records=records)


def labelled_records(cohort: Cohort, split: str) -> tuple[CohortRecord, ...]:
    """Return the records to evaluate.

    Raises:
        ConfigError: If there is none.
    """
    records = tuple(r for r in cohort.in_split(known_split(split)) if cohort.task.known(r))
    if not records:
        raise ConfigError(
            Problem(
                f"cohort {cohort.name}",
                f"split '{split}' has no record whose {cohort.task.target} is known",
                expected="a record to judge an answer by",
                remedy="Choose another split, add labels, or use dymo-med predict --cohort, which"
                " needs none",
            )
        )
    return records


def matched_specs(
    bundle: ModelBundle | SegmentationBundle, cohort: Cohort
) -> tuple[ModalitySpec, ...]:
    """Return the bundle's modalities, to be read from the cohort's files.

    What networks were trained on must be the same; how files are written, and where in them a
    modality is, is the cohort's own business.

    Raises:
        BundleError: If the cohort is about something else; every difference at once.
    """
    theirs = {spec.name: spec for spec in cohort.specs}
    where = f"bundle {bundle.name}, cohort {cohort.name}"
    problems = []
    differs = bundle.task.accepts(cohort.task)
    if differs is not None:
        what, expected, got = differs
        if cohort.task.type != bundle.task.type:
            remedy = "Give the cohort description whose task is the bundle's"
            raise BundleError(Problem(where, what, expected, got, remedy))
        problems.append(Problem(where, what, expected, got, _ANOTHER))
    for spec in bundle.specs:
        other = theirs.get(spec.name)
        if other is None:
            problems.append(
                Problem(
                    where,
                    f"the cohort does not describe modality '{spec.name}'",
                    expected="every modality of the bundle",
                    remedy=_ANOTHER,
                )
            )
        elif _form(other) != _form(spec):
            problems.append(
                Problem(
                    where,
                    f"modality '{spec.name}' is described differently",
                    expected=_form_text(spec),
                    got=_form_text(other),
                    remedy=_ANOTHER,
                )
            )
    if problems:
        raise BundleError(*problems)
    return tuple(_written_as(spec, theirs[spec.name]) for spec in bundle.specs)


def _written_as(spec: ModalitySpec, other: ModalitySpec) -> ModalitySpec:
    """Return a bundle's modality, to be read from files as a cohort says they are written.

    That is which file, series and columns are meant, how cells are written, where a volume's grid
    lies, and what is not plausible in a column.
    """
    columns = tuple(
        replace(own, rules=theirs.rules, range=theirs.range or own.range)
        for own, theirs in zip(spec.columns, other.columns, strict=True)
    )
    return replace(
        spec,
        file=other.file,
        rules=other.rules,
        columns=columns,
        dicom=other.dicom,
        grid=other.grid,
    )


def _form(spec: ModalitySpec) -> tuple[object, ...]:
    """Return what a network depends on."""
    columns = tuple((c.name, c.type, c.unit, c.values) for c in spec.columns)
    steps = spec.steps and (spec.steps.pooling, spec.steps.standardise)
    return spec.kind, spec.shape, spec.spacing_mm, spec.intensity, columns, steps


def _form_text(spec: ModalitySpec) -> str:
    shape = " x ".join(str(n) for n in spec.shape)
    columns = ", ".join(
        f"{c.name} {c.type}" + f" in {c.unit}" * bool(c.unit) + f" {'/'.join(c.values)}".rstrip()
        for c in spec.columns
    )
    detail = columns or f"spacing {spec.spacing_mm} mm, intensity {spec.intensity}"
    if spec.steps is not None:
        detail = f"pooling {spec.steps.pooling}, standardise {spec.steps.standardise}".lower()
    return f"{spec.kind} {shape} ({detail})"


def require_distinct(bundles: Sequence[ModelBundle]) -> None:
    """Refuse bundles that one cannot tell apart by name.

    Raises:
        ConfigError: If two have the same.
    """
    names = [bundle.name for bundle in bundles]
    same = sorted({name for name in names if names.count(name) > 1})
    if same:
        raise ConfigError(
            Problem(
                "--against",
                f"several bundles are called {', '.join(same)}",
                expected="bundles of different names",
                remedy="Give each recipe a name of its own, and train again",
            )
        )


def patients_seen(bundle: ModelBundle | SegmentationBundle, records: Sequence[CohortRecord]) -> int:
    """Return how many of the patients the bundle was fitted on."""
    fitted = {patient for ids in bundle.provenance.get("patients", {}).values() for patient in ids}
    return len({r.patient_id for r in records if hashed_id(bundle.name, r.patient_id) in fitted})


def require_unseen(seen: Mapping[str, int], cohort: Cohort, split: str) -> None:
    """Refuse figures about patients whom a bundle was fitted on.

    Args:
        seen: How many of the patients, by the bundle's name.
        cohort: The cohort.
        split: Of which the patients are.

    Raises:
        ConfigError: If there are any; every such bundle at once.
    """
    problems = [
        Problem(
            f"cohort {cohort.name}, split {split}",
            f"{number} of its patients were used to make bundle {name}",
            expected="patients whom the bundle has never seen",
            remedy="Choose another split, or add --allow-overlap to see flattering figures",
        )
        for name, number in seen.items()
        if number
    ]
    if problems:
        raise ConfigError(*problems)
