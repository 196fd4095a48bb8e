import base64
import hashlib
import io
import re
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import dymo_med
from dymo_med.inference.pictures import Scan, draw, slices, watermark
from dymo_med.inference.prediction_file import PredictionFile
from dymo_med.inference.report import (
    percent,
    percentile,
    points,
    view,
    words,
    write_report,
)

HOSTILE = '<script>alert("x")</script>&\'{{ 12347*7 }}'
SECTIONS = [
    "banner",
    "answer",
    "had",
    "change",
    "madeup",
    "why",
    "drove",
    "performance",
    "acquire",
    "limits",
    "reader",
    "trace",
]
VOID = {"meta", "img", "br", "circle", "path", "use", "link", "input"}


class Page(HTMLParser):
    """Tags in order, text, and whether every tag is closed."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.open = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.text.append(data)

    def words(self):
        return " ".join(" ".join(self.text).split())


def step(number, modality, before, after, reward, decision, **more):
    return {
        "step": number,
        "modality": modality,
        "version": more.get("version", "recovered"),
        "quality_before": before,
        "quality_after": after,
        "similarity_before": -0.5,
        "similarity_after": more.get("typical", -0.4),
        "factor": more.get("factor", 1.0),
        "reward": reward,
        "decision": decision,
        "borrowed": more.get("borrowed", False),
        "trust": None,
        "threshold": 0.0,
    }


def attribution(modality, name, value, method, recovered=False):
    return {
        "modality": modality,
        "name": name,
        "value": value,
        "method": method,
        "recovered": recovered,
    }


def source(file, sha256, facts):
    return {"file": file, "sha256": sha256, "affine": None, "facts": facts}


def prediction(**changes):
    given = {
        "schema_version": 6,
        "record_id": "sub-0042",
        "patient_id": "hidden-patient-key",
        "target": "grade",
        "classes": ("low", "high"),
        "predicted": "high",
        "probabilities": (0.23, 0.77),
        "status": "caution",
        "status_reasons": (
            {"code": "few_held_back", "values": {"patients": 4, "least": 30}},
            {"code": "borrowed", "values": {"modalities": "labs"}},
        ),
        "frequency": {
            "label": "high",
            "of": 100,
            "count": 77,
            "bound": None,
            "patients": 12,
            "right": 9,
        },
        "prediction_set": None,
        "alternatives": {"observed_only": (0.32, 0.68), "trust_all": (0.56, 0.44)},
        "base_rates": (0.56, 0.44),
        "method": "dymo",
        "method_why": "",
        "rule": {
            "decides_by": "reward",
            "admits": "one",
            "calibration": "log_ratio",
            "threshold": 0.0,
        },
        "observed": ("t1", "labs"),
        "partly": ("labs",),
        "recovered": ("t2", "flair", "labs"),
        "trusted": ("flair", "labs"),
        "rejected": ("t2",),
        "absent": ("genetics",),
        "refused": (),
        "quality": {n: {"state": "pass", "findings": ()} for n in ("t1", "labs")},
        "steps": (
            step(1, "t2", 0.83, 0.61, -0.64, "rejected", factor=0.31, typical=-3.2),
            step(1, "flair", 0.83, 0.91, 0.08, "admitted"),
            step(1, "labs", 0.83, 0.86, 0.03, "not yet", version="completed", borrowed=True),
            step(2, "labs", 0.91, 0.9101, 0.0001, "admitted", version="completed", borrowed=True),
        ),
        "subsets": (),
        "draws": None,
        "acquire": None,
        "attributions": (
            attribution("t1", "", 0.2, "shapley"),
            attribution("flair", "", 0.2, "shapley", True),
            attribution("labs", "", -0.07, "shapley"),
            attribution("labs", "ldh", -0.03, "feature_ablation"),
        ),
        "warnings": ("Trusting every recovery would say low, not high.",),
        "performance": None,
        "limits": {
            "task": "classification: grade",
            "cohort": "glioma",
            "records": {"train": 10},
            "patients": {"train": 9},
            "fitted_on": 3,
            "held_back": 4,
            "observed_share": {"t1": 0.9},
        },
        "sources": {"t1": source("t1.nii.gz", "ab" * 32, {"size": "240 x 240 x 155"})},
        "recovered_files": {},
        "bundle_id": "f00dface" * 8,
        "bundle_name": "glioma",
        "bundle_version": "0.1.0",
        "seed": 7,
        "device": "cpu",
        "versions": {"dymo_med": "0.1.0"},
        "command": None,
        **changes,
    }
    return given


def volume(seed=0):
    values = np.random.default_rng(seed).normal(size=(1, 10, 12, 8)).astype(np.float32)
    values[:, :2] = 0
    return values


def cell(modality, column, value, unit="", **more):
    return {
        "modality": modality,
        "column": column,
        "value": value,
        "text": value,
        "unit": unit,
        "percentile": None,
        "share": None,
        "measured": False,
        **more,
    }


def exhibits(scans=None, **changes):
    saliency = np.zeros((10, 12, 8), np.float32)
    saliency[6, 7, 3] = 1e-3
    if scans is None:
        scans = (
            Scan("t1", volume(), (1.0, 1.0, 2.0), "observed", True, saliency),
            Scan("t2", volume(1), (1.0, 1.0, 2.0), "rejected", True),
            Scan("flair", volume(2), (1.0, 1.0, 2.0), "trusted", True),
        )
    return {
        "bundle_description": "For tests.",
        "scans": [s.model_dump() for s in draw(scans)],
        "cells": (
            cell("labs", "ldh", "412", "U/L", percentile=91.0, measured=True),
            cell("labs", "smoker", "no", share=0.6),
        ),
        "smoothed_voxels": 1.0,
        "convergence": {"error": 0.001, "bound": 0.005, "points": 16},
        **changes,
    }


def file_of(p, x):
    return PredictionFile.make({**p, "exhibits": x})


def page_of(tmp_path, p, x):
    write_report(file_of(p, x), tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    return text, Page(text)


def test_every_section_is_there_in_order(tmp_path):
    _, page = page_of(tmp_path, prediction(), exhibits())
    ids = [a["id"] for _, a in page.tags if a.get("id") in SECTIONS]
    assert ids == SECTIONS
    assert [t for t, _ in page.tags if t in ("header", "main", "footer")] == [
        "header",
        "main",
        "footer",
    ]
    labelled = {a["aria-labelledby"] for t, a in page.tags if t == "section"}
    assert labelled <= {a.get("id") for _, a in page.tags}


def test_the_page_needs_nothing_else(tmp_path):
    text, page = page_of(tmp_path, prediction(), exhibits())
    assert not re.search(r"https?://|src=\"(?!data:)|@import|url\(", text)
    # The reader's form has one script, the page another; both are in the page.
    assert [a for t, a in page.tags if t == "script"] == [{}, {}]
    used = {a["href"] for t, a in page.tags if t == "use"}
    assert used <= {"#" + a["id"] for t, a in page.tags if t == "symbol"}


def test_what_a_clinician_needs_is_said(tmp_path):
    text, page = page_of(tmp_path, prediction(), exhibits())
    said = page.words()
    for sentence in (
        "Not a diagnosis",
        "answered with caution",
        "Hardly tested: 4 held-back patients",
        "77 %",
        "Among patients like those it was calibrated on, of 100 given this probability about 77"
        " are high; about 23 are not.",
        "The answer rests on 2 measured modalities and 2 recovered ones that were trusted. "
        "1 recovery was rejected. 1 modality is absent and could not be recovered.",
        "Before anything is known: 44 % are high",
        "partly filled; blanks recovered and trusted",
        "recovered and rejected",
        "everything filled in would say otherwise",
        "changes to low",
        "60 % of training patients",
        "flair was trusted",
        "the class would stand out less clearly",
        "Together +33.0 points: from 44 % to 77 %.",
        "Trusting every recovery would say low, not high.",
        "Made from 9 patients of the cohort glioma",
        "This bundle does not say how good this way of selecting is.",
        "This bundle has no calibration for prediction sets.",
        "Not computed: no draws were made.",
        "< +0.001",
        "412 U/L",
        "+20.0",
        "\N{MINUS SIGN}7.0",
        "f00dface" * 8,
        "ab" * 32,
        "Seed",
    ):
        assert sentence in said, sentence
    assert "hidden-patient-key" not in text


def test_pictures_have_words_and_synthetic_ones_are_marked(tmp_path):
    _, page = page_of(tmp_path, prediction(), exhibits())
    images = [a for t, a in page.tags if t == "img"]
    # Three planes of three scans and of one map, whose slices are leafed through too.
    assert len(images) == 14
    figures = [a["aria-label"] for _, a in page.tags if a.get("class") == "planes"]
    assert [label.split(":")[0] for label in figures] == [
        "t1, observed",
        "t2, recovered and rejected",
        "flair, recovered and trusted",
        "t1",
    ]
    for a in images:
        data = base64.b64decode(a["src"].removeprefix("data:image/png;base64,"))
        assert max(Image.open(io.BytesIO(data)).size) > 100


def test_hostile_text_is_text(tmp_path):
    p = prediction(
        record_id=HOSTILE,
        classes=("low", HOSTILE),
        observed=("t1", HOSTILE),
        partly=(),
        recovered=("t2", "flair"),
        trusted=("flair",),
        absent=(HOSTILE + "2",),
        warnings=(HOSTILE,),
        bundle_name=HOSTILE,
        sources={HOSTILE: source(HOSTILE, "00", {"size": HOSTILE})},
        attributions=(attribution(HOSTILE, "", 0.1, "shapley"),),
        target=HOSTILE,
        command=HOSTILE,
    )
    x = exhibits(
        bundle_description=HOSTILE,
        scans=(Scan(HOSTILE, volume(), (), "observed", True, np.ones((10, 12, 8))),),
        cells=(cell("t2", HOSTILE, HOSTILE, HOSTILE),),
    )
    text, page = page_of(tmp_path, p, x)
    assert text.count("<script") == 2 and "<script>alert" not in text
    assert "86429" not in page.words().replace("49 %", "")
    assert HOSTILE in " ".join(page.text)


@pytest.mark.parametrize("classes", [2, 3, 12])
def test_any_number_of_classes(tmp_path, classes):
    names = tuple(f"class {k}" for k in range(classes))
    p = (0.4,) + (0.6 / (classes - 1),) * (classes - 1)
    given = prediction(
        classes=names,
        probabilities=p,
        alternatives={"observed_only": p, "trust_all": p},
        base_rates=(1 / classes,) * classes,
    )
    _, page = page_of(tmp_path, given, exhibits())
    most = "is the more likely answer" if classes == 2 else "is the most likely answer"
    expected = "class 1 is the more likely answer" if classes == 2 else f"class 0 {most}"
    assert expected in page.words()


def test_a_close_call_is_called_undecided(tmp_path):
    given = prediction(probabilities=(0.49, 0.51))
    _, page = page_of(tmp_path, given, exhibits())
    assert "Undecided: high and low are about equally likely" in page.words()


def test_nothing_missing_nothing_explained(tmp_path):
    p = prediction(
        partly=(),
        recovered=(),
        trusted=(),
        rejected=(),
        absent=(),
        steps=(),
        attributions=(),
        warnings=(),
        status="answered",
        status_reasons=(),
        alternatives={"observed_only": (0.23, 0.77), "trust_all": (0.23, 0.77)},
    )
    x = exhibits(scans=(), cells=(), convergence=None)
    _, page = page_of(tmp_path, p, x)
    said = page.words()
    assert "Nothing was made up" in said
    assert "nothing was recovered" in said
    assert "Attributions were not computed" in said
    assert "Nothing is missing, so nothing could have been treated otherwise" in said
    assert "answered with caution" not in said
    assert "SYNTHETIC" not in said


def test_a_blind_selector_says_so(tmp_path):
    _, page = page_of(tmp_path, prediction(steps=(), method="trust_all"), exhibits())
    assert "it decides by rule" in page.words()


def test_flat_and_colour_pictures(tmp_path):
    rng = np.random.default_rng(0)
    grey = Scan("film", rng.random((1, 20, 30)), (), "observed", False, rng.random((20, 30)))
    colour = Scan("skin", rng.random((3, 20, 30)), (), "trusted", False)
    _, page = page_of(tmp_path, prediction(), exhibits(scans=(grey, colour)))
    alts = [a["aria-label"] for _, a in page.tags if a.get("class") == "planes"]
    assert alts[:2] == ["film, observed", "skin, recovered and trusted"]


def test_no_word_is_left_over():
    """That every word in use exists is what the strict templates see to."""
    folder = resources.files("dymo_med.inference").joinpath("templates")
    modules = (
        *resources.files("dymo_med.inference").iterdir(),
        *resources.files("dymo_med").iterdir(),
    )
    used = ""
    for file in folder.iterdir():
        if file.name.endswith(".j2"):
            text = file.read_text(encoding="utf-8")
            for short, whole in re.findall(r"{% set (\w+) = (t\.[\w.]+) %}", text):
                text = re.sub(rf"\b{short}\.", f"{whole}.", text)
            used += text
    code = "".join(f.read_text(encoding="utf-8") for f in modules if f.name.endswith(".py"))
    indexed = {
        "why": ("sentence_", "average_"),
        "warnings": ("flip_", "draws_"),
        "had": ("partly_", "average_"),
        "performance": ("level_",),
        "states": ("average_",),
        "status": ("answered", "caution", "abstained"),
    }
    left_over = [
        f"{section}.{key}"
        for section, entries in words().items()
        for key in (entries if isinstance(entries, dict) else ())
        if f"t.{section}.{key}" not in used
        and f"t.{section}[" not in used
        and f'"{key}"' not in code
        and not key.startswith(indexed.get(section, ("\0",)))
    ]
    assert left_over == []


def test_slices_as_radiologists_look():
    v = np.zeros((4, 5, 6))
    v[3, 4, 5] = 1.0  # right, anterior, superior
    axial, coronal, sagittal = slices(v, (3, 4, 5))
    assert axial.shape == (5, 4) and axial[0, 0] == 1  # nose up, patient's right on the left
    assert coronal.shape == (6, 4) and coronal[0, 0] == 1  # crown up
    assert sagittal.shape == (6, 5) and sagittal[0, 0] == 1  # nose to the left


@pytest.mark.parametrize("level", [0, 90, 128, 255])
def test_the_watermark_is_in_the_pixels_and_legible_on_any_grey(level):
    plain = np.full((120, 120, 3), level, np.uint8)
    marked = watermark(plain)
    assert marked.shape == plain.shape and marked.dtype == np.uint8
    difference = np.abs(marked.astype(int) - plain).max(-1)
    assert (difference > 60).mean() > 0.02


def test_percentages_never_claim_certainty():
    assert [percent(p) for p in (0, 0.005, 0.006, 0.5, 0.994, 0.996, 1)] == [
        "under 1 %",
        "under 1 %",
        "1 %",
        "50 %",
        "99 %",
        "over 99 %",
        "over 99 %",
    ]
    assert points(-0.00001) == "0.0"


def test_percentile_of_a_value():
    line = [float(i) for i in range(101)]
    assert percentile(-5, line) == 0 and percentile(200, line) == 100
    assert percentile(12.5, line) == pytest.approx(12.5)
    constant = [1.0] * 50 + [2.0] * 51
    assert percentile(1.0, constant) == pytest.approx(24.5)


def test_a_sentence_for_every_way_to_be_rejected():
    def said(s):
        p = prediction(steps=(s,), recovered=("t2",), trusted=(), partly=())
        return view(file_of(p, exhibits()))["why"]["sentences"][0]

    typical = said(step(1, "t2", 0.8, 0.82, -0.1, "rejected", factor=0.8))
    assert "less like training patients" in typical
    unclear = said(step(1, "t2", 0.8, 0.7, -0.1, "rejected"))
    assert "less clearly" in unclear and "less like" not in unclear
    both = said(step(1, "t2", 0.8, 0.7, -0.4, "rejected", factor=0.5))
    assert "less clearly" in both and "less like its training patients" in both
    assert "gained nothing" in said(step(1, "t2", 0.8, 0.8, 0.0, "stopped"))


def test_an_answer_that_hangs_on_the_draw_is_not_called_steady():
    same = (0.23, 0.77)
    drawn = {
        "probabilities": (same, (0.6, 0.4)),
        "low": (0.23, 0.4),
        "median": (0.4, 0.6),
        "high": (0.6, 0.77),
        "changes": 0.5,
    }
    draws = {"n": 2, "seed": 0, "central": 0.9, "own": drawn, "trust_all": drawn}
    p = prediction(alternatives={"observed_only": same, "trust_all": same}, draws=draws)
    change = view(file_of(p, exhibits()))["change"]
    assert change["flip"] and "in 1 of 2" in change["sentence"]  # unsteady
    assert not change["sentence"].startswith("No")


@pytest.mark.parametrize(("n", "group"), [(0, "pattern"), (5, "pattern"), (8, "all")])
def test_too_few_patients_for_a_set_is_said(tmp_path, n, group):
    found = {
        "classes": ("low", "high"),
        "coverage": 0.9,
        "compared_with": group,
        "calibrated_on": n,
        "least": 9,
    }
    values = {"patients": n, "least": 9, "coverage": 0.9}
    reason = {"code": "too_few_calibrated", "values": values}
    few = prediction(prediction_set=found, status="abstained", status_reasons=(reason,))
    _, page = page_of(tmp_path, few, exhibits())
    said = page.words()
    assert "The set holds all of these: low, high." in said
    assert f"It rests on {n} held-back patients" in said and "for which 9 are needed" in said
    assert f"take 9 held-back patients with these modalities at 90 %, and there were {n}" in said
    assert "hold the true class" not in said


@pytest.mark.parametrize("n", [0, 9])
def test_a_hundred_patients_are_only_spoken_of_where_some_were_counted(tmp_path, n):
    counted = {"label": "high", "of": 100, "count": None, "bound": None, "patients": n, "right": n}
    _, page = page_of(tmp_path, prediction(frequency=counted), exhibits())
    said = page.words()
    assert "of 100" not in said and f"{n} held-back patients got one" in said
    assert not [a for t, a in page.tags if t == "svg" and a.get("class") == "dots"]
    _, page = page_of(tmp_path, prediction(), exhibits())
    assert [a for t, a in page.tags if t == "svg" and a.get("class") == "dots"]
    assert (
        "of 12 held-back patients with an answer about as sure, it was right for 9" in page.words()
    )


def test_a_page_opened_as_a_file_says_itself_what_it_may_do(tmp_path):
    page, _ = page_of(tmp_path, prediction(), exhibits())
    (own,) = re.findall('<meta http-equiv="Content-Security-Policy" content="([^"]*)">', page)
    scripts = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    for script in scripts:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in own
    assert scripts and own.count("sha256-") == len(scripts) and "default-src 'none'" in own
    assert page.index(own) < page.index("<title")


def test_so_does_every_page():
    package = Path(dymo_med.__file__).parent
    templates = package / "inference" / "templates"
    whole = {
        t.name
        for t in templates.glob("*.j2")
        if t.read_text(encoding="utf-8").startswith("<!doctype")
    }
    assert len(whole) >= 6
    for source in package.rglob("*.py"):
        text = source.read_text(encoding="utf-8")
        made = whole & set(re.findall(r'get_template\("([^"]+)"\)', text))
        assert text.count("guarded(") >= len(made), source
