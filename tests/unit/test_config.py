import pytest

from dymo_med import config, limits
from dymo_med.config import CohortFile, Document, Recipe, read_recipe
from dymo_med.errors import ConfigError
from dymo_med.modalities.image import ImageEntry

RECIPE = """\
name: small
imputer: {name: mopoe, latent: 4}
backbone:
  name: transformer
backbone_training:
  epochs: 3
"""


def write(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def problems(tmp_path, text):
    with pytest.raises(ConfigError) as caught:
        Document(write(tmp_path, text)).parse(Recipe)
    return [str(problem) for problem in caught.value.problems]


def test_a_recipe_has_defaults_and_options(tmp_path):
    recipe = Document(write(tmp_path, RECIPE)).parse(Recipe)
    assert recipe.imputer.options == {"latent": 4}
    assert recipe.backbone.options == {}
    assert recipe.selector is None  # picked on the calibration split
    assert recipe.backbone_training.epochs == 3 and recipe.imputer_training.epochs == 100


def test_unknown_keys_name_the_line_and_the_nearest_key(tmp_path):
    found = problems(
        tmp_path, RECIPE.replace("epochs: 3", "epochs: 3\n  batchsize: 4") + "sede: 1\n"
    )
    assert len(found) == 2
    nested = next(p for p in found if "batchsize" in p)
    top = next(p for p in found if "sede" in p)
    assert "recipe.yaml:7 backbone_training.batchsize" in nested
    assert "Did you mean 'batch_size'" in nested
    assert "recipe.yaml:8 sede" in top and "Did you mean 'seed'" in top


def test_every_problem_at_once(tmp_path):
    found = problems(tmp_path, "imputer: {name: 3}\nbackbone_training: {epochs: 0}\nsede: 1\n")
    text = "\n".join(found)
    assert "name: a required key is absent" in text
    assert "backbone: a required key is absent" in text
    assert "recipe.yaml:1 imputer.name" in text
    assert "recipe.yaml:2 backbone_training.epochs" in text
    assert "sede" in text


def test_a_negative_seed_is_refused(tmp_path):
    [problem] = problems(tmp_path, RECIPE + "seed: -1\n")
    assert "recipe.yaml:7 seed" in problem


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "does not hold a mapping"),
        ("- a\n", "does not hold a mapping"),
        ("name: [\n", "not valid YAML"),
        ("name: a\nname: b\n", "recipe.yaml:2: key 'name' occurs twice"),
        ("a: {b: 1,\n b: 2}\n", "recipe.yaml:2: key 'b' occurs twice"),
        ("!!python/object/apply:os.system ['true']\n", "not valid YAML"),
        (b"\xff\xfe\x00\x01", "cannot be read as text"),
    ],
)
def test_files_that_are_no_document(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        Document(write(tmp_path, text))


def test_an_absent_file(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        read_recipe(tmp_path / "none.yaml", {})


def test_a_part_keeps_its_place(tmp_path):
    document = Document(write(tmp_path, "a:\n  b:\n    epochs: x\n"))
    assert document.where(("a", "b", "epochs")).endswith("recipe.yaml:3 a.b.epochs")
    assert document.where(("a", "b", "absent")).endswith("recipe.yaml:2 a.b.absent")


@pytest.mark.parametrize("key", ["patients", "labels", "splits"])
@pytest.mark.parametrize("value", ["../x", "/x", "a/../../x"])
def test_cohort_paths_stay_inside(key, value):
    base = {
        "name": "x",
        "task": {"type": "classification", "target": "y", "classes": ["a", "b"]},
        "modalities": {"m": {}},
    }
    CohortFile.model_validate(base)
    with pytest.raises(ValueError, match="inside"):
        CohortFile.model_validate({**base, key: value})


def test_names_and_options_of_table_entries(tmp_path):
    from dymo_med.bundle import TABLES

    assert read_recipe(write(tmp_path, RECIPE), TABLES).name == "small"
    wrong = RECIPE.replace("mopoe, latent: 4", "mopo").replace(
        "transformer", "transformer\n  dmi: 4"
    )
    with pytest.raises(ConfigError) as caught:
        read_recipe(write(tmp_path, wrong), TABLES)
    first, second = map(str, caught.value.problems)
    assert "recipe.yaml:2" in first and "Did you mean 'mopoe'" in first
    assert "recipe.yaml:5" in second and "Did you mean 'dim'" in second


@pytest.mark.parametrize(
    "line",
    [
        "    file: {record}_t1.nii.gz",
        "    file: {record}",
        "  t2: {kind: image, file: {record}_t1.nii.gz}",
    ],
)
def test_a_name_in_braces_without_quotes_is_explained(tmp_path, line):
    text = "name: c\nmodalities:\n  t1:\n    kind: image\n" + line + "\n"
    document = tmp_path / "cohort.yaml"
    document.write_text(text)
    with pytest.raises(ConfigError, match="Quote a name with") as caught:
        entry = Document(document)
        entry.parse_part(entry.data["modalities"]["t1"], ImageEntry, ("modalities", "t1"))
    assert ":5" in str(caught.value) and "<" not in str(caught.value)


def test_what_is_too_large_is_refused_before_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "MAX_YAML_BYTES", 20)
    assert "at most 20 bytes" in problems(tmp_path, "name: " + "a" * 30)[0]


def test_parts_are_counted_as_they_come(tmp_path, monkeypatch):
    monkeypatch.setattr(config, "_MOST_PARTS", 20)
    many = "name: [" + "a, " * 30 + "]"
    assert "more than 20 parts" in problems(tmp_path, many)[0]
    aliases = "a: &a [1, 2, 3]\nb: &b [*a, *a, *a]\nc: [*b, *b]\n"
    assert "more than 20 parts" in problems(tmp_path, aliases)[0]
