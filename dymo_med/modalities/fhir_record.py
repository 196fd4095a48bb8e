"""FHIR R4 records: which resources files hold, which of them still count, and whose they are.

A record is a Bundle, a single resource, a list or lines (NDJSON) of resources, or a folder of such
files (HL7 FHIR Release 4, hl7.org/fhir/R4: Bundle, Patient, Observation, Reference). Only Patient
and Observation are looked at. Nothing of a patient enters a message.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from dymo_med.errors import PatientDataError, Problem
from dymo_med.modalities.table_files import content, decode, load_json, unreadable

LOINC = "http://loinc.org"
# Types of identifiers (HL7 table 0203): medical record number, temporary one, internal, external
# and enterprise number of a patient, pseudonym, unspecified. Others are a state's or an insurer's.
_TYPES = "http://terminology.hl7.org/CodeSystem/v2-0203"
_HOSPITALS = ("MR", "MRT", "PI", "PT", "PE", "ANON", "U")
# What FHIR itself names: numbers of social security, of health insurances.
_NATIONAL = "http://hl7.org/fhir/sid/"
_MOST_FILES = 10_000
_MOST_REPLACED = 100
# How far an observation has come; a version further on takes the place of those before it.
_PROGRESS = {"registered": 0, "preliminary": 1, "final": 2, "amended": 3, "corrected": 3}
_WITHDRAWN = ("entered-in-error", "cancelled")
_URL = "_url"  # where the Bundle says that a resource is; no element of FHIR begins like this one
_CONDITION = re.compile(r"Patient\?identifier=(?:(.*)\|)?([^|&]+)")

Json = Mapping[str, Any]


@dataclass(frozen=True)
class When:
    """When an observation was made: first and last day it may have been, and the instant."""

    first: date
    last: date
    instant: datetime | None = None


@dataclass(frozen=True)
class Record:
    """What a patient's files hold.

    Attributes:
        patient: The Patient; None = there is none.
        observations: Those that count, by their position among all, from 1.
        by_code: Positions of observations with a LOINC code of their own or of a component.
        whose: What the record calls its patient.
        identifiers: The patient's numbers, if one of them may be what a scan's header states.
        sha256: Of the file or of all files.
        times: When observations were made, by position; filled as tables ask for it.
    """

    patient: Json | None
    observations: Mapping[int, Json]
    by_code: Mapping[str, Sequence[int]]
    whose: Whom
    identifiers: tuple[str, ...]
    sha256: str
    times: dict[int, When | None] = field(default_factory=dict)


@dataclass(frozen=True)
class _Page:
    """One Bundle of a search: its address, that of the next, and what it holds of how many."""

    own: str
    following: str
    total: int | None
    matches: frozenset[str]


@dataclass
class _Contents:
    """What files hold: resources, pages of searches, and resources said to be deleted."""

    resources: list[Json] = field(default_factory=list)
    pages: list[_Page] = field(default_factory=list)
    deleted: set[str] = field(default_factory=set)


def open_record(path: Path, where: str) -> Record:
    """Return a patient's record; remembered while its files are as they were.

    Args:
        path: A JSON or NDJSON file, or a folder of them.
        where: Who this is, for messages.

    Raises:
        PatientDataError: If it is no FHIR, a part of it is missing, there are several patients, or
            observations of another one.
    """
    try:
        files = _files(path, where) if path.is_dir() else [path]
        stamps = tuple((str(f), f.stat().st_mtime_ns, f.stat().st_size) for f in files)
    except OSError as error:
        raise unreadable(where, error) from error
    record = _opened(path, stamps, where)
    if not isinstance(record, Record):
        raise PatientDataError(*record)
    return record


# A patient's tables are read one after the other, so that the last record is all that is needed.
@lru_cache(maxsize=1)
def _opened(
    path: Path, stamps: tuple[tuple[str, int, int], ...], where: str
) -> Record | tuple[Problem, ...]:
    """Return a record, or what is wrong with it."""
    try:
        return _read(path, [Path(name) for name, _, _ in stamps], where)
    except PatientDataError as error:
        return error.problems


def _read(path: Path, files: Sequence[Path], where: str) -> Record:
    """Read a record; see `open_record`."""
    found, hashes = _Contents(), []
    for number, file in enumerate(files, start=1):
        # A file's name may be the patient's; its position is not.
        here = where if file == path else f"{where}, file {number}"
        data = content(file, here)
        hashes.append(hashlib.sha256(data).hexdigest())
        text = decode(data, "", here)
        if file.suffix.lower() == ".ndjson":
            for line, part in enumerate(text.split("\n"), start=1):
                if part.strip():
                    _unpack(load_json(part, f"{here}, line {line}"), here, found)
        else:
            _unpack(load_json(text, here), here, found)
    problems = _incomplete(found.pages, where)
    if problems:
        raise PatientDataError(*problems)
    patients = [
        p for p in _current(_of_type(found.resources, "Patient"), found.deleted).values() if p
    ]
    every = _of_type(found.resources, "Observation")
    observations = _current(every, found.deleted)
    if not patients and not every:
        raise PatientDataError(
            Problem(
                where,
                "there is no Patient and no Observation in the file",
                expected="FHIR R4 resources: a Bundle, a list, or one per line",
                remedy="Check that this is the patient's FHIR record",
            )
        )
    patient, whose = _the_patient(patients, where)
    problems = _strangers(whose, observations, known=patient is not None, where=where)
    if problems:
        raise PatientDataError(*problems)
    by_code: dict[str, list[int]] = defaultdict(list)
    for number, observation in observations.items():
        for code in _loinc_codes(observation):
            by_code[code].append(number)
    digest = hashes[0] if path == files[0] else _hash_of(hashes)
    return Record(patient, observations, by_code, whose, _identifiers(patients), digest)


def _hash_of(hashes: Iterable[str]) -> str:
    return hashlib.sha256("".join(sorted(hashes)).encode()).hexdigest()


def malformed(where: str) -> Problem:
    """Return the problem of an element that is not what FHIR says."""
    return Problem(
        where,
        "the element is not what FHIR R4 says",
        expected="a resource of FHIR R4 in JSON",
        remedy="Export the record again",
    )


def codings(concept: Any) -> list[Json]:
    """Return the codings of a CodeableConcept."""
    coding = concept.get("coding") if isinstance(concept, dict) else None
    return [c for c in coding if isinstance(c, dict)] if isinstance(coding, list) else []


def listed(value: Any, where: str) -> list[Json]:
    """Return a list of objects; what is absent is an empty one.

    Raises:
        PatientDataError: If it is something else.
    """
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(part, dict) for part in value):
        raise PatientDataError(malformed(where))
    return value


def is_modified(element: Json) -> bool:
    """Return whether an element says that it must not be used by whoever does not understand it.

    That is `modifierExtension` (R4, Extensibility) and the rules of `implicitRules` (R4, Resource);
    none of either is understood here.
    """
    return bool(element.get("modifierExtension")) or bool(element.get("implicitRules"))


def _loinc_codes(observation: Json) -> set[str]:
    """Return the LOINC codes of an observation and of its components."""
    parts = observation.get("component")
    concepts = [observation.get("code")]
    if isinstance(parts, list):
        concepts += [part.get("code") for part in parts if isinstance(part, dict)]
    return {
        coding["code"]
        for concept in concepts
        for coding in codings(concept)
        if coding.get("system") == LOINC and isinstance(coding.get("code"), str)
    }


# -- files and bundles -----------------------------------------------------------------------------


def _files(folder: Path, where: str) -> list[Path]:
    """Return the files of a record that is a folder."""
    files = sorted(p for p in folder.iterdir() if p.suffix.lower() in (".json", ".ndjson"))
    if not files or len(files) > _MOST_FILES:
        raise PatientDataError(
            Problem(
                where,
                "the folder is no FHIR record",
                expected=f"1 to {_MOST_FILES} files that end in .json or .ndjson",
                got=f"{len(files)} files",
                remedy="Put the patient's resources into it",
            )
        )
    return files


def _unpack(document: Any, where: str, found: _Contents) -> None:
    """Add the resources of a document: itself, those of a list, those of a Bundle."""
    if isinstance(document, list):
        for part in document:
            _unpack(part if isinstance(part, dict) else None, where, found)
        return
    if not isinstance(document, dict) or not isinstance(document.get("resourceType"), str):
        raise PatientDataError(
            Problem(
                where,
                "the file is no FHIR resource",
                expected="an object with a resourceType",
                remedy="Check that this is the patient's FHIR record",
            )
        )
    if document["resourceType"] != "Bundle":
        found.resources.append(document)
        return
    if is_modified(document):
        raise PatientDataError(
            Problem(
                where,
                "the Bundle follows rules of its own (implicitRules), which are not known here",
                expected="a Bundle by the rules of FHIR R4 alone",
                remedy="Export the record without them",
            )
        )
    matches: list[str] = []
    for entry in listed(document.get("entry"), f"{where}, Bundle.entry"):
        resource = entry.get("resource")
        if resource is None:
            _delete(entry.get("request"), found)
            continue
        if not isinstance(resource, dict):
            raise PatientDataError(malformed(f"{where}, Bundle.entry"))
        search = entry.get("search")
        if not isinstance(search, dict) or search.get("mode") in (None, "match"):
            matches.append(_name(resource) or f"entry {len(matches)}")
        url = entry.get("fullUrl")
        if is_modified(entry):
            # The resource is there, but not to be used: marked as if the mark were its own.
            resource = {**resource, "modifierExtension": [{}]}
        _unpack({**resource, _URL: url} if isinstance(url, str) else resource, where, found)
    _add_page(document, frozenset(matches), where, found)


def _name(resource: Json) -> str:
    """Return type and id of a resource, or nothing if it has none."""
    kind, own = resource.get("resourceType"), resource.get("id")
    return f"{kind}/{own}" if isinstance(kind, str) and isinstance(own, str) and own else ""


def _delete(request: Any, found: _Contents) -> None:
    """Take note of an entry that says only that a resource was deleted (history, transaction)."""
    if isinstance(request, dict) and request.get("method") == "DELETE":
        found.deleted.add("/".join(str(request.get("url", "")).split("/")[-2:]))


def _add_page(bundle: Json, matches: frozenset[str], where: str, found: _Contents) -> None:
    """Take note of a Bundle that may be one page of several."""
    links = {
        str(link.get("relation", "")).lower(): link.get("url")
        for link in listed(bundle.get("link"), f"{where}, Bundle.link")
    }
    total = bundle.get("total")
    if total is not None and not (isinstance(total, str) and re.fullmatch(r"\d{1,12}", total)):
        raise PatientDataError(malformed(f"{where}, Bundle.total"))
    following = links.get("next")
    if not links and total is None:
        return
    found.pages.append(
        _Page(
            str(links.get("self", "")),
            "" if following is None else str(following),
            None if total is None else int(total),
            matches,
        )
    )


def _incomplete(pages: Sequence[_Page], where: str) -> list[Problem]:
    """Return what is wrong if a search has pages that are not there.

    Pages of one search are those that say the same total and have a sort of resource in common.
    """
    groups: list[tuple[set[str], list[_Page]]] = []
    for page in pages:
        sorts = {match.split("/")[0] for match in page.matches}
        group = next(
            (
                (known, group)
                for known, group in groups
                if group[0].total == page.total and (known & sorts or not known or not sorts)
            ),
            None,
        )
        if group is None:
            groups.append((set(sorts), [page]))
        else:
            group[0].update(sorts)
            group[1].append(page)
    addresses = {page.own for page in pages}
    for _, group_pages in groups:
        total = group_pages[0].total
        there = len(frozenset().union(*(page.matches for page in group_pages)))
        short = total is not None and there < total
        open_ends = [p for p in group_pages if p.following and p.following not in addresses]
        whole = total is not None and not short and len(group_pages) > 1
        if short or (open_ends and not whole):
            return [
                Problem(
                    where,
                    "the record is a search of which pages are missing",
                    expected=f"{total} resources, as the search says"
                    if short
                    else "every page that the link `next` leads to",
                    got=f"{there} resources on {len(group_pages)} page(s)",
                    remedy="Fetch all pages, follow `next` until there is none, and put them into"
                    " a folder or one file",
                )
            ]
    return []


# -- versions --------------------------------------------------------------------------------------


def _of_type(resources: Sequence[Json], kind: str) -> list[Json]:
    return [r for r in resources if r.get("resourceType") == kind]


def _current(resources: Sequence[Json], deleted: set[str]) -> dict[int, Json]:
    """Return the resources that count, by their position from 1.

    Of copies one. Of versions of one resource (the same id) the newest; none if one of them was
    entered in error, cancelled or deleted.
    """
    versions: dict[tuple[str, str], list[int]] = defaultdict(list)
    kept: dict[int, Json] = {}
    servers: dict[str, set[str]] = defaultdict(set)
    for number, resource in enumerate(resources, start=1):
        name = _name(resource)
        kept[number] = resource
        if name:
            server = _server(resource)
            versions[name, server].append(number)
            servers[name].add(server)
    for (name, server), numbers in list(versions.items()):
        # An address on one server, and none: the same resource. On two servers: two.
        if server and "" in servers[name] and len(servers[name]) == 2:
            versions[name, ""] += numbers
            del versions[name, server]
    for (name, _), numbers in versions.items():
        if len(numbers) == 1 and name not in deleted:
            continue
        left = [] if name in deleted else _newest({n: resources[n - 1] for n in sorted(numbers)})
        for number in set(numbers) - set(left):
            del kept[number]
    return kept


def _server(resource: Json) -> str:
    """Return the server at which a resource is, as far as its Bundle says."""
    address = str(resource.get(_URL, ""))
    place = f"/{_name(resource)}"
    return _bare(address).removesuffix(place) if address.startswith("http") else ""


def _newest(versions: Mapping[int, Json]) -> list[int]:
    """Return the positions of those versions of a resource that count.

    By `meta.lastUpdated`, else by `meta.versionId`, else by how far the status has come; all of
    them if nothing tells.
    """
    distinct: dict[str, int] = {}
    for number, version in versions.items():
        distinct.setdefault(repr(sorted((k, v) for k, v in version.items() if k != _URL)), number)
    numbers = list(distinct.values())
    if len(numbers) == 1:
        return numbers
    if any(versions[n].get("status") == _WITHDRAWN[0] for n in numbers):
        return []
    for rank in (_updated, _version):
        ranks = {n: rank(versions[n]) for n in numbers}
        if None not in ranks.values() and len(set(ranks.values())) == len(numbers):
            return [max(numbers, key=lambda n: ranks[n])]
    if any(versions[n].get("status") in _WITHDRAWN for n in numbers):
        return []
    progress = {n: _PROGRESS.get(str(versions[n].get("status")), -1) for n in numbers}
    furthest = [n for n in numbers if progress[n] == max(progress.values())]
    return furthest if min(progress.values()) >= 0 else numbers


def _updated(resource: Json) -> Any:
    meta = resource.get("meta")
    try:
        return datetime.fromisoformat(str(meta["lastUpdated"])).timestamp() if meta else None
    except (KeyError, TypeError, ValueError, OverflowError):
        return None


def _version(resource: Json) -> Any:
    meta = resource.get("meta")
    text = str(meta.get("versionId")) if isinstance(meta, dict) else ""
    return int(text) if re.fullmatch(r"\d{1,12}", text) else None


# -- whose -----------------------------------------------------------------------------------------


class Whom:
    """What a record calls its patient: references to the resource, and identifiers of the person.

    A relative reference (`Patient/1`) means the patient of that id at whichever server; of two
    absolute ones both servers must be the same, but for http and https.
    """

    def __init__(self) -> None:
        self._exact: set[str] = set()
        self._absolute: set[str] = set()
        self._tails: set[str] = set()
        self._identifiers: set[tuple[str, str]] = set()

    def __bool__(self) -> bool:
        """Return whether anything is known."""
        return bool(self._exact or self._identifiers)

    def learn(self, reference: str, identifiers: Iterable[tuple[str, str]] = ()) -> None:
        """Take note of a reference, if there is one, and of identifiers."""
        self._identifiers.update(identifiers)
        if not reference:
            return
        self._exact.add(_bare(reference))
        if not reference.startswith("urn:"):
            self._tails.add(_tail(reference))
        if "://" in reference:
            self._absolute.add(_bare(reference))

    def is_meant(self, reference: Any, where: str) -> bool | None:
        """Return whether a Reference is to the patient; None if that cannot be told.

        Raises:
            PatientDataError: If it is no Reference.
        """
        return self.means(*parts_of(reference, where))

    def means(self, literal: str, logical: tuple[str, str] | None) -> bool | None:
        """Return whether the parts of a Reference (`parts_of`) are the patient's."""
        by_number = self._has(logical) if logical is not None else None
        if not literal:
            return by_number
        return self._refers(literal) and by_number is not False

    def _refers(self, reference: str) -> bool:
        bare = _bare(reference)
        if bare in self._exact:
            return True
        if reference.startswith("urn:"):
            return False
        if "://" in reference and self._absolute:
            return False
        return _tail(reference) in self._tails

    def _has(self, identifier: tuple[str, str]) -> bool | None:
        system, value = identifier
        if identifier in self._identifiers:
            return True
        for other, number in self._identifiers:
            if number == value and not (system and other):
                return True
        return False if system in {s for s, _ in self._identifiers if s} else None


def parts_of(reference: Any, where: str) -> tuple[str, tuple[str, str] | None]:
    """Return the literal part of a Reference, and the identifier of its logical part.

    Raises:
        PatientDataError: If it is no Reference.
    """
    if not isinstance(reference, dict):
        raise PatientDataError(malformed(where))
    literal, logical = reference.get("reference"), reference.get("identifier")
    if logical is None and isinstance(literal, str) and "?" not in literal:
        return literal.strip(), None
    if not isinstance(literal, str | None) or not isinstance(logical, dict | None):
        raise PatientDataError(malformed(where))
    condition = _CONDITION.search(literal or "")
    if condition is not None:
        return "", (condition[1] or "", condition[2])
    return (literal or "").strip(), None if logical is None else _numbered(logical)


def _numbered(identifier: Json) -> tuple[str, str] | None:
    """Return system and value of an identifier that has a value."""
    value = identifier.get("value")
    if not isinstance(value, str) or not value.strip():
        return None
    return str(identifier.get("system") or "").strip(), value.strip()


@lru_cache(maxsize=1024)
def _bare(reference: str) -> str:
    """Return a reference without scheme, version and last slash."""
    return re.sub(r"^https?://|/_history/.*$|/$", "", reference.strip())


def _tail(reference: str) -> str:
    parts = _bare(reference).split("/")
    return "/".join(parts[-2:]) if len(parts) > 1 else f"Patient/{parts[0]}"


def _whom(patients: Iterable[Json]) -> Whom:
    whose = Whom()
    for patient in patients:
        identifiers = [_numbered(part) for part in _stated(patient)]
        whose.learn(_name(patient), [i for i in identifiers if i is not None])
        whose.learn(str(patient.get(_URL) or ""))
    return whose


def _several(number: int, where: str) -> Problem:
    return Problem(
        where,
        f"the record holds {number} Patient resources",
        expected="one, and those that it has replaced",
        remedy="Keep the resources of this patient",
    )


def _the_patient(patients: Sequence[Json], where: str) -> tuple[Json | None, Whom]:
    """Return the Patient and what the record calls them.

    A record that another one has replaced (Patient.link, R4) is followed to that one.

    Raises:
        PatientDataError: If that one is not there, or there are several.
    """
    place = f"{where}, Patient.link"
    current: list[tuple[Json, list[Any]]] = []
    replaced: list[tuple[Json, list[Any]]] = []
    for patient in patients:
        links = [
            part.get("other")
            for part in listed(patient.get("link"), place)
            if part.get("type") == "replaced-by"
        ]
        (replaced if links else current).append((patient, links))
    if len(current) > 1 or len(replaced) > _MOST_REPLACED:
        raise PatientDataError(_several(len(patients), where))
    by_nobody = [
        links
        for _, links in replaced
        if not any(_whom([p]).is_meant(other, place) for other in links for p in patients)
    ]
    if by_nobody:
        raise PatientDataError(
            Problem(
                place,
                "the Patient was replaced by another one, which is not in the record",
                expected="the Patient that is in use",
                remedy="Export the record of the Patient that replaces this one",
            )
        )
    if patients and not current:
        raise PatientDataError(_several(len(patients), where))
    whose = _whom(patients)
    if not current:
        return None, whose
    patient = current[0][0]
    for part in listed(patient.get("link"), place):
        if part.get("type") == "replaces":
            literal, logical = parts_of(part.get("other"), place)
            whose.learn(literal, [] if logical is None else [logical])
    return patient, whose


def _strangers(
    whose: Whom, observations: Mapping[int, Json], *, known: bool, where: str
) -> list[Problem]:
    """Return what is wrong if observations are not about the patient; nobody is named."""
    others, unclear = [], []
    for number, observation in observations.items():
        subject = observation.get("subject")
        if subject is None:
            continue
        literal, logical = parts_of(subject, f"{where}, observation {number}, subject")
        if not literal and logical is None:
            continue
        meant = whose.means(literal, logical) if known or whose else True
        if meant is None:
            unclear.append(number)
        elif not meant:
            others.append(number)
        elif not known:
            # Without a Patient the first one is who all others must be about.
            whose.learn(literal, [] if logical is None else [logical])
    problems = []
    for numbers, what, remedy in (
        (others, "observations are about another patient", "Take out what is not this patient's"),
        (
            unclear,
            "it cannot be told whether observations are about the patient",
            "Add the identifier by which they name the patient to the Patient, or take them out",
        ),
    ):
        if numbers:
            some = ", ".join(map(str, numbers[:5]))
            problems.append(
                Problem(
                    where,
                    what,
                    expected="observations whose subject is the Patient of the record",
                    got=f"{len(numbers)} of {len(observations)} (observation {some})",
                    remedy=remedy,
                )
            )
    return problems


def _stated(patient: Json) -> Iterator[Json]:
    """Yield the identifiers of a Patient that have a value."""
    stated = patient.get("identifier")
    for part in stated if isinstance(stated, list) else []:
        if isinstance(part, dict) and _numbered(part) is not None:
            yield part


def _identifiers(patients: Sequence[Json]) -> tuple[str, ...]:
    """Return the patient's identifiers, if one of them may be what a scan's header states.

    A record that gives nothing but the server's id, a passport or an insurance number says nothing
    of the number in a DICOM header: that the two differ would be no sign of another patient.
    """
    parts = [part for patient in patients for part in _stated(patient)]
    if not any(_may_be_a_hospitals(part) for part in parts):
        return ()
    return tuple(dict.fromkeys(part["value"].strip() for part in parts))


def _may_be_a_hospitals(identifier: Json) -> bool:
    """Return whether an identifier's type, or else its system, leaves room for a hospital's."""
    types = [c.get("code") for c in codings(identifier.get("type")) if c.get("system") == _TYPES]
    if types:
        return any(code in _HOSPITALS for code in types)
    return not str(identifier.get("system", "")).startswith(_NATIONAL)
