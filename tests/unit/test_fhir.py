import json
import shutil

import pytest

from dymo_med.errors import PatientDataError
from dymo_med.modalities import fhir_record, modality, table_files
from dymo_med.modalities.table import Table, TableEntry

COLUMNS = {
    "sex": {
        "type": "categorical",
        "values": ["F", "M"],
        "aliases": {"F": ["female"], "M": ["male"]},
        "fhir": "gender",
    },
    "age": {"type": "date", "fhir": "birthDate", "until": "effective", "range": [0, 120]},
    "glucose": {
        "type": "continuous",
        "unit": "mg/dL",
        "units": ["mmol/L"],
        "molar_mass": "glucose",
        "range": [20, 600],
        "loinc": ["2345-7", "15074-8"],
    },
    "systolic": {"type": "continuous", "unit": "mmHg", "range": [40, 300], "loinc": "8480-6"},
    "smoker": {
        "type": "categorical",
        "values": ["no", "yes"],
        "aliases": {"no": ["266919005"], "yes": ["77176002"]},
        "loinc": "72166-2",
    },
}
SECRET = "Mustermann-4711"


def table(statuses=(), **keys):
    columns = {**COLUMNS, "glucose": {**COLUMNS["glucose"], **keys}}
    entry = {"kind": "table", "format": "fhir", "file": "fhir.json", "columns": columns}
    entry["statuses"] = list(statuses)
    return modality(Table.spec_from_entry("ehr", TableEntry.model_validate(entry)))


PATIENT = {
    "resourceType": "Patient",
    "id": SECRET,
    "identifier": [{"system": "urn:mrn", "value": SECRET}],
    "name": [{"family": SECRET}],
    "gender": "female",
    "birthDate": "1960-02-29",
}


def observation(code="2345-7", value=100.0, unit="mg/dL", when="2024-02-29", **change):
    made = {
        "resourceType": "Observation",
        "id": "o1",
        "status": "final",
        "code": {"coding": [{"system": "http://loinc.org", "code": code}]},
        "subject": {"reference": f"Patient/{SECRET}"},
        "effectiveDateTime": when,
        "valueQuantity": {"value": value, "system": "http://unitsofmeasure.org", "code": unit},
    }
    made.update(change)
    return {key: value for key, value in made.items() if value is not None}


def bundle(*observations, patient=PATIENT):
    url = f"http://h/fhir/Patient/{SECRET}"
    entries = [{"fullUrl": url, "resource": patient}] if patient else []
    entries += [{"resource": {"id": f"o{i}", **o}} for i, o in enumerate(observations)]
    return {"resourceType": "Bundle", "type": "collection", "entry": entries}


def read(kind, folder, content, name="fhir.json"):
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    value = kind.read(folder, "Patient p1")
    if value is None:
        return None
    filled = value.observed_fields.tolist()
    names = [column.name for column in kind.spec.columns]
    return {n: v for n, v, f in zip(names, value.values.tolist(), filled, strict=True) if f}


def quantity(value, unit="mg/dL", **more):
    return {"value": value, "system": "http://unitsofmeasure.org", "code": unit, **more}


def different(number, **change):
    """One of several observations, told apart by id."""
    return {**observation(**change), "id": f"o{number}"}


TWO = (
    different(1, value=100, when="2024-01-01T08:00:00+01:00"),
    different(2, value=200, when="2024-01-01T09:00:00+01:00"),
)
PRESSURE = observation(
    "85354-9",
    valueQuantity=None,
    component=[
        {
            "code": {"coding": [{"system": "http://loinc.org", "code": "8480-6"}]},
            "valueQuantity": quantity(120, "mm[Hg]"),
        }
    ],
)
SMOKER = observation(
    "72166-2",
    valueQuantity=None,
    valueCodeableConcept={"coding": [{"system": "http://snomed.info/sct", "code": "77176002"}]},
)


def page(*resources, total=None, link=None, own="?page=1"):
    """A page of a search."""
    made = {"resourceType": "Bundle", "type": "searchset", "total": total}
    links = {"self": own, "next": link}
    made["link"] = [{"relation": k, "url": f"http://h/fhir{v}"} for k, v in links.items() if v]
    made["entry"] = [{"resource": resource} for resource in resources]
    return {key: value for key, value in made.items() if value is not None}


def absent(system, code):
    return {**SMOKER, "valueCodeableConcept": {"coding": [{"system": system, "code": code}]}}


MODIFIED = {"modifierExtension": [{"url": "urn:x", "valueBoolean": True}]}
SUBJECT = {"reference": f"Patient/{SECRET}"}

# Case: observations, what is read beside the patient's sex, options of the table.
GOOD = {
    "quantity": ([observation()], {"age": 64, "glucose": 100}, {}),
    "other unit": ([observation(value=5, unit="mmol/L")], {"age": 64, "glucose": 90.078}, {}),
    "other code": ([observation("15074-8")], {"age": 64, "glucose": 100}, {}),
    "unit in words only": (
        [observation(valueQuantity={"value": 100, "unit": "mg/dL"})],
        {"age": 64, "glucose": 100},
        {},
    ),
    "component": ([PRESSURE], {"age": 64, "systolic": 120}, {}),
    "code": ([SMOKER], {"age": 64, "smoker": 1}, {}),
    "text": (
        [observation("72166-2", valueQuantity=None, valueString="no")],
        {"age": 64, "smoker": 0},
        {},
    ),
    "nothing measured": ([], {}, {}),
    "another code system": (
        [
            observation(code="2345-7", valueQuantity=None)
            | {"code": {"coding": [{"code": "2345-7"}]}}
        ],
        {},
        {},
    ),
    "entered in error": ([observation(status="entered-in-error")], {}, {}),
    "reason for absence": (
        [observation(valueQuantity=None, dataAbsentReason={"text": "not done"})],
        {},
        {},
    ),
    "preliminary, declared": (
        [observation(status="preliminary")],
        {"age": 64, "glucose": 100},
        {"statuses": ["final", "preliminary"]},
    ),
    "preliminary, declared to be left out": (
        [observation(status="preliminary")],
        {},
        {"statuses": ["final"]},
    ),
    "same value twice": (
        [different(1), different(2, value=100.0, when="2024-02-28")],
        {"age": 64, "glucose": 100},
        {},
    ),
    "same value in two units": (
        [different(1, value=90.078), different(2, value=5, unit="mmol/L")],
        {"age": 64, "glucose": 90.078},
        {},
    ),
    "latest": (TWO, {"age": 63.8385, "glucose": 200}, {"pick": "latest"}),
    "earliest": (TWO, {"age": 63.8385, "glucose": 100}, {"pick": "earliest"}),
    "latest that says something": (
        [*TWO, different(3, valueQuantity=None, when="2024-05-01")],
        {"age": 63.8385, "glucose": 200},
        {"pick": "latest"},
    ),
    "limit": (
        [observation(valueQuantity=quantity(30, comparator="<"))],
        {"age": 64, "glucose": 30},
        {"censored": "limit"},
    ),
    "limit is blank": (
        [observation(valueQuantity=quantity(30, comparator="<"))],
        {"age": 64},
        {"censored": "missing"},
    ),
    "period": (
        [observation(when=None, effectivePeriod={"start": "2024-02-29", "end": "2024-03-02"})],
        {"age": 64, "glucose": 100},
        {},
    ),
    "end of a period": (
        [observation(when=None, effectivePeriod={"end": "2024-02-29"})],
        {"age": 64, "glucose": 100},
        {},
    ),
    "instant": (
        [observation(when=None, effectiveInstant="2024-02-29T08:15:00.5Z")],
        {"age": 64, "glucose": 100},
        {},
    ),
    "leap second": (
        [observation(when="2024-02-29T23:59:60Z")],
        {"age": 64, "glucose": 100},
        {},
    ),
    "events": (
        [observation(when=None, effectiveTiming={"event": ["2024-03-02", "2024-02-29T07:00:00Z"]})],
        {"age": 64, "glucose": 100},
        {},
    ),
    "events within a period": (
        [
            observation(
                when=None,
                effectiveTiming={"repeat": {"boundsPeriod": {"start": "2024-02-29"}}},
            )
        ],
        {"age": 64, "glucose": 100},
        {},
    ),
    "timing without a time": (
        [observation(when=None, effectiveTiming={"repeat": {"frequency": 2}})],
        {"glucose": 100},
        {},
    ),
    "month": ([observation(when="2024-02")], {"age": 63.9617, "glucose": 100}, {}),
    "year": ([observation(when="2024")], {"age": 64.3381, "glucose": 100}, {}),
    "month before a day": (
        [different(1, when="2024-01"), different(2, value=200, when="2024-02-29")],
        {"age": 64, "glucose": 200},
        {"pick": "latest"},
    ),
    "no value, of R4": (
        [absent("http://terminology.hl7.org/CodeSystem/data-absent-reason", "unknown")],
        {},
        {},
    ),
    "no value, of HL7 version 3": (
        [absent("http://terminology.hl7.org/CodeSystem/v3-NullFlavor", "ASKU")],
        {},
        {},
    ),
    "no value, beside another code": (
        [
            {
                **SMOKER,
                "valueCodeableConcept": {
                    "coding": [
                        {"system": "http://snomed.info/sct", "code": "261665006"},
                        {"system": "http://hl7.org/fhir/data-absent-reason", "code": "unknown"},
                    ]
                },
            }
        ],
        {},
        {},
    ),
    "about the fetus": (
        [observation(focus=[{"display": "fetus"}]), different(2)],
        {"age": 64, "glucose": 100},
        {},
    ),
    "about a thing": (
        [observation(value=300, focus=[{"reference": "Device/1"}]), different(2)],
        {"age": 64, "glucose": 100},
        {},
    ),
    "about the fetus, by a code": (
        [
            observation(
                value=300,
                extension=[
                    {"url": "http://hl7.org/fhir/StructureDefinition/observation-focusCode"}
                ],
            ),
            different(2),
        ],
        {"age": 64, "glucose": 100},
        {},
    ),
    "about the patient, twice said": (
        [observation(focus=[SUBJECT])],
        {"age": 64, "glucose": 100},
        {},
    ),
    "modified": (
        [observation(value=300, **MODIFIED), different(2)],
        {"age": 64, "glucose": 100},
        {},
    ),
    "modified value": (
        [observation(valueQuantity={**quantity(300), **MODIFIED}), different(2)],
        {"age": 64, "glucose": 100},
        {},
    ),
    "modified component": (
        [
            {**PRESSURE, "component": [{**PRESSURE["component"][0], **MODIFIED}]},
            different(2),
        ],
        {"age": 64, "glucose": 100},
        {},
    ),
    "rules of its own": (
        [observation(value=300, implicitRules="urn:rules"), different(2)],
        {"age": 64, "glucose": 100},
        {},
    ),
    "withdrawn": (
        [different(1, value=300), different(1, value=300, status="entered-in-error"), different(2)],
        {"age": 64, "glucose": 100},
        {},
    ),
    "withdrawn before": (
        [different(1, value=300, status="entered-in-error"), different(1, value=300), different(2)],
        {"age": 64, "glucose": 100},
        {},
    ),
    "withdrawn without its code": (
        [
            different(1, value=300),
            {"resourceType": "Observation", "id": "o1", "status": "entered-in-error"},
            different(2),
        ],
        {"age": 64, "glucose": 100},
        {},
    ),
    "corrected": (
        [different(1, value=300), different(1, value=100, status="corrected")],
        {"age": 64, "glucose": 100},
        {},
    ),
    "newer version": (
        [
            different(1, meta={"versionId": "10"}),
            different(1, value=300, meta={"versionId": "9"}),
        ],
        {"age": 64, "glucose": 100},
        {},
    ),
    "newer version by its time": (
        [
            different(1, value=300, meta={"lastUpdated": "2024-01-01T00:00:00Z"}),
            different(1, meta={"lastUpdated": "2024-01-01T00:30:00+00:00"}),
        ],
        {"age": 64, "glucose": 100},
        {},
    ),
    "by identifier": (
        [observation(subject={"identifier": {"system": "urn:mrn", "value": SECRET}})],
        {"age": 64, "glucose": 100},
        {},
    ),
    "by identifier without system": (
        [observation(subject={"identifier": {"value": SECRET}})],
        {"age": 64, "glucose": 100},
        {},
    ),
    "by a search": (
        [observation(subject={"reference": f"Patient?identifier=urn:mrn|{SECRET}"})],
        {"age": 64, "glucose": 100},
        {},
    ),
    "http for https": (
        [observation(subject={"reference": f"https://h/fhir/Patient/{SECRET}"})],
        {"age": 64, "glucose": 100},
        {},
    ),
    "without date": ([observation(when=None)], {"glucose": 100}, {}),
    "absolute reference": (
        [observation(subject={"reference": f"http://h/fhir/Patient/{SECRET}/_history/2"})],
        {"age": 64, "glucose": 100},
        {},
    ),
}


@pytest.mark.parametrize("name", GOOD)
def test_observations_become_cells(tmp_path, name):
    observations, expected, options = GOOD[name]
    got = read(table(**options), tmp_path, bundle(*observations))
    assert got == pytest.approx({"sex": 0, **expected}, abs=1e-3)


# Case: birth date, columns' `partial`, age on 29 February 2024.
BORN = {
    "day": ("1960-02-29", {}, 64),
    "month": ("1960-02", {}, 64.0383),
    "year": ("1960", {}, 63.6619),
    "this year": ("2024", {}, 0.0808),
    "month, blank on request": ("1960-02", {"partial": "missing"}, None),
    "year, blank on request": ("1960", {"partial": "missing"}, None),
    "day, blank on request": ("1960-02-29", {"partial": "missing"}, 64),
    "a format that is for text": ("1960-02-29", {"format": "%d.%m.%Y"}, 64),
    "a format of years": ("1960", {"format": "%Y"}, 63.6619),
}


@pytest.mark.parametrize("name", BORN)
def test_dates_count_to_the_precision_they_have(tmp_path, name):
    born, keys, age = BORN[name]
    columns = {**COLUMNS, "age": {**COLUMNS["age"], **keys}}
    entry = {"kind": "table", "format": "fhir", "file": "fhir.json", "columns": columns}
    kind = modality(Table.spec_from_entry("ehr", TableEntry.model_validate(entry)))
    got = read(kind, tmp_path, bundle(observation(), patient={**PATIENT, "birthDate": born}))
    assert got == pytest.approx(
        {"sex": 0, "glucose": 100, **({} if age is None else {"age": age})}, abs=1e-3
    )
    warnings = kind.read(tmp_path, "Patient p1").warnings
    assert bool(warnings) == (len(born) < 10)


# Case: what is left out and said in a warning.
SAID = {
    "focus": (observation(focus=[{"display": SECRET}]), "glucose: values are left out"),
    "modifier": (observation(**MODIFIED), "modifierExtension"),
    "rules": (observation(implicitRules="urn:rules"), "implicitRules"),
}


@pytest.mark.parametrize("name", SAID)
def test_what_is_left_out_is_said(tmp_path, name):
    content, words = SAID[name]
    (tmp_path / "fhir.json").write_text(json.dumps(bundle(content)))
    value = table().read(tmp_path, "Patient p1")
    assert any(words in warning for warning in value.warnings)
    assert SECRET not in repr(value.warnings)


def test_a_modified_patient_or_entry_is_not_used(tmp_path):
    patient = {**PATIENT, **MODIFIED}
    assert read(table(), tmp_path, bundle(observation(), patient=patient)) == {"glucose": 100}
    content = bundle(observation(value=300), different(2))
    content["entry"][1].update(MODIFIED)
    got = read(table(), tmp_path, content)
    assert got["glucose"] == 100


OLD = {**PATIENT, "id": "old", "identifier": [], "birthDate": "1970-01-01"}
BY = {"link": [{"type": "replaced-by", "other": {"reference": f"Patient/{SECRET}"}}]}
OF_OLD = different(2, subject={"reference": "Patient/old"})
# Case: a record in which two Patients are one person.
MERGED = {
    "both there": [PATIENT, {**OLD, **BY}, observation(), OF_OLD],
    "the old one first": [{**OLD, **BY}, PATIENT, OF_OLD],
    "the new one names the old": [
        {**PATIENT, "link": [{"type": "replaces", "other": {"reference": "Patient/old"}}]},
        OF_OLD,
    ],
    "by identifier": [
        PATIENT,
        {
            **OLD,
            "link": [
                {
                    "type": "replaced-by",
                    "other": {"identifier": {"system": "urn:mrn", "value": SECRET}},
                }
            ],
        },
        OF_OLD,
    ],
}


@pytest.mark.parametrize("name", MERGED)
def test_a_patient_who_was_replaced_is_followed(tmp_path, name):
    expected = {"sex": 0, "age": 64, "glucose": 100}
    assert read(table(), tmp_path, MERGED[name]) == pytest.approx(expected)


def test_all_pages_are_the_record(tmp_path):
    pages = [
        page(PATIENT, different(1), total=4, link="?page=2"),
        page(PRESSURE | {"id": "o3"}, SMOKER | {"id": "o4"}, total=4, own="?_getpages=x"),
    ]
    expected = {"sex": 0, "age": 64, "glucose": 100, "systolic": 120, "smoker": 1}
    assert read(table(), tmp_path, pages) == pytest.approx(expected)
    for number in (0, 1):  # a server that does not count
        del pages[number]["total"]
    with pytest.raises(PatientDataError, match="pages are missing"):
        read(table(), tmp_path, pages)
    pages[1]["link"][0]["url"] = "http://h/fhir?page=2"
    assert read(table(), tmp_path, pages) == pytest.approx(expected)


def test_what_was_deleted_is_no_data(tmp_path):
    content = bundle(different(1, value=300), different(2))
    content["entry"].append({"request": {"method": "DELETE", "url": "Observation/o1"}})
    assert read(table(), tmp_path, content)["glucose"] == 100


def test_tables_of_one_record_parse_it_once(tmp_path, monkeypatch):
    (tmp_path / "fhir.json").write_text(json.dumps(bundle(observation())))
    parsed = []
    monkeypatch.setattr(
        fhir_record, "load_json", lambda *of: parsed.append(1) or table_files.load_json(*of)
    )
    for _ in range(3):
        table().read(tmp_path, "Patient p1")
    assert len(parsed) == 1
    read(table(), tmp_path, bundle(observation(value=1000 / 9)))  # changed, read again
    assert len(parsed) == 2


OTHER = {**PATIENT, "id": "other", "identifier": [{"value": "other"}]}
# Case: content, words of the message, options of the table.
BAD = {
    "several differ": (bundle(*TWO), "pick: latest", {}),
    "several of one instant": (
        bundle(different(1), different(2, value=200)),
        "of the same time differ",
        {"pick": "latest"},
    ),
    "day against hour": (
        bundle(different(1, when="2024-01-01"), TWO[1]),
        "of the same time differ",
        {"pick": "latest"},
    ),
    "several without time": (
        bundle(different(1, when=None), TWO[1]),
        "has no time",
        {"pick": "latest"},
    ),
    "time that is none": (bundle(observation(when="2024-13-01")), "time is none", {}),
    "timing that is none": (
        bundle(observation(when=None, effectiveTiming={"event": ["soon"]})),
        "time is none",
        {},
    ),
    "month against a day in it": (
        bundle(different(1, when="2024-01"), different(2, value=200, when="2024-01-31")),
        "of the same time differ",
        {"pick": "latest"},
    ),
    "preliminary": (bundle(observation(status="preliminary")), "statuses: [final", {}),
    "no status": (bundle(observation(status=None)), "not what FHIR", {}),
    "limit": (
        bundle(observation(valueQuantity=quantity(30, comparator="<"))),
        "censored: limit",
        {},
    ),
    "unit": (bundle(observation(unit="mg/L")), "unit that is not declared", {}),
    "no unit": (bundle(observation(valueQuantity={"value": 100})), "not declared", {}),
    "out of range": (bundle(observation(value=5)), "mmol/L: check the unit", {}),
    "unknown code": (
        bundle({**SMOKER, "valueCodeableConcept": {"coding": [{"code": SECRET}]}}),
        "unknown category",
        {},
    ),
    "two codes": (
        bundle({**SMOKER, "valueCodeableConcept": {"coding": [{"code": "no"}, {"code": "yes"}]}}),
        "several categories",
        {},
    ),
    "ratio": (
        bundle(observation(valueQuantity=None, valueRatio={"numerator": {"value": 1}})),
        "what no column can",
        {},
    ),
    "two values": (bundle(observation(valueString=SECRET)), "not what FHIR", {}),
    "another patient": (
        bundle(observation(subject={"reference": f"Patient/{SECRET}2"})),
        "about another patient",
        {},
    ),
    "two subjects": (
        bundle(
            different(1, code="1-1"),
            different(2, subject={"reference": "Patient/x"}),
            patient=None,
        ),
        "about another patient",
        {},
    ),
    "two patients": ([PATIENT, OTHER], "2 Patient resources", {}),
    "gender of its own": (bundle(patient={**PATIENT, "gender": "other"}), "F or M", {}),
    "birth date that is none": (
        bundle(observation(), patient={**PATIENT, "birthDate": "29.02.1960"}),
        "not a date",
        {},
    ),
    "another patient's identifier": (
        bundle(observation(subject={"identifier": {"system": "urn:mrn", "value": "2"}})),
        "about another patient",
        {},
    ),
    "identifier against reference": (
        bundle(
            observation(
                subject={
                    "reference": f"Patient/{SECRET}",
                    "identifier": {"system": "urn:mrn", "value": "2"},
                }
            )
        ),
        "about another patient",
        {},
    ),
    "search for another identifier": (
        bundle(observation(subject={"reference": "Patient?identifier=urn:mrn|2"})),
        "about another patient",
        {},
    ),
    "identifier of a system that the patient has not": (
        bundle(observation(subject={"identifier": {"system": "urn:other", "value": "2"}})),
        "cannot be told whether",
        {},
    ),
    "the same id at another server": (
        bundle(observation(subject={"reference": f"https://other/fhir/Patient/{SECRET}"})),
        "about another patient",
        {},
    ),
    "two subjects by identifier": (
        bundle(
            *(
                different(k, code="1-1", subject={"identifier": {"system": "s", "value": str(k)}})
                for k in (1, 2)
            ),
            patient=None,
        ),
        "about another patient",
        {},
    ),
    "replaced": (
        bundle(
            patient={
                **PATIENT,
                "link": [{"type": "replaced-by", "other": {"reference": "Patient/new"}}],
            }
        ),
        "replaced by another one",
        {},
    ),
    "first page": (page(PATIENT, observation(), link="?page=2"), "pages are missing", {}),
    "first page of a known number": (
        page(PATIENT, observation(), total=57, link="?page=2"),
        "Expected 57 resources",
        {},
    ),
    "fewer than the search found": (page(PATIENT, observation(), total=3), "missing", {}),
    "a number alone": (page(total=3), "missing", {}),
    "one page of two twice": (
        [page(PATIENT, observation(), total=3), page(PATIENT, observation(), total=3)],
        "missing",
        {},
    ),
    "total that is none": (page(PATIENT, total="many"), "not what FHIR", {}),
    "rules of its own": (
        {**bundle(observation()), "implicitRules": "urn:rules"},
        "implicitRules",
        {},
    ),
    "nothing but what must not be used": (
        bundle(
            observation(modifierExtension=[{"url": "urn:x", "valueBoolean": True}]),
            patient={**PATIENT, "gender": None},
        ),
        "none that may be used",
        {},
    ),
    "no resource": ({"glucose": SECRET}, "no FHIR resource", {}),
    "no person": ({"resourceType": "Medication"}, "no Patient and no Observation", {}),
    "entries that are none": ({"resourceType": "Bundle", "entry": {"a": 1}}, "not what FHIR", {}),
    "cut": (json.dumps(bundle())[:-5], "not valid JSON", {}),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_unclear_is_refused_and_nobody_is_named(tmp_path, name):
    content, words, options = BAD[name]
    with pytest.raises(PatientDataError) as caught:
        read(table(**options), tmp_path, content)
    message = str(caught.value)
    assert words in message and "Patient p1: fhir.json" in message
    assert SECRET not in message and "1960" not in message
    assert all(p.remedy or p.expected for p in caught.value.problems)


def test_the_record_in_every_form(tmp_path):
    resources = [PATIENT, observation(), PRESSURE]
    expected = {"sex": 0, "age": 64, "glucose": 100, "systolic": 120}
    forms = {
        "fhir.json": json.dumps(resources),
        "fhir.ndjson": "\n".join(map(json.dumps, resources)) + "\n",
    }
    for name, text in forms.items():
        assert read(table(), tmp_path, text, name) == pytest.approx(expected)
        (tmp_path / name).unlink()
    folder = tmp_path / "fhir"
    folder.mkdir()
    for number, resource in enumerate([*resources, PATIENT]):  # one exported twice
        (folder / f"{SECRET}-{number}.json").write_text(json.dumps(resource))
    value = table().read(tmp_path, "Patient p1")
    assert value.source.file == "fhir" and value.identifiers == (SECRET,)
    assert SECRET not in repr(value) and value.values.tolist()[:4] == pytest.approx(
        [0, 64, 100, 120]
    )
    (folder / f"{SECRET}.json").write_text("{")
    with pytest.raises(PatientDataError, match="fhir, file 5, line 1") as caught:
        table().read(tmp_path, "Patient p1")
    assert SECRET not in str(caught.value)
    shutil.rmtree(folder)
    folder.mkdir()
    with pytest.raises(PatientDataError, match="no FHIR record"):
        table().read(tmp_path, "Patient p1")


def test_no_record_is_missing(tmp_path):
    assert table().read(tmp_path, "Patient p1") is None


# What stands in the place of any part of a record.
ODD = [None, True, 0, -1, 1e400, "", "x", "2024-02-30", [], {}, [None], [[]], [{}], {"a": {}}]
ODD += [{"value": []}, {"coding": [None]}, {"reference": 1}, {"resourceType": "Bundle"}]


def places(node):
    """Every (container, key) of a nested value."""
    found = [(node, key) for key in (list(node) if isinstance(node, dict) else range(len(node)))]
    for value in list(node.values() if isinstance(node, dict) else node):
        found += places(value) if isinstance(value, dict | list) else []
    return found


def test_no_part_of_a_record_causes_anything_but_our_errors(tmp_path):
    kind, refused = table(), 0
    record = bundle(observation(), PRESSURE, SMOKER)
    for spot in range(len(places(record))):
        for odd in ODD[spot % 3 :: 3]:
            copy = json.loads(json.dumps(record))
            container, key = places(copy)[spot]
            container[key] = odd
            try:
                read(kind, tmp_path, copy)
            except PatientDataError as error:
                assert SECRET not in str(error)
                refused += 1
    assert refused > 100
