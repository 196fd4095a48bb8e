"""Segmenting one patient, and a cohort of them."""

import base64
import csv
import gzip
import io
import json
import shutil
from collections import Counter
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image
from pypdf import PdfReader

from dymo_med.backbones import SharedUNet
from dymo_med.backbones.shared_unet import ModalityOutput
from dymo_med.bundle_segmentation import load_segmentation_bundle
from dymo_med.cli import main
from dymo_med.conformal import Bound
from dymo_med.data.cohort import read_cohort
from dymo_med.data.gate import measure
from dymo_med.data.masks import dice, read_known
from dymo_med.data.patient import read_patient
from dymo_med.data.simulate import SEGMENTATION
from dymo_med.errors import BundleError, ConfigError, PatientDataError, RefusedError
from dymo_med.inference.check import check
from dymo_med.inference.overlays import COLOURS, cut_place
from dymo_med.inference.segment import (
    impute_segmented,
    segment_patient,
)
from dymo_med.inference.segment_evaluate import evaluate_segmentation, hd95, outcome_of
from dymo_med.inference.segmentation_file import WIDE, read_segmentation
from dymo_med.inference.segmentation_page import render_segmentation
from dymo_med.inference.segmentation_pdf import render_segmentation_pdf
from dymo_med.outline import segment_record
from dymo_med.outline_bounds import LEVELS, OutlineBounds, Overlap, Threshold
from dymo_med.types import Norms
from tests.segmentation import (  # noqa: F401
    masked_cohort,
    masked_dir,
    segmentation_bundle,
    segmentation_dir,
)


class Thresholds(SharedUNet):
    """A network that finds what is bright: one threshold per region, above the mean of the scan."""

    def run(self, name, values):
        inside = values * (values != 0)
        logits = torch.cat([inside - c for c in (0.2, 0.5, 0.8)], 1) * 8
        return ModalityOutput(logits, values.flatten(2).mean(-1).expand(-1, self.embedding_size))


@pytest.fixture(scope="module")
def bundle(segmentation_bundle):  # noqa: F811
    """The small bundle with a network that finds something."""
    kind = segmentation_bundle.network
    options = SharedUNet.Options(widths=(8, 16), width_ratio=0.5, groups=2)
    network = Thresholds(kind.specs, kind.regions, options).eval()
    return replace(segmentation_bundle, network=network)


def turned(values):
    """Index (k, 15 - i, j) of what is returned is (i, j, k) of what is given."""
    return np.ascontiguousarray(values[::-1].transpose(2, 0, 1))


@pytest.fixture
def patient(masked_dir, tmp_path):  # noqa: F811
    """A patient with two of four scans, stored turned and mirrored."""
    folder = tmp_path / "p01"
    folder.mkdir()
    turn = np.array([[0, -1, 0, 15], [0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 1.0]])
    for name in ("t2", "flair"):
        image = nib.load(masked_dir / "patients" / "s3-p0001" / f"{name}.nii.gz")
        values = turned(np.asarray(image.dataobj))
        nib.save(nib.Nifti1Image(values, image.affine @ turn), folder / f"{name}.nii.gz")
    return folder


def test_a_patient_is_segmented_on_the_own_grid(bundle, patient, masked_dir, tmp_path):  # noqa: F811
    out = tmp_path / "out"
    answer = segment_patient(patient, bundle, out, probabilities=True, selector="trust_all")
    assert answer.observed == ("t2", "flair") and answer.trusted == ("t1", "t1ce")
    reference = nib.load(patient / "t2.nii.gz")
    written = nib.load(out / "segmentation.nii.gz")
    assert written.shape == reference.shape
    assert np.abs(written.affine - reference.affine).max() < 1e-4
    labels = np.asarray(written.dataobj)
    assert labels.dtype == np.uint8 and set(np.unique(labels)) == {0, 1, 2, 4}
    assert np.array_equal(labels, answer.labels)
    voxel_ml = abs(np.linalg.det(reference.affine[:3, :3])) / 1000
    assert answer.volumes_ml["WT"] == pytest.approx((labels > 0).sum() * voxel_ml)
    assert answer.volumes_ml["ET"] == pytest.approx((labels == 4).sum() * voxel_ml)
    map_ = np.asarray(nib.load(out / "probability_WT.nii.gz").dataobj)
    assert np.array_equal(map_ > 0.5, labels > 0)
    # As stored in the ordinary way, the same is found at the same places.
    plain = tmp_path / "plain"
    plain.mkdir()
    for name in ("t2", "flair"):
        shutil.copy(masked_dir / "patients" / "s3-p0001" / f"{name}.nii.gz", plain)
    same = segment_patient(plain, bundle, selector="trust_all").labels
    assert np.array_equal(turned(same), labels)
    assert {p.name for p in (out / "recovered").iterdir()} == {
        "t1_synthetic.nii.gz",
        "t1ce_synthetic.nii.gz",
    }
    # The files fit together; the page can be made again; a changed file is noticed.
    assert not check(out).problems
    file = read_segmentation(out / "prediction.json")
    assert render_segmentation(file) == (out / "report.html").read_text(encoding="utf-8")
    assert 'src="http' not in (out / "report.html").read_text(encoding="utf-8")
    text = (out / "prediction.json").read_text(encoding="utf-8")
    changed = json.loads(text)
    changed["regions"][0]["volume_ml"] += 1
    (out / "prediction.json").write_text(json.dumps(changed))
    assert "not that of the labels" in str(check(out).problems[0])
    (out / "segmentation.nii.gz").write_bytes(b"x")
    report = check(out)
    assert report.exit_code == 3 and "not the one that was predicted" in str(report.problems[0])


def test_the_same_patient_gives_the_same_bytes(bundle, patient, tmp_path):
    for name in ("a", "b"):
        segment_patient(patient, bundle, tmp_path / name)
    for file in ("segmentation.nii.gz", "report.html", "selection.csv", "prediction.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    rows = list(csv.DictReader((tmp_path / "a" / "selection.csv").open()))
    assert {r["modality"] for r in rows} <= {"t1", "t1ce"}


def test_pictures_show_the_outlines(bundle, patient, tmp_path):
    segment_patient(patient, bundle, tmp_path / "out", selector="trust_all")
    file = read_segmentation(tmp_path / "out" / "prediction.json")
    assert [(s.modality, s.state) for s in file.scans] == [
        ("t1", "trusted"), ("t1ce", "trusted"), ("t2", "observed"), ("flair", "observed"),
    ]  # fmt: skip
    for cut in file.scans[2].cuts:
        picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(cut.png.split(",")[1]))))
        assert picture.shape == (cut.height, cut.width, 3)
        assert (picture == COLOURS[0]).all(-1).sum() > 20


def test_the_cut_goes_through_the_largest_cross_section():
    regions = np.zeros((1, 6, 6, 6), dtype=bool)
    regions[0, 2, 1:5, 3] = True
    regions[0, 2, 3, 2:5] = True
    body = np.ones((6, 6, 6), dtype=bool)
    assert cut_place(regions, body) == (2, 3, 3)
    assert cut_place(regions & False, body) == (0, 0, 0)


def test_recovered_scans_alone(bundle, patient, tmp_path):
    written = impute_segmented(patient, bundle, tmp_path / "out")
    assert [p.name for p in written] == ["t1_synthetic.nii.gz", "t1ce_synthetic.nii.gz"]
    with pytest.raises(ConfigError, match="recovers nothing"):
        impute_segmented(patient, replace(bundle, trust=None), tmp_path / "other")


def make_constant(path):
    """Replace the values of a scan by one."""
    image = nib.load(path)
    nib.save(nib.Nifti1Image(np.ones(image.shape, np.float32), image.affine), path)


def test_a_refused_scan_is_an_error_or_missing(bundle, patient, tmp_path):
    make_constant(patient / "t2.nii.gz")
    for call in (segment_patient, impute_segmented):
        with pytest.raises(RefusedError, match="t2"):
            call(patient, bundle, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    answer = segment_patient(patient, bundle, tmp_path / "out", treat_refused_as_missing=True)
    assert (answer.observed, answer.refused) == (("flair",), ("t2",)) and "t2" in answer.recovered
    assert "t2: the quality gate refuses it" in (tmp_path / "out" / "report.html").read_text("utf8")
    file = read_segmentation(tmp_path / "out" / "prediction.json")
    assert file.refused == ("t2",) and "--treat-refused-as-missing" in file.command
    made = impute_segmented(patient, bundle, tmp_path / "made", treat_refused_as_missing=True)
    assert "t2_synthetic.nii.gz" in [p.name for p in made]


def test_a_scan_unlike_those_of_training_is_warned_of(bundle, patient):
    flair = read_patient(patient, bundle.specs).modalities["flair"]
    ranges = {name: (figure, figure) for name, figure in measure(flair).items()}
    share = ranges["body"][0]
    ranges["body"] = (3 * share, 4 * share)
    usual = Norms({}, {"flair": ranges}, {"flair": 30})
    answer = segment_patient(patient, replace(bundle, norms=usual))
    (warning,) = [w for w in answer.warnings if "quality gate" in w]
    assert warning.startswith("flair: the quality gate warns of it")


def test_no_header_of_a_scan_gets_into_what_is_written(bundle, patient, tmp_path):
    for path in patient.glob("*.nii.gz"):
        image = nib.load(path)
        for field in ("descrip", "aux_file", "intent_name", "db_name"):
            image.header[field] = b"Doe^Jane 042"
        image.header.extensions.append(nib.nifti1.Nifti1Extension(6, b"Doe^Jane 042"))
        nib.save(nib.Nifti1Image(image.get_fdata(), image.affine, image.header), path)
    planted = patient / "flair.nii.gz"
    assert b"Doe^Jane" in gzip.decompress(planted.read_bytes())
    out = tmp_path / "out"
    segment_patient(patient, bundle, out, probabilities=True, selector="trust_all")
    files = [p for p in out.rglob("*") if p.is_file()]
    assert sum(p.name.endswith(".nii.gz") for p in files) == 1 + 3 + 2
    for path in files:
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix == ".gz" else content
        assert b"Doe^" not in content, path.name


def test_distances_follow_the_conventions():
    a = torch.zeros(3, 8, 8, 8, dtype=torch.bool)
    b = a.clone()
    a[0, 2:4, 2:4, 2:4] = True
    b[0, 2:4, 2:4, 5:7] = True
    a[1, 0, 0, 0] = True
    diagonal = np.hypot(np.hypot(7, 7), 14)
    found = hd95(a, b, (1.0, 1.0, 2.0))
    assert found == [pytest.approx(6.0), pytest.approx(diagonal), 0.0]
    assert hd95(b, a, (1.0, 1.0, 2.0)) == found  # missed counts as made up does
    assert [outcome_of(x, y) for x, y in zip(a, b, strict=True)] == ["found", "invented", "neither"]
    assert outcome_of(b[1], a[1]) == "missed"
    # No outline, however bad, is further off than none.
    corners = torch.zeros(1, 8, 8, 8, dtype=torch.bool)
    corners[0, 0, 0, 0] = True
    far = hd95(corners, corners.flip(1, 2, 3), (1.0, 1.0, 2.0))
    assert far == [pytest.approx(diagonal)]


class Nothing(Thresholds):
    """A network that finds nothing."""

    def run(self, name, values):
        found = super().run(name, values)
        return found._replace(logits=found.logits * 0 - 9)


def test_missed_lesions_are_counted_and_do_not_flatter(bundle, masked_cohort, tmp_path):  # noqa: F811
    options = SharedUNet.Options(widths=(8, 16), width_ratio=0.5, groups=2)
    blind = Nothing(bundle.network.specs, 3, options).eval()
    alone = replace(bundle, trust=None, network=blind)
    evaluate_segmentation(alone, masked_cohort, tmp_path / "out", scenarios=("as-is",))
    cases = table(tmp_path / "out" / "cases.csv")
    missed = [float(r["true_volume_ml"]) > 0 for r in cases]
    assert [r["outcome"] == "missed" for r in cases] == missed and sum(missed) > 8
    for row in table(tmp_path / "out" / "metrics.csv"):
        assert row["invented"] == "0" and int(row["missed"]) <= 4
    rows = [r for r in table(tmp_path / "out" / "metrics.csv") if r["metric"] == "hd95_mm"]
    assert {r["region"] for r in rows} == {"WT", "TC", "ET", "mean"}
    whole = rows[0]
    assert (whole["missed"], whole["undefined"]) == ("4", "0")
    sides = 15 * masked_cohort.specs[0].spacing_mm[0]
    assert float(whole["value"]) >= 0.9 * np.sqrt(3) * sides
    page = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    assert "counts with the diagonal of the scan" in page and "4 / 0" in page


def test_each_scan_is_looked_at_once_whatever_the_subsets(
    bundle,
    masked_cohort,  # noqa: F811
    tmp_path,
    monkeypatch,
):
    """Four passes for four scans and fifteen subsets; the same answers as of each subset alone."""
    looked = []
    run = Thresholds.run
    monkeypatch.setattr(
        Thresholds, "run", lambda self, name, x: looked.append(name) or run(self, name, x)
    )
    alone = replace(bundle, trust=None)
    evaluate_segmentation(alone, masked_cohort, tmp_path / "out")
    records = masked_cohort.in_split("test")
    assert Counter(looked) == dict.fromkeys((s.name for s in bundle.specs), len(records))
    record = read_known(records[0], masked_cohort)
    for recovers in (alone, bundle):
        whole = segment_record(recovers, record, methods=["observed_only"])
        some = record.without(["t1", "flair"])
        again = segment_record(recovers, some, methods=["observed_only"])
        looked.clear()
        reused = segment_record(recovers, some, methods=["observed_only"], seen=whole)
        made = [] if recovers.trust is None else ["t1", "flair"]  # what is recovered is another
        assert looked == made
        for method in again.traces:
            assert torch.equal(reused.probabilities(method), again.probabilities(method))


@pytest.fixture(scope="module")
def evaluated(bundle, masked_dir, tmp_path_factory):  # noqa: F811
    root = tmp_path_factory.mktemp("evaluation")
    cohort_dir = root / "cohort"
    shutil.copytree(masked_dir, cohort_dir)
    cohort = read_cohort(cohort_dir / SEGMENTATION)
    (cohort.in_split("test")[1].folder / "t2.nii.gz").write_bytes(b"no scan")
    make_constant(cohort.in_split("test")[3].folder / "t1ce.nii.gz")
    out = root / "out"
    result = evaluate_segmentation(
        replace(bundle, trust=None), cohort, out, scenarios=("subsets", "drop:t1")
    )
    return cohort, out, result


def table(path):
    with path.open(encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def test_every_subset_of_every_case_is_measured(evaluated, bundle):
    cohort, out, result = evaluated
    assert (result.records, result.failures) == (4, 2)
    rows = table(out / "cases.csv")
    assert len(rows) == 2 * (15 + 1) * 3
    assert len({r["observed"] for r in rows if r["scenario"] == "subsets"}) == 15
    unreadable, refused = table(out / "failures.csv")
    assert unreadable["stage"] == "read" and "t2.nii.gz" in unreadable["message"]
    assert refused["stage"] == "gate" and "t1ce.nii.gz" in refused["message"]
    # One case by hand.
    entry = cohort.in_split("test")[0]
    answer = segment_patient(entry.folder, bundle, selector="observed_only")
    true = np.asarray(nib.load(entry.folder / "seg.nii.gz").dataobj)
    mine = [r for r in rows if r["record_id"] == entry.record_id and r["region"] == "TC"]
    row = next(r for r in mine if r["observed"].count("+") == 3)
    found = [torch.from_numpy(np.isin(x, (1, 4))) for x in (answer.labels, true)]
    assert float(row["dice"]) == pytest.approx(float(dice(*found)), abs=1e-6)
    assert float(row["volume_error_ml"]) == pytest.approx(
        float(row["volume_ml"]) - float(row["true_volume_ml"]), abs=1e-6
    )


def test_tables_page_and_heat_map_are_written(evaluated):
    _, out, _ = evaluated
    rows = table(out / "metrics.csv")
    everything = [r for r in rows if r["scenario"] == "subsets" and r["metric"] == "dice"]
    by_hand = table(out / "cases.csv")
    values = [
        float(r["dice"]) for r in by_hand if r["scenario"] == "subsets" and r["region"] == "WT"
    ]
    (line,) = [r for r in everything if r["observed"] == "all" and r["region"] == "WT"]
    assert float(line["value"]) == pytest.approx(np.mean(values), abs=1e-6)
    assert float(line["low"]) <= float(line["value"]) <= float(line["high"])
    soft = [r for r in rows if r["metric"] == "soft_dice_batch4"]
    assert soft and all(r["low"] == "" for r in soft)
    assert Image.open(out / "subsets_observed_only.png").size[0] > 300
    page = (out / "index.html").read_text(encoding="utf-8")
    assert "subsets_observed_only.png" in page and "drop:t1" in page
    assert "scans_observed_only.png" in page and (out / "scans_observed_only.png").is_file()
    by_number = {
        int(r["scans"]): float(r["dice"]) for r in table(out / "scans.csv") if r["region"] == "WT"
    }
    for number in range(1, 5):
        one = [
            float(r["dice"])
            for r in by_hand
            if (r["scenario"], r["region"], r["observed"].count("+") + 1)
            == ("subsets", "WT", number)
        ]
        assert by_number[number] == pytest.approx(np.mean(one), abs=1e-6)


def test_soft_dice_sums_over_four_cases():
    from dymo_med.inference.segment_evaluate import _soft_dice

    about = {"scenario": "s", "observed": "a", "method": "m", "region": "WT"}
    rows = [about | {"sums": [float(i), 2.0 * i, 3.0]} for i in range(6)]
    _soft_dice(rows)
    first = (2 * (0 + 1 + 2 + 3) + 1) / (2 * 6 + 12 + 1)
    assert [r["soft_dice_batch4"] for r in rows[:4]] == [pytest.approx(first)] * 4
    assert rows[5]["soft_dice_batch4"] == pytest.approx((2 * 9 + 1) / (18 + 6 + 1))


def test_an_interrupted_evaluation_goes_on(evaluated, bundle, tmp_path):
    cohort, out, _ = evaluated
    copy = tmp_path / "copy"
    shutil.copytree(out, copy)
    (copy / ".progress" / "record-00002.json").unlink()
    alone = replace(bundle, trust=None)
    with pytest.raises(ConfigError, match="not empty"):
        evaluate_segmentation(alone, cohort, copy, scenarios=("subsets", "drop:t1"))
    evaluate_segmentation(alone, cohort, copy, scenarios=("subsets", "drop:t1"), resume=True)
    for name in ("cases.csv", "metrics.csv", "index.html"):
        assert (copy / name).read_bytes() == (out / name).read_bytes()
    with pytest.raises(ConfigError, match="another scenarios"):
        evaluate_segmentation(alone, cohort, copy, scenarios=("subsets",), resume=True)


def test_selectors_and_oracle_are_compared(bundle, masked_cohort, tmp_path):  # noqa: F811
    evaluate_segmentation(bundle, masked_cohort, tmp_path / "out", scenarios=("drop:t1,flair",))
    rows = table(tmp_path / "out" / "cases.csv")
    assert {r["method"] for r in rows} == {"observed_only", "trust_all", "dymo", "oracle"}
    assert {r["trusted"] for r in rows if r["method"] == "trust_all"} == {"t1+flair"}
    gains = [r for r in table(tmp_path / "out" / "metrics.csv") if r["metric"] == "dice_gain"]
    assert {r["method"] for r in gains} == {"trust_all", "dymo", "oracle"}


def test_a_cohort_of_another_task_is_refused(bundle, masked_dir, tmp_path):  # noqa: F811
    with pytest.raises(BundleError, match="the tasks differ"):
        evaluate_segmentation(bundle, read_cohort(masked_dir), tmp_path / "a")
    with pytest.raises(ConfigError, match="no table"):
        cohort = read_cohort(masked_dir / SEGMENTATION)
        evaluate_segmentation(bundle, cohort, tmp_path / "b", scenarios=("cells:0.2",))


def run(arguments):
    with pytest.raises(SystemExit) as stopped:
        main([str(a) for a in arguments])
    return stopped.value.code


def test_the_commands(
    segmentation_dir,  # noqa: F811
    bundle_dir,
    masked_dir,  # noqa: F811
    patient,
    tmp_path,
    capsys,
):
    out = tmp_path / "out"
    assert run(["predict", "-i", patient, "-b", segmentation_dir, "-o", out, "-d", "cpu"]) == 0
    assert "WT" in capsys.readouterr().out and (out / "segmentation.nii.gz").is_file()
    assert run(["report", out / "prediction.json"]) == 0
    assert run(["check", out]) == 0 and run(["check", segmentation_dir]) == 0
    assert run(["check", patient, "--against", segmentation_dir]) == 0
    capsys.readouterr()
    for extra in (["--no-explain"], ["--identify"], ["--draws", 20]):
        assert run(["predict", "-i", patient, "-b", segmentation_dir, "-o", out, *extra]) == 2
        assert f"{extra[0]}: the bundle is for a segmentation" in capsys.readouterr().err
    assert run(["impute", "-i", patient, "-b", segmentation_dir, "-o", out, "--identify"]) == 2
    evaluate = ["evaluate", "-b", segmentation_dir, "-c", masked_dir / SEGMENTATION, "-o", out]
    assert run([*evaluate, "--reports", 3]) == 2
    assert "--reports: the bundle is for a segmentation" in capsys.readouterr().err
    assert run(["predict", "-i", patient, "-b", bundle_dir, "-o", out, "--flips"]) == 2
    assert "the bundle is for" in capsys.readouterr().err


def promising(bundle, patterns, threshold=LEVELS[20]):
    """Return the bundle with promises for these patterns, as if calibrated on twelve patients."""
    groups = ("", *patterns)
    regions = bundle.mask.regions
    bounds = OutlineBounds(
        {"observed_only": {r: dict.fromkeys(groups, Bound(12, 0.5)) for r in regions}},
        {"observed_only": {r: dict.fromkeys(groups, Threshold(12, threshold)) for r in regions}},
        {"observed_only": dict.fromkeys(groups, Overlap(12, 0.8, 0.7, 0.9))},
    )
    return replace(bundle, bounds=bounds)


def test_what_is_promised_of_an_outline_is_written_and_shown(bundle, patient, tmp_path):
    out = tmp_path / "out"
    pattern = "+".join(s.name for s in bundle.specs if (patient / s.file).exists())
    answer = segment_patient(patient, promising(bundle, [pattern]), out)
    file = read_segmentation(out / "prediction.json")
    wide = np.asarray(nib.load(out / WIDE).dataobj)
    plain = np.asarray(nib.load(out / "segmentation.nii.gz").dataobj)
    assert np.array_equal(wide, answer.wide) and (wide > 0).sum() > (plain > 0).sum()
    for region in file.regions:
        labels = region.labels
        assert np.isin(wide, labels)[np.isin(plain, labels)].all()
        assert region.wide.volume_ml == pytest.approx(
            np.isin(wide, labels).sum() * file.grid.voxel_ml
        )
        low, high = (np.expm1(np.log1p(region.volume_ml) + s * 0.5) for s in (-1, 1))
        assert (region.interval.low_ml, region.interval.high_ml) == pytest.approx((low, high))
    assert (file.performance.level, file.performance.patients) == ("pattern", 12)
    assert file.status == "caution"
    assert "few_held_back" in {r.code for r in file.status_reasons}
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "answered with caution" in page.lower() and "Wide outline" in page
    assert f"{file.regions[0].interval.high_ml:.1f} mL" in page and "Dice overlap" in page
    for source in (*file.sources.values(), *file.files.values()):
        assert source.sha256 in page
    assert check(out).exit_code == 0
    wide[0, 0, 0] = 4 if wide[0, 0, 0] == 0 else 0
    image = nib.load(out / WIDE)
    nib.save(nib.Nifti1Image(wide, image.affine, image.header), out / WIDE)
    assert any(WIDE in problem.where for problem in check(out).problems)


@pytest.mark.parametrize("promises", ["none", "other scans", "no threshold"])
def test_what_is_not_promised_is_not_said(bundle, patient, tmp_path, promises):
    pattern = "+".join(s.name for s in bundle.specs if (patient / s.file).exists())
    made = {
        "none": bundle if bundle.bounds is None else replace(bundle, bounds=None),
        "other scans": promising(bundle, ["t1"]),
        "no threshold": promising(bundle, [pattern], threshold=None),
    }[promises]
    answer = segment_patient(patient, made, tmp_path / "out")
    file = read_segmentation(tmp_path / "out" / "prediction.json")
    assert answer.wide is None and not (tmp_path / "out" / WIDE).exists()
    assert all(r.wide is None for r in file.regions)
    told = all(r.interval is not None for r in file.regions)
    assert told == (promises == "no threshold")
    codes = {r.code for r in file.status_reasons}
    assert ("volume_unbounded" in codes) == (promises == "other scans")
    assert "Wide outline" not in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_a_refused_scan_is_in_the_status(bundle, patient, tmp_path):
    make_constant(patient / "t2.nii.gz")
    segment_patient(patient, bundle, tmp_path / "out", treat_refused_as_missing=True)
    file = read_segmentation(tmp_path / "out" / "prediction.json")
    assert file.status == "caution" and file.quality["t2"].state == "refuse"
    assert "refused" in {r.code for r in file.status_reasons}
    assert "t2 was brought but refused" in (tmp_path / "out" / "report.html").read_text("utf-8")


def test_a_file_of_another_version_is_refused_with_its_version(bundle, patient, tmp_path):
    segment_patient(patient, bundle, tmp_path / "out")
    path = tmp_path / "out" / "prediction.json"
    path.write_text(path.read_text().replace('"schema_version": 2', '"schema_version": 1'))
    with pytest.raises(PatientDataError, match=r"schema_version 2.*Got 1"):
        read_segmentation(path)


def test_an_evaluation_says_whether_promises_are_kept(bundle, masked_cohort, tmp_path):  # noqa: F811
    everything = "+".join(s.name for s in bundle.specs)
    alone = promising(replace(bundle, trust=None), [everything])
    evaluate_segmentation(alone, masked_cohort, tmp_path / "out", scenarios=("as-is", "drop:t1"))
    rows = table(tmp_path / "out" / "cases.csv")
    for row in rows:
        known = row["observed"] == everything
        assert (row["covered"] != "") == known and (row["wide_missed_share"] != "") == known
        if known:
            inside = (
                float(row["volume_low_ml"])
                <= float(row["true_volume_ml"])
                <= float(row["volume_high_ml"])
            )
            assert float(row["covered"]) == inside
            assert float(row["wide_missed_share"]) <= float(row["missed_share"])
            assert float(row["wide_ml"]) >= float(row["volume_ml"])
    found = table(tmp_path / "out" / "metrics.csv")
    assert {r["scenario"] for r in found if r["metric"] == "covered"} == {"as-is"}
    page = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    assert "in its 90 % interval" in page and "wide outline leaves out" in page


def test_a_trained_bundle_keeps_its_promises_and_older_ones_have_none(
    segmentation_dir,  # noqa: F811
    tmp_path,
):
    stored = json.loads((segmentation_dir / "configs" / "outline.json").read_text())
    assert set(stored) == {"coverage", "missed", "volumes", "thresholds", "overlap"}
    bundle = load_segmentation_bundle(segmentation_dir, "cpu")
    assert bundle.bounds.to_dict() == {k: stored[k] for k in ("volumes", "thresholds", "overlap")}
    groups = bundle.bounds.overlap["observed_only"]
    assert set(bundle.bounds.overlap) == set(bundle.trust.selectors) and len(groups) == 16


def test_the_page_on_paper(bundle, patient, tmp_path):
    out = tmp_path / "out"
    pattern = "+".join(s.name for s in bundle.specs if (patient / s.file).exists())
    segment_patient(patient, promising(bundle, [pattern]), out, pdf=True)
    file = read_segmentation(out / "prediction.json")
    content = (out / "report.pdf").read_bytes()
    assert content == render_segmentation_pdf(file)  # from prediction.json alone
    sheets = PdfReader(io.BytesIO(content))
    said = " ".join(" ".join(page.extract_text() for page in sheets.pages).split())
    assert file.record_id in said and "answered with caution" in said and "Wide outline" in said
    for region in file.regions:
        assert f"{region.volume_ml:.1f} mL" in said and f"{region.interval.high_ml:.1f} mL" in said
    assert sum(len(page.images) for page in sheets.pages) >= 3 * len(file.scans)
    assert check(out).exit_code == 0
    (out / "report.pdf").write_bytes(content.replace(b"/Title", b"/Tit1e", 1))
    assert any("report.pdf" in problem.where for problem in check(out).problems)
