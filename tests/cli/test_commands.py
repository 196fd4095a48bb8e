"""The commands as a user runs them."""

import itertools
import json
import subprocess
import sys

import pytest

from dymo_med.data.patient import read_patient
from dymo_med.inference.predict import predict_batch


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nfrom dymo_med.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'monai', 'pandas', 'captum', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    for command in ("demo", "simulate", "check", "train", "predict", "evaluate", "impute"):
        assert command in done.stdout


@pytest.mark.slow
def test_every_pattern_of_modalities_is_answered(bundle, cohort):
    """All 2^M - 1 non-empty patterns, absent scans and absent tables included."""
    names = [spec.name for spec in bundle.specs]
    for entry in cohort.records:
        record = read_patient(entry.folder, bundle.specs, missing_values=bundle.missing_values)
        if set(record.modalities) == set(names):
            break
    patterns = [
        kept for size in range(1, len(names) + 1) for kept in itertools.combinations(names, size)
    ]
    assert len(patterns) == 2 ** len(names) - 1
    for kept in patterns:
        hidden = record.without([n for n in names if n not in kept])
        (prediction,) = predict_batch(bundle, [hidden], explain=False, seed=0)
        assert prediction.observed == kept
        assert set(prediction.recovered) >= set(names) - set(kept)
        assert abs(sum(prediction.probabilities) - 1) < 1e-6
        assert set(prediction.trusted) | set(prediction.rejected) == set(prediction.recovered)


def test_predict_twice_gives_the_same_bits(bundle_dir, cohort, tmp_path):
    from dymo_med.cli import main

    texts = []
    for out in (tmp_path / "one", tmp_path / "two"):
        folder = cohort.records[0].folder
        arguments = ["predict", "-i", str(folder), "-b", str(bundle_dir), "-o", str(out), "-q"]
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 0
        answer = json.loads((out / "prediction.json").read_text(encoding="utf-8"))
        for changing in ("created", "seconds"):
            answer.pop(changing, None)
        texts.append((json.dumps(answer), (out / "selection.csv").read_bytes()))
    assert texts[0] == texts[1]
