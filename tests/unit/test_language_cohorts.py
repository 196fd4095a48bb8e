"""The cohorts of text, sound and video, and their recipes, on a few made-up utterances."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

from dymo_med.bundle import load_bundle
from dymo_med.config import BackboneTraining
from dymo_med.data.cohort import read_cohort
from dymo_med.inference.check import check
from dymo_med.training import train as module
from dymo_med.training.train import train

REPOSITORY = Path(__file__).resolve().parents[2]
NAMES = ("mosi", "mosei", "iemocap", "meld")
SPLITS = ("train", "validation", "calibration", "test")
# As published, but for what takes time.
SMALL = {"length": 3, "dim": 8, "hidden": 8, "bottleneck": 4, "residual_dims": [4]}
FUSION = {"fusion_dim": 8, "heads": 2, "layers": 1, "memory_layers": 1, "projection": 4}


def write_utterances(folder, name):
    """Write the cohort of a folder in `cohorts`, its sequences cut to three steps."""
    rng = np.random.default_rng(0)
    described = yaml.safe_load((REPOSITORY / "cohorts" / name / "cohort.yaml").read_text())
    for entry in described["modalities"].values():
        entry["length"] = SMALL["length"]
    folder.mkdir()
    (folder / "cohort.yaml").write_text(yaml.safe_dump(described, sort_keys=False))
    task = described["task"]
    answers = task.get("classes") or [-3, -2.2, -1, 0.2, 1, 2, 3]
    labels, splits = [f"record_id,patient_id,{task['target']}"], ["patient_id,split"]
    for split in SPLITS:
        video = f"video_{split}"
        splits.append(f"{video},{split}")
        for i, answer in enumerate(answers):
            labels.append(f"{video}_{i},{video},{answer}")
            at = folder / "patients" / f"{video}_{i}"
            at.mkdir(parents=True)
            for key, entry in described["modalities"].items():
                if split == "test" and i == 0 and key != "text":
                    continue  # an utterance of which only the text is there
                steps = rng.normal(size=(int(rng.integers(2, 9)), entry["features"]))
                np.save(at / entry["file"], steps.astype(np.float16))
    (folder / "labels.csv").write_text("\n".join(labels) + "\n")
    (folder / "splits.csv").write_text("\n".join(splits) + "\n")
    return folder


def small_recipe(path, name):
    """Write the recipe of a cohort with a single epoch and small networks."""
    recipe = yaml.safe_load((REPOSITORY / "configs" / f"cyin-{name}.yaml").read_text())
    blocks = {"residual_blocks": 1}
    recipe["imputer"] |= SMALL | blocks
    recipe["backbone"] |= SMALL | blocks | FUSION
    for part in ("imputer_training", "backbone_training"):
        recipe[part] |= {"epochs": 1, "batch_size": 8}
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


@pytest.mark.parametrize("name", NAMES)
def test_the_recipe_fits_the_cohort(name):
    assert check(REPOSITORY / "configs" / f"cyin-{name}.yaml").exit_code == 0
    described = yaml.safe_load((REPOSITORY / "cohorts" / name / "cohort.yaml").read_text())
    sizes = {k: (m["length"], m["features"]) for k, m in described["modalities"].items()}
    assert sizes == {"text": (50, 768), "audio": (50, 1024), "vision": (50, 1024)}
    recipe = yaml.safe_load((REPOSITORY / "configs" / f"cyin-{name}.yaml").read_text())
    assert recipe["imputer"]["length"] == recipe["backbone"]["length"] == 50
    assert recipe["imputer"].items() <= recipe["backbone"].items()


@pytest.mark.parametrize("name", NAMES)
def test_a_file_set_of_the_layout_is_checked_and_trains(name, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "draw_curves", lambda *_: None)
    cohort = write_utterances(tmp_path / "cohort", name)
    report = check(cohort)
    assert not report.problems and report.exit_code == 0
    assert report.observed == {"text": report.observed["audio"] + 1} | {
        "audio": report.observed["vision"],
        "vision": report.observed["vision"],
    }
    recipe = small_recipe(tmp_path / "recipe.yaml", name)
    bundle = load_bundle(train(recipe, cohort, tmp_path / "run", device="cpu"), "cpu")
    task = read_cohort(cohort).task
    assert bundle.task == task
    assert (task.scale is not None) == (name in ("mosi", "mosei"))
    assert all(len(spec.steps.mean) == spec.shape[1] for spec in bundle.specs)
    card = (tmp_path / "run" / "bundle" / "docs" / "README.md").read_text()
    assert f"cohort `{name}`" in card
    shutil.rmtree(tmp_path / "run")


def test_the_published_options_are_kept():
    """Values that differ between the paper's table and the released configuration."""
    found = {}
    for name in NAMES:
        recipe = yaml.safe_load((REPOSITORY / "configs" / f"cyin-{name}.yaml").read_text())
        backbone = recipe["backbone"]
        found[name] = (backbone["beta"], backbone["gamma"], recipe["backbone_training"]["epochs"])
        assert json.dumps(recipe["backbone_training"].get("class_weights", "none")) == (
            '"balanced"' if name == "iemocap" else '"none"'
        )
    assert found == {
        "mosi": (16, 10, 30),
        "mosei": (32, 5, 30),
        "iemocap": (4, 10, 50),
        "meld": (4, 5, 40),
    }


def test_rates_of_dropout_the_mask_and_clipping_are_the_released_configuration_s():
    """Attention of text, audio and vision as sources; memory; embedding; output; largest value."""
    found = {}
    for name in NAMES:
        recipe = yaml.safe_load((REPOSITORY / "configs" / f"cyin-{name}.yaml").read_text())
        o, training = recipe["backbone"], recipe["backbone_training"]
        assert o["causal"] is True
        # As published: at least three layers of memory, and nothing clipped by its length.
        assert o["memory_layers"] == max(3, o["layers"])
        schedule = BackboneTraining(**training)
        assert schedule.clip_gradients is None
        found[name] = (
            *(o["attention_dropout"][m] for m in ("text", "audio", "vision")),
            *(o[f"{part}_dropout"] for part in ("memory", "embedding", "output")),
            schedule.clip_values,
        )
    assert found == {
        "mosi": (0.1, 0.3, 0.0, 0.4, 0.0, 0.3, 5.0),
        "mosei": (0.1, 0.0, 0.3, 0.2, 0.5, 0.5, 1.0),
        "iemocap": (0.5, 0.0, 0.2, 0.3, 0.0, 0.2, 1.0),
        "meld": (0.1, 0.2, 0.4, 0.3, 0.0, 0.2, 10.0),
    }
