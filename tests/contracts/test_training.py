"""Training keeps its promises whatever is trained: the same bits, an end that explains itself."""

import json

import pytest
import torch
import yaml

from dymo_med.backbones import BACKBONES
from dymo_med.bundle import load_bundle, resolve_device
from dymo_med.bundle_segmentation import load_segmentation_bundle
from dymo_med.cli import main
from dymo_med.comparators import COMPARATORS
from dymo_med.errors import ConfigError
from dymo_med.tasks import OverClasses
from dymo_med.training import fusion
from dymo_med.training import train as training
from tests.contracts.conftest import recipe_of
from tests.contracts.test_comparators import SMALL as SMALL_COMPARATORS

PAIRS = {"cyclic": "cyclic"}  # backbones that recover, and the imputer that shares their tokens


class Interrupted(Exception):
    pass


@pytest.fixture(autouse=True)
def _without_curves(monkeypatch):
    monkeypatch.setattr(training, "draw_curves", lambda *_: None)


def trained(tiny, folder, recipe, *, task="classification", stop=None, **options):
    """Train; with `stop`, a stage and an epoch, be interrupted there."""
    path = folder.with_suffix(".yaml")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(recipe))

    def progress(stage, done, *_):
        if (stage, done) == stop:
            raise Interrupted

    given = {"device": "cpu", "progress": progress, **options}
    return training.train(path, tiny.cohort(task), folder, **given)


def sums(bundle):
    return json.loads((bundle / "checksums.json").read_text())


@pytest.mark.parametrize(
    "name", [n for n, kind in BACKBONES.items() if "dropout" in kind.Options.model_fields]
)
def test_with_dropout_the_same_seed_gives_the_same_bits(tiny, tmp_path, name):
    recipe = recipe_of("classification", name, PAIRS.get(name, "template"), epochs=3)
    recipe["backbone"]["dropout"] = 0.5
    whole = trained(tiny, tmp_path / "whole", recipe)
    torch.rand(3)  # what else the process draws is of no account
    state = torch.random.get_rng_state()
    again = trained(tiny, tmp_path / "again", recipe)
    assert torch.equal(torch.random.get_rng_state(), state)
    with pytest.raises(Interrupted):
        trained(tiny, tmp_path / "parts", recipe, stop=("backbone", 1))
    torch.rand(5)
    parts = trained(tiny, tmp_path / "parts", recipe, resume=True)
    assert sums(whole) == sums(again) == sums(parts)
    other = trained(tiny, tmp_path / "other", recipe, seed=1)
    without = trained(tiny, tmp_path / "without", {**recipe, "backbone": _off(recipe)})
    weights = "models/backbone.safetensors"
    assert len({sums(b)[weights] for b in (whole, other, without)}) == 3


def _off(recipe):
    return {**recipe["backbone"], "dropout": 0.0}


FAR = 1e30  # a step size that leads nowhere
DIVERGING = {
    # Task, backbone, imputer, the section that is wrong, the stage that says so.
    "imputer": ("classification", "transformer", "mopoe", "imputer_training", "imputer"),
    "imputer of scans": (
        "classification",
        "transformer",
        "synthesis",
        "imputer_training",
        "imputer",
    ),
    **{
        f"backbone {name}": (
            *("classification", name, PAIRS.get(name, "template")),
            *("backbone_training", "backbone"),
        )
        for name in BACKBONES
    },
    "regression": ("regression", "transformer", "template", "backbone_training", "backbone"),
    "segmentation": ("segmentation", "shared_unet", "synthesis", "backbone_training", "backbone"),
}


@pytest.mark.parametrize("epochs", [1, 3])
@pytest.mark.parametrize("case", DIVERGING)
def test_a_training_that_diverges_says_what_to_change(tiny, tmp_path, capsys, case, epochs):
    task, backbone, imputer, section, stage = DIVERGING[case]
    recipe = recipe_of(task, backbone, imputer)
    recipe[section] |= {"learning_rate": FAR, "epochs": epochs}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    with pytest.raises(SystemExit) as stopped:
        out = tmp_path / "run"
        main(["train", str(path), "-c", str(tiny.cohort(task)), "-o", str(out), "-d", "cpu"])
    printed = capsys.readouterr().err
    assert stopped.value.code == 2, printed
    assert f"{section}: training of {stage}: the training diverges" in printed
    assert f"Lower learning_rate (or clip_gradients) under {section}" in printed
    assert not (out / "bundle").exists()


@pytest.mark.parametrize("gradient", ["sum", "gmd"])
def test_gradients_that_diverge_alone_are_noticed(tiny, tmp_path, monkeypatch, gradient):
    original = OverClasses.loss

    def steep(*given):  # a finite loss whose gradient is not
        loss = original(*given)
        return loss + (loss * 0).abs().sqrt()

    monkeypatch.setattr(OverClasses, "loss", steep)
    recipe = recipe_of("classification", "transformer", "template", gradient=gradient)
    del recipe["imputer_training"]
    with pytest.raises(ConfigError, match=r"diverges.*a gradient that is not finite"):
        trained(tiny, tmp_path / "run", recipe)


@pytest.mark.parametrize("name", COMPARATORS)
def test_a_comparator_that_diverges_says_which(tiny, tmp_path, monkeypatch, name):
    original = fusion.train_comparators

    def far(plan, *rest):  # the schedule is the backbone's: let it diverge here alone
        schedule = plan.backbone_training.model_copy(update={"learning_rate": FAR})
        return original(plan.model_copy(update={"backbone_training": schedule}), *rest)

    monkeypatch.setattr(fusion, "train_comparators", far)
    recipe = recipe_of("classification", "transformer", "template")
    recipe["comparators"] = [{"name": name, **SMALL_COMPARATORS.get(name, {})}]
    with pytest.raises(ConfigError, match=f"training of comparator {name}.*diverges"):
        trained(tiny, tmp_path / "run", recipe)


# --- Devices --------------------------------------------------------------------------------------

LOADERS = {
    "classification": (load_bundle, ("classification",)),
    "regression": (load_bundle, ("regression",)),
    "segmentation": (load_segmentation_bundle, ("segmentation", "shared_unet", "synthesis")),
}


@pytest.mark.parametrize("task", LOADERS)
@pytest.mark.parametrize("where", ["device", "parse"])
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
        MemoryError(),
    ],
    ids=["GPU", "CPU", "Python"],
)
def test_too_little_memory_is_no_fault_of_a_bundle(tiny, monkeypatch, task, where, error):
    load, key = LOADERS[task]
    folder = tiny.bundle(*key)

    def full(*_, **__):
        raise error

    attribute = "to" if where == "device" else "load_state_dict"
    monkeypatch.setattr(torch.nn.Module, attribute, full)
    with pytest.raises(ConfigError, match=r"memory does not hold.*--device cpu"):
        load(folder, "cpu")


@pytest.mark.parametrize("task", LOADERS)
def test_what_else_goes_wrong_on_a_device_is_a_bug_and_not_the_bundles(tiny, monkeypatch, task):
    load, key = LOADERS[task]
    folder = tiny.bundle(*key)

    def breaks(*_, **__):
        raise RuntimeError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(torch.nn.Module, "to", breaks)
    with pytest.raises(RuntimeError, match="device-side"):
        load(folder, "cpu")


@pytest.mark.parametrize(
    ("name", "count", "said"),
    [
        ("cuda:7", 1, "no CUDA device of that number"),
        ("cuda:1", 1, "Expected a number below 1"),
        ("cuda", 0, "offers no CUDA device"),
        ("cuda:0", 0, "offers no CUDA device"),
        ("cuda:", 1, "unknown device"),
        ("cuda:-1", 1, "unknown device"),
        ("cuda:1.0", 2, "unknown device"),
        ("cuda:²", 2, "unknown device"),
        ("gpu", 1, "unknown device"),
        ("CPU", 1, "unknown device"),
    ],
)
def test_a_device_that_is_not_there_is_a_wrong_option(monkeypatch, name, count, said):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    with pytest.raises(ConfigError, match=f"--device: .*{said}"):
        resolve_device(name)


def test_devices_that_are_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    found = [str(resolve_device(name)) for name in ("auto", "cpu", "cuda", "cuda:0", "cuda:1")]
    assert found == ["cuda", "cpu", "cuda", "cuda:0", "cuda:1"]


def test_memory_that_runs_out_anywhere_is_no_bug(tiny, tmp_path, capsys, monkeypatch):
    from dymo_med.inference import predict

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(predict, "answer", full)
    patient = tiny.patients / "p17"
    with pytest.raises(SystemExit) as stopped:
        main(["predict", "-i", str(patient), "-b", str(tiny.bundle()), "-o", str(tmp_path / "o")])
    assert stopped.value.code == 2
    assert "memory does not hold what this takes" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
