"""A small bundle, briefly trained on the small cohort."""

import pytest
import yaml

from dymo_med.bundle import load_bundle

RECIPE = {
    "name": "small",
    "description": "For tests only.",
    "imputer": {"name": "mopoe", "latent": 6, "dim": 8, "width": 4, "grid": 2, "hidden": 8},
    "backbone": {
        "name": "transformer",
        "dim": 16,
        "heads": 2,
        "layers": 1,
        "projection": 6,
        "width": 4,
        "grid": 2,
    },
    "selector": {"name": "dymo"},
    "imputer_training": {"epochs": 3, "batch_size": 8, "learning_rate": 0.005},
    "backbone_training": {"epochs": 6, "batch_size": 8, "learning_rate": 0.005, "subsets": 3},
}


@pytest.fixture(scope="session")
def bundle_dir(tmp_path_factory, cohort_dir):
    """Folder of the small bundle; read only, shared by the whole session."""
    from dymo_med.training.train import train

    folder = tmp_path_factory.mktemp("bundle")
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE))
    return train(recipe, cohort_dir, folder / "run", device="cpu")


@pytest.fixture(scope="session")
def bundle(bundle_dir):
    """The small bundle, loaded."""
    return load_bundle(bundle_dir, "cpu")


@pytest.fixture
def plain(monkeypatch):
    """Evaluations without page and plots, which take most of a small one's time."""
    from dymo_med.inference import evaluate, quality

    monkeypatch.setattr(evaluate, "write_pages", lambda *_, **__: None)
    for name in ("_plot", "_plot_pictures"):
        monkeypatch.setattr(quality, name, lambda *_: None)
