"""A run that was killed and resumed ends with the same bundle, bit for bit."""

import csv
import json
import signal

import pytest
import torch
import yaml

from dymo_med.data.simulate import simulate
from dymo_med.errors import ConfigError
from dymo_med.training.train import train
from tests.killed import killed

RECIPE = """
name: tiny
seed: 3
imputer: {name: mopoe, latent: 4, dim: 8, width: 4, grid: 2, hidden: 8}
backbone: {name: transformer, dim: 16, heads: 2, layers: 1, projection: 4, width: 4, grid: 1}
imputer_training: {epochs: 4, batch_size: 8}
backbone_training:
  epochs: 6
  batch_size: 8
  subsets: 3
  prototype_epoch: 1
  augmentation: {mirror_axes: [0], shift_voxels: 1, intensity: 0.1}
"""


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    torch.set_num_threads(1)
    cohort = simulate(folder / "cohort", patients=40, seed=5, size=16)
    # Two scans and two tables are enough to interrupt, and have 15 subsets instead of 127.
    text = yaml.safe_load((cohort / "cohort.yaml").read_text(encoding="utf-8"))
    for name in ("t1", "t1ce", "symptoms"):
        del text["modalities"][name]
    (cohort / "cohort.yaml").write_text(yaml.safe_dump(text, sort_keys=False), encoding="utf-8")
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE)
    whole = train(recipe, cohort, folder / "whole", device="cpu")
    return recipe, cohort, whole


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("stop_after", [1, 4, 7])
def test_resume_after_an_interruption_gives_the_same_bits(setting, tmp_path, stop_after):
    recipe, cohort, whole = setting
    checksums = (whole / "checksums.json").read_text(encoding="utf-8")
    seen = 0

    def stop(*_):
        nonlocal seen
        seen += 1
        if seen == stop_after:
            raise Interrupted

    out = tmp_path / "run"
    with pytest.raises(Interrupted):
        train(recipe, cohort, out, device="cpu", progress=stop)
    bundle = train(recipe, cohort, out, device="cpu", resume=True)
    assert (bundle / "checksums.json").read_text(encoding="utf-8") == checksums
    log = (out / "log.csv").read_text(encoding="utf-8").splitlines()
    assert len(log) == 1 + 4 + 6


@pytest.mark.parametrize("settings", ["", "  subsets: 3\n  parts: 2\n  reduction: sum\n"])
def test_decoupled_gradients_train_and_resume_with_the_same_bits(setting, tmp_path, settings):
    recipe = tmp_path / "decoupled.yaml"
    lines = [
        line for line in RECIPE.splitlines() if "imputer" not in line and "subsets" not in line
    ]
    text = "\n".join(lines).replace("epochs: 6", "epochs: 3\n  gradient: gmd")
    text = text.replace("prototype_epoch: 1", "prototype_epoch: 9")
    recipe.write_text(f"{text}\n{settings}imputer: {{name: template}}\n")
    whole = train(recipe, setting[1], tmp_path / "whole", device="cpu")
    with (tmp_path / "whole" / "log.csv").open(encoding="utf-8") as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)]
    assert len(losses) == 3
    assert losses[-1] < losses[0]

    def stop(*_):
        raise Interrupted

    with pytest.raises(Interrupted):
        train(recipe, setting[1], tmp_path / "run", device="cpu", progress=stop)
    again = train(recipe, setting[1], tmp_path / "run", device="cpu", resume=True)
    one, two = (f / "checksums.json" for f in (whole, again))
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.slow
def test_killed_twice_and_resumed_it_gives_the_same_bits(setting, tmp_path):
    recipe, cohort, whole = setting
    out = tmp_path / "run"
    command = ["train", recipe, "--cohort", cohort, "--out", out, "--device", "cpu", "-q"]
    for files, more in ((4, []), (9, ["--resume"])):  # while both networks are being trained
        assert killed([*command, *more], files) == -signal.SIGKILL
        assert (out / "checkpoints").exists() and not (out / "bundle").exists()
    again = train(recipe, cohort, out, device="cpu", resume=True)
    checksums = [(f / "checksums.json").read_bytes() for f in (again, whole)]
    assert checksums[0] == checksums[1]
    assert not list(out.rglob(".dymo-med*"))  # what the killed ones left


def test_another_recipe_cannot_resume(setting, tmp_path):
    _recipe, cohort, whole = setting
    other = tmp_path / "other.yaml"
    other.write_text(RECIPE.replace("seed: 3", "seed: 4"))
    with pytest.raises(ConfigError, match="belongs to another recipe"):
        train(other, cohort, whole.parent, device="cpu", resume=True)


def test_a_run_is_not_overwritten_without_resume(setting, tmp_path):
    recipe, cohort, _ = setting
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "precious.txt").write_text("x")
    with pytest.raises(ConfigError, match=r"not empty.*--resume"):
        train(recipe, cohort, tmp_path / "run", device="cpu")


def test_the_bundle_says_what_it_was_fitted_on(setting):
    _, _, bundle = setting
    metadata = json.loads((bundle / "configs" / "metadata.json").read_text(encoding="utf-8"))
    hashed = metadata["provenance"]["patients"]
    records = metadata["provenance"]["records"]
    assert {s: len(set(v)) for s, v in hashed.items()} == records
    assert not set(hashed["train"]) & set(hashed["calibration"])
    assert "test" not in hashed
