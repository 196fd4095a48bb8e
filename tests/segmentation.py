"""A small cohort with masks and a bundle barely trained on it, for the tests that need them."""

import pytest
import yaml

from dymo_med.data.simulate import SEGMENTATION, simulate

RECIPE = {
    "name": "small-segmentation",
    "imputer": {"name": "synthesis", "width": 4, "levels": 1, "patch": 16},
    "imputer_training": {"epochs": 1, "batch_size": 4},
    "backbone": {"name": "shared_unet", "widths": [8, 16], "width_ratio": 0.5, "groups": 2},
    "backbone_training": {
        "epochs": 2,
        "batch_size": 2,
        "learning_rate": 0.02,
        "subsets": 4,
        "augmentation": {"mirror_axes": [0]},
    },
}


def write_recipe(path, **changes):
    """Write the small recipe with some keys changed; None takes a key away."""
    recipe = {**RECIPE, **changes}
    path.write_text(yaml.safe_dump({k: v for k, v in recipe.items() if v is not None}))
    return path


@pytest.fixture(scope="session")
def masked_dir(tmp_path_factory):
    """Folder of 16 simulated patients at 16 voxels; read only, shared by the whole session."""
    return simulate(tmp_path_factory.mktemp("masked") / "cohort", 16, seed=3, size=16, missing=0.0)


@pytest.fixture(scope="session")
def masked_cohort(masked_dir):
    """The same, described as a segmentation."""
    from dymo_med.data.cohort import read_cohort

    return read_cohort(masked_dir / SEGMENTATION)


@pytest.fixture(scope="session")
def segmentation_dir(tmp_path_factory, masked_dir):
    """Folder of the small segmentation bundle."""
    from dymo_med.training.train import train

    folder = tmp_path_factory.mktemp("segmentation")
    recipe = write_recipe(folder / "recipe.yaml")
    return train(recipe, masked_dir / SEGMENTATION, folder / "run", device="cpu")


@pytest.fixture(scope="session")
def segmentation_bundle(segmentation_dir):
    """The small segmentation bundle, loaded."""
    from dymo_med.bundle_segmentation import load_segmentation_bundle

    return load_segmentation_bundle(segmentation_dir, "cpu")
