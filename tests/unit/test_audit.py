"""The audit of an earlier prediction: what was edited, swapped or lost is found."""

import json
import shutil

import pytest

from dymo_med.cli import main
from dymo_med.inference.audit import audit, replay
from dymo_med.inference.check import check
from dymo_med.inference.pdf import render_pdf
from dymo_med.inference.predict import predict_patient, write_prediction
from dymo_med.inference.prediction_file import PredictionFile, read_prediction
from dymo_med.selection import SELECTORS


@pytest.fixture(scope="module")
def outputs(bundle, cohort_dir, tmp_path_factory):
    """A prediction by every selector, of a patient who lacks something."""
    root = tmp_path_factory.mktemp("audit")
    for name in SELECTORS:
        folder = cohort_dir / "patients" / "p011_v2"
        predict_patient(folder, bundle.with_selector(name), root / name, draws=3)
    return root


@pytest.fixture
def out(outputs, tmp_path):
    """A copy by the published rule, to spoil."""
    return shutil.copytree(outputs / "dymo", tmp_path / "out")


def edit(out, change, *, rehash=False):
    """Edit the file; `rehash`: as somebody would who knows the format, files beside it too."""
    path = out / "prediction.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    change(data)
    if rehash:
        data.pop("content_sha256")
        write_prediction(PredictionFile.make(data), out)
    else:
        path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def said(out):
    return " ".join(str(p) for p in audit(out).problems)


@pytest.mark.parametrize("name", SELECTORS)
def test_every_selector_is_replayed(outputs, name):
    found = audit(outputs / name)
    assert found.problems == () and found.reproduced
    file = read_prediction(outputs / name / "prediction.json")
    assert found.admitted == file.trusted and file.recovered


@pytest.mark.parametrize("name", SELECTORS)
def test_all_records_are_replayed(bundle, cohort, tmp_path, name):
    for entry in cohort.records[:6]:
        folder = tmp_path / entry.record_id
        predict_patient(entry.folder, bundle.with_selector(name), folder, explain=False, draws=0)
        found = audit(folder)
        assert found.problems == () and found.reproduced, entry.record_id


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d["probabilities"].__setitem__(0, 0.123),
        lambda d: d["steps"][0].update(reward=0.5),
        lambda d: d["steps"][-1].update(decision="stopped"),
        lambda d: d.update(seed=1),
        lambda d: d["exhibits"]["cells"][0].update(text="1"),
        lambda d: d["performance"].update(patients=1000),
        lambda d: d["attributions"].pop(),
        lambda d: d.update(record_id="someone else"),
        lambda d: d.update(warnings=[]) or d["sources"].clear(),
    ],
)
def test_any_number_changed_by_hand_is_found(out, change):
    edit(out, change)
    assert "it was changed after it was written" in said(out)
    report = check(out)
    assert report.kind == "prediction" and report.exit_code == 3


REHASHED = {
    "probabilities": (lambda d: d["probabilities"].__setitem__(0, 0.123), "add up to 1"),
    "answer": (lambda d: d["probabilities"].reverse(), "not the most probable class"),
    "reward": (lambda d: d["steps"][0].update(reward=0.9), "reward does not follow"),
    "factor": (lambda d: d["steps"][0].update(factor=0.01), "factor does not follow"),
    "threshold": (lambda d: d["steps"][0].update(threshold=-9.0), "not that of the rule"),
    "trust": (lambda d: d["steps"][0].update(trust=0.9), "decides by reward"),
    "frequency": (lambda d: d["frequency"].update(count=1), "does not follow from the prob"),
    "status": (lambda d: d.update(status="answered", status_reasons=[]), "status: it does not"),
    "draws": (lambda d: d["draws"]["own"].update(changes=1.0), "does not follow from the draws"),
    "acquire": (lambda d: d["acquire"]["gains"][0].update(bits=9.0), "do not follow from"),
    "performance": (lambda d: d["performance"].update(pattern_patients=99), "whether few were"),
    "shapley": (lambda d: d["attributions"][0].update(value=0.5), "do not add up to the prob"),
    "unused": (lambda d: d["attributions"][0].update(modality="x"), "x was not used"),
    "set": (lambda d: d["prediction_set"].update(classes=["none"]), "does not hold the answer"),
    "sources": (lambda d: d["sources"].clear(), "not those of the observed"),
}


@pytest.mark.parametrize("name", REHASHED)
def test_what_does_not_follow_is_found_even_if_hashed_again(out, name):
    change, expected = REHASHED[name]
    edit(out, change, rehash=True)
    text = said(out)
    assert expected in text and "changed after" not in text


@pytest.mark.parametrize("name", ["dymo", "gate", "subset_average", "simultaneous", "trust_all"])
def test_an_edited_decision_is_found(outputs, tmp_path, name):
    """Trusted and rejected exchanged throughout, and everything hashed again."""
    out = shutil.copytree(outputs / name, tmp_path / "out")

    def change(data):
        data["trusted"], data["rejected"] = data["rejected"], data["trusted"]
        swap = {"admitted": "rejected", "rejected": "admitted", "stopped": "admitted"}
        for step in data["steps"]:
            step["decision"] = swap.get(step["decision"], step["decision"])

    edit(out, change, rehash=True)
    found = audit(out)
    assert not found.reproduced
    assert "by its own steps the decision admits" in said(out)


def test_a_step_left_out_is_found(out):
    edit(out, lambda d: d["steps"].pop(0), rehash=True)
    assert "the candidates should be" in said(out)


def test_a_step_too_many_is_found(out):
    edit(out, lambda d: d["steps"].append({**d["steps"][-1], "step": 9}), rehash=True)
    assert "nothing is left to decide" in said(out)


def test_weights_of_an_average_are_checked(outputs, tmp_path):
    out = shutil.copytree(outputs / "subset_average", tmp_path / "out")

    def spoil(d):  # the heaviest of those that say something of a recovery
        heaviest = max((s for s in d["subsets"] if s["admitted"]), key=lambda s: s["weight"])
        heaviest.update(weight=0.0)

    edit(out, spoil, rehash=True)
    text = said(out)
    for expected in ("weights do not add up", "not the weight of the subsets", "weighted mean"):
        assert expected in text


def test_swapped_lost_and_added_files_are_found_all_at_once(out):
    made = sorted(p for p in (out / "recovered").iterdir())
    made[0].write_bytes(b"another patient's")
    (out / "recovered" / "extra.nii.gz").write_bytes(b"x")
    (out / "selection.csv").write_text("step\n1\n", encoding="utf-8")
    page = out / "report.html"
    page.write_text(page.read_text(encoding="utf-8") + " ", encoding="utf-8")
    text = said(out)
    assert text.count("changed or swapped") == 1 and "extra.nii.gz" in text
    assert text.count("not what prediction.json says") == 2
    assert len(audit(out).problems) == 4
    made[0].unlink()
    page.unlink()
    text = said(out)
    assert "the recovered file of" in text and "report.html: the file is absent" in text


def test_the_pdf_is_audited_whenever_it_was_made(out, outputs, tmp_path, monkeypatch):
    """It is what is printed and signed."""
    with pytest.raises(SystemExit):
        main(["report", str(out / "prediction.json"), "--pdf", "-q"])
    assert audit(out).problems == ()
    pdf = out / "report.pdf"
    own = pdf.read_bytes()
    other = read_prediction(outputs / "trust_all" / "prediction.json")
    swapped = render_pdf(other)
    for content in (own + b"%", swapped, b""):
        pdf.write_bytes(content)
        assert "report.pdf: the file is not what prediction.json says" in said(out)
    assert check(out).exit_code == 3
    # Other software makes other bytes; whose it is can still be told.
    pdf.write_bytes(own)
    monkeypatch.setattr("dymo_med.inference.pdf.maker", lambda: "dymo-med 99")
    assert audit(out).problems == ()
    pdf.write_bytes(swapped)
    assert "report.pdf" in said(out)
    pdf.unlink()
    assert audit(out).problems == ()


def test_a_file_outside_the_folder_is_not_read(out, tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")

    def change(data, to):
        name = next(iter(data["recovered_files"]))
        data["recovered_files"][name]["file"] = to

    for to in ("../secret.txt", str(secret), "recovered/../../secret.txt"):
        edit(out, lambda d, to=to: change(d, to), rehash=True)
        assert "is not in the folder" in said(out)
    (out / "recovered" / "link").symlink_to(secret)
    edit(out, lambda d: change(d, "recovered/link"), rehash=True)
    assert "is not in the folder" in said(out)


def test_a_file_of_another_format_is_one_problem_per_fault(out):
    edit(out, lambda d: (d.pop("rule"), d.update(seed="x")))
    report = check(out)
    assert report.exit_code == 3 and len(report.problems) == 2 and report.admitted is None
    assert not any("got x" in str(p).lower() for p in report.problems)


def test_the_command_says_what_was_replayed(outputs, out, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["check", str(out)])
    assert stopped.value.code == 0
    assert "as stated" in capsys.readouterr().out
    edit(out, lambda d: d.update(seed=1))
    with pytest.raises(SystemExit) as stopped:
        main(["check", str(out), "--json"])
    assert stopped.value.code == 3
    told = json.loads(capsys.readouterr().out)
    assert told["kind"] == "prediction" and told["reproduced"] is True
    assert told["admitted"] == list(read_prediction(out / "prediction.json").trusted)
    assert len(told["problems"]) == 2  # the number, and the page that shows it


def test_replaying_needs_nothing_but_the_file(outputs):
    for name in SELECTORS:
        file = read_prediction(outputs / name / "prediction.json")
        assert replay(file) == (file.trusted, [])


def test_reports_of_an_evaluation_can_be_audited(bundle, cohort, tmp_path):
    from dymo_med.inference.evaluate import evaluate
    from dymo_med.inference.report import render

    done = evaluate(bundle, cohort, tmp_path / "e", reports=2)
    folders = sorted((done.out / "reports").iterdir())
    assert len(folders) == 2
    for folder in folders:
        assert audit(folder).problems == ()
        file = read_prediction(folder / "prediction.json")
        assert render(file) == (folder / "report.html").read_text(encoding="utf-8")
        assert file.command is None and file.recovered_files == {}
