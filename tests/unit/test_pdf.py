import io
import subprocess
import sys

import numpy as np
import pytest
from pypdf import PdfReader
from typer.testing import CliRunner

from dymo_med.cli import app
from dymo_med.errors import PatientDataError
from dymo_med.inference.pdf import render_pdf
from dymo_med.inference.pictures import Scan
from tests.unit.test_report import (
    attribution,
    cell,
    exhibits,
    file_of,
    prediction,
    source,
    volume,
)

LONG = "x" * 10_000
HOSTILE = {
    "markup": '<b>&amp;<para><font color="[1,2]">{{ 7*7 }}</b>&\'</script>',
    "control": "a\x00b\x07c\x1b[31md\ne\tf\x7fg\x85h",
    "turning": "\u202egrade\u202c \u2067x \u05e9\u05dc\u05d5\u05dd \u0627\u0644\u0639",
    "unknown": "\u4e2d\u6587 \U0001f600 \ufdd0 \ue000 \u0301",
    "long": LONG,
    "long_wide": "\u4e2d" * 10_000,
    "blank": " ",
}


def interval(value, low, high):
    return {"value": value, "low": low, "high": high}


def figures(method):
    return {
        "method": method,
        "auroc": interval(0.91, 0.85, 0.96),
        "brier": interval(0.12, 0.09, 0.15),
        "ece": interval(0.05, None, None),
    }


def full(**changes):
    """A prediction in which everything that can be known is known."""
    drawn = {
        "probabilities": ((0.3, 0.7), (0.6, 0.4)),
        "low": (0.3, 0.4),
        "median": (0.45, 0.55),
        "high": (0.6, 0.7),
        "changes": 0.5,
    }
    given = {
        "prediction_set": {
            "classes": ("high",),
            "coverage": 0.9,
            "compared_with": "all",
            "calibrated_on": 64,
            "least": 9,
        },
        "draws": {"n": 2, "seed": 7, "central": 0.9, "own": drawn, "trust_all": drawn},
        "acquire": {
            "draws": 2,
            "bits": 0.9,
            "probability": 0.68,
            "gains": (
                {
                    "modality": "t2",
                    "kind": "missing",
                    "state": "rejected",
                    "bits": 0.21,
                    "probability": 0.7,
                    "changes": 0.5,
                    "differs": 0.5,
                    "probabilities": ((0.3, 0.7), (0.6, 0.4)),
                },
            ),
            "unknown": ("genetics",),
        },
        "performance": {
            "level": "pattern",
            "group": "t1+labs",
            "patients": 4,
            "cases": 9,
            "own": figures("dymo"),
            "observed_only": figures("observed_only"),
            "pattern_patients": 4,
            "tested_fewer_than_30": True,
        },
        "command": "dymo-med predict --patient-dir sub-0042",
    }
    return prediction(**(given | changes))


def pages(content):
    assert content.startswith(b"%PDF-")
    return [" ".join(page.extract_text().split()) for page in PdfReader(io.BytesIO(content)).pages]


def test_what_a_clinician_needs_is_said():
    found = pages(render_pdf(file_of(full(), exhibits())))
    said = " ".join(found)
    for sentence in (
        "Research decision support. Not a diagnosis.",
        "answered with caution",
        "77 %",
        "high is the more likely answer",
        "about 77 are high; about 23 are not",
        "Prediction set.",
        "77 %, in the set",
        "23 %, outside the 90 % set",
        "everything filled in would say otherwise",
        "draws 40 % to 70 %",
        "SYNTHETIC is written into the pixels",
        "flair was trusted",
        "t2 was rejected",
        "Shapley values",
        "+20.0",
        "\N{MINUS SIGN}7.0",
        "0.91 (0.85 to 0.96)",
        "Hardly tested",
        "What would measuring tell?",
        "\N{MINUS SIGN}0.21 bit",
        "Nothing can be said of genetics",
        "Trusting every recovery would say low, not high.",
        "Known limits",
        "f00dface" * 8,
        "ab" * 32,
    ):
        assert sentence in said, sentence
    assert "hidden-patient-key" not in said
    assert "Trusting every recovery" in found[0]  # no warning is left for a later sheet


def test_every_sheet_says_whose_it_is_and_which_of_how_many():
    content = render_pdf(file_of(full(), exhibits()))
    found = pages(content)
    assert 2 <= len(found) <= 6
    for number, page in enumerate(found, 1):
        assert f"Page {number} of {len(found)}" in page
        assert "Record sub-0042" in page and "Not a diagnosis" in page
    box = PdfReader(io.BytesIO(content)).pages[0].mediabox
    assert (round(box.width), round(box.height)) == (595, 842)


def test_the_same_prediction_gives_the_same_bytes(tmp_path):
    file = file_of(full(), exhibits())
    content = render_pdf(file)
    assert render_pdf(file) == content
    (tmp_path / "prediction.json").write_text(file.to_text(), encoding="utf-8")
    command = [sys.executable, "-m", "dymo_med", "report", str(tmp_path / "prediction.json")]
    subprocess.run([*command, "--pdf", "-q"], check=True)
    assert (tmp_path / "report.pdf").read_bytes() == content


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_text_is_text(kind):
    text = HOSTILE[kind]
    p = full(
        record_id=text,
        classes=("low", text),
        predicted=text,
        observed=("t1", text),
        partly=(),
        recovered=("t2", "flair"),
        trusted=("flair",),
        absent=(text + "2",),
        warnings=(text, text + " " + text),
        bundle_name=text,
        sources={text: source(text, text, {"size": text})},
        attributions=(attribution(text, "", 0.1, "shapley"),),
        target=text,
        command=text,
    )
    x = exhibits(
        bundle_description=text,
        scans=(Scan(text, volume(), (), "rejected", True, np.ones((10, 12, 8))),),
        cells=(cell("t2", text, text, text),),
    )
    found = pages(render_pdf(file_of(p, x)))
    assert len(found) < 12
    said = "".join(found).replace(" ", "")
    assert not set(said) & set("\x00\x07\x1b\u202e\u202c\u2067")
    if kind == "markup":
        assert text.replace(" ", "") in said
    if kind == "turning":
        assert "<U+202E>grade<U+202C>" in said
    if kind == "unknown":
        assert "<U+4E2D><U+6587><U+1F600>" in said


def test_nothing_explained_nothing_known():
    p = prediction(attributions=(), performance=None, acquire=None)
    said = " ".join(pages(render_pdf(file_of(p, exhibits(scans=(), convergence=None)))))
    assert "Attributions were not computed" in said
    assert "Not computed: no draws" in said
    assert "This bundle does not say how good" in said


def test_nothing_missing():
    p = prediction(
        partly=(), recovered=(), trusted=(), rejected=(), absent=(), steps=(), warnings=()
    )
    x = exhibits(scans=(), cells=())
    p["attributions"] = tuple(a for a in p["attributions"] if not a["name"])
    said = " ".join(pages(render_pdf(file_of(p, x))))
    assert "Nothing was made up" in said and "SYNTHETIC" not in said
    assert "Nothing is missing." in said


@pytest.mark.parametrize("classes", [3, 12])
def test_any_number_of_classes(classes):
    names = tuple(f"class {k}" for k in range(classes))
    p = (0.4,) + (0.6 / (classes - 1),) * (classes - 1)
    given = prediction(
        classes=names,
        probabilities=p,
        alternatives={"observed_only": p, "trust_all": p},
        base_rates=(1 / classes,) * classes,
    )
    assert "class 0 is the most likely answer" in " ".join(
        pages(render_pdf(file_of(given, exhibits())))
    )


def test_flat_colour_pictures_and_many_rows():
    rng = np.random.default_rng(0)
    scans = (
        Scan("film", rng.random((1, 20, 300)), (), "observed", False, rng.random((20, 300))),
        Scan("skin", rng.random((3, 300, 20)), (), "trusted", False),
        Scan("cut", rng.random((3, 20, 30)), (), "rejected", False),
    )
    p = prediction(warnings=tuple(f"warning {i}" for i in range(200)))
    said = " ".join(pages(render_pdf(file_of(p, exhibits(scans=scans)))))
    assert "warning 199" in said and "\N{EM DASH} SYNTHETIC" in said


def test_a_picture_that_is_none_is_an_error():
    x = exhibits()
    x["scans"][0]["pictures"][0]["png"] = "data:image/png;base64,AAAA"
    with pytest.raises(PatientDataError, match="picture"):
        render_pdf(file_of(prediction(), x))


def test_the_command_writes_it_beside_the_page(tmp_path):
    path = tmp_path / "prediction.json"
    path.write_text(file_of(prediction(), exhibits()).to_text(), encoding="utf-8")
    result = CliRunner().invoke(
        app, ["report", str(path), "--out", str(tmp_path / "page.html"), "--pdf"]
    )
    assert result.exit_code == 0, result.output
    assert sorted(f.name for f in tmp_path.iterdir()) == [
        "page.html",
        "page.pdf",
        "prediction.json",
    ]
