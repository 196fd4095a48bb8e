import json
import math
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dymo_med.config import Document
from dymo_med.errors import ConfigError, PatientDataError
from dymo_med.modalities import modality
from dymo_med.modalities.tokens import TokensEntry, TokenSequence
from dymo_med.types import ModalitySpec, Steps


def spec(length=5, features=4, **steps):
    return ModalitySpec("audio", "tokens", "audio.npy", (length, features), steps=Steps(**steps))


@pytest.fixture
def kind():
    return modality(spec())


def test_a_cohort_declares_length_and_features(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("{kind: tokens, file: text.npy, length: 50, features: 768}")
    found = TokenSequence.spec_from_entry("text", Document(path).parse(TokensEntry))
    assert found.shape == (50, 768) and found.steps == Steps("neighbours", True)
    again = ModalitySpec.from_dict(json.loads(json.dumps(found.to_dict())))
    assert again == found
    path.write_text("{kind: tokens, file: text.wav, length: 50, features: 768}")
    with pytest.raises(ConfigError, match=r"must end in \.npy"):
        Document(path).parse(TokensEntry)


def test_a_spec_without_steps_is_stored_as_before():
    assert "steps" not in ModalitySpec("a", "image", "a.png", (1, 8, 8)).to_dict()


def test_an_absent_file_is_missing(kind, tmp_path):
    assert kind.read(tmp_path, "Patient x") is None


@pytest.mark.parametrize("dtype", ["<f2", "<f4", ">f8", "i2"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_numpy_files_of_any_number_type(kind, tmp_path, dtype, order):
    steps = np.arange(20).reshape(5, 4).astype(dtype)
    np.save(tmp_path / "audio.npy", np.array(steps, order=order))
    value = kind.read(tmp_path, "Patient x")
    assert torch.equal(value.values, torch.arange(20.0).view(5, 4))
    assert value.values.dtype == torch.float32
    assert value.source.facts == {"steps": "5", "features": "4"}
    assert value.observed_fields is None and value.warnings == ()


def test_other_formats_hold_the_same_numbers(kind, tmp_path):
    steps = torch.arange(20.0).view(5, 4)
    for name, tensors in (
        ("one", {"x": steps.bfloat16()}),
        ("named", {"audio": steps, "y": steps + 1}),
    ):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "audio.safetensors")
    (tmp_path / "csv").mkdir()
    np.savetxt(tmp_path / "csv" / "audio.csv", steps.numpy(), delimiter=",")
    for name in ("one", "named", "csv"):
        assert torch.equal(kind.read(tmp_path / name, "Patient x").values, steps), name


def test_neighbours_are_averaged_in_order(kind):
    steps = torch.arange(10.0)[:, None].expand(10, 4)
    assert kind.align(steps)[:, 0].tolist() == [0.5, 2.5, 4.5, 6.5, 8.5]
    # 7 steps to 5: position j averages floor(7 j / 5) to ceil(7 (j + 1) / 5).
    assert kind.align(steps[:7])[:, 0].tolist() == [0.5, 1.5, 3.0, 4.5, 5.5]
    assert kind.align(steps[:2])[:, 0].tolist() == [0.0, 0.0, 0.5, 1.0, 1.0]


def test_interleaved_is_the_published_order():
    kind = modality(spec(pooling="interleaved"))
    steps = torch.arange(7.0)[:, None].expand(7, 4)
    # 0 to 6, then 6, 6, 6: j and j + 5 are averaged.
    assert kind.align(steps)[:, 0].tolist() == [2.5, 3.5, 4.0, 4.5, 5.0]


def rejected(kind, folder, pattern):
    with pytest.raises(PatientDataError, match=pattern) as caught:
        kind.read(folder, "Patient x")
    assert str(caught.value).startswith("Patient x: audio")


@pytest.mark.parametrize(
    ("array", "pattern"),
    [
        (np.zeros((3, 5)), r"wrong shape\. Expected n steps of 4 features \(n x 4\)\. Got 3 x 5"),
        (np.zeros((1, 3, 4)), r"wrong shape.*Got 1 x 3 x 4"),
        (np.zeros(4), r"wrong shape.*Got 4\."),
        (np.zeros((0, 4)), r"empty.*Remove the file if the modality is missing"),
        (np.array([["a"] * 4]), r"does not hold real numbers.*Got <U1"),
        (np.zeros((2, 4), complex), "does not hold real numbers"),
        (np.array([[1, 2, 3, math.nan]] * 3), r"not finite.*Got 3 of 3 steps"),
        (np.full((2, 4), 1e300), "not finite"),
    ],
)
def test_wrong_arrays_are_refused(kind, tmp_path, array, pattern):
    np.save(tmp_path / "audio.npy", array)
    rejected(kind, tmp_path, pattern)


class _Bomb:
    def __reduce__(self):
        return (print, ("executed",))


def test_nothing_is_unpickled(kind, tmp_path, capsys):
    np.save(tmp_path / "audio.npy", np.array([[_Bomb()] * 4], dtype=object), allow_pickle=True)
    rejected(kind, tmp_path, "Python objects, which are not loaded")
    (tmp_path / "audio.npy").write_bytes(pickle.dumps(_Bomb()))
    rejected(kind, tmp_path, "not a NumPy array")
    assert "executed" not in capsys.readouterr().out


def test_headers_are_checked_before_memory_is_asked_for(kind, tmp_path):
    np.save(tmp_path / "audio.npy", np.zeros((3, 4)))
    whole = (tmp_path / "audio.npy").read_bytes()
    (tmp_path / "audio.npy").write_bytes(whole.replace(b"(3, 4)", b"(9999999999, 4)"))
    rejected(kind, tmp_path, r"too long.*Got 9999999999 x 4")
    (tmp_path / "audio.npy").write_bytes(whole.replace(b"(3, 4)", b"(900, 4)"))
    rejected(kind, tmp_path, "cut off or longer")
    for cut in (0, 5, 40, len(whole) - 1):
        (tmp_path / "audio.npy").write_bytes(whole[:cut])
        rejected(kind, tmp_path, "not a NumPy array|cut off")


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("", "empty"),
        ("1;2;3;4", r"wrong shape.*Got 1 x 1"),
        ("1,2,3,4\n5,6,secret,8\n", "row 2 does not hold one number per feature"),
        ("1,2,3,4\n5,6,7\n", "row 2 does not hold"),
        ("a,b,c,d\n5,6,7,8\n", "row 1 does not hold"),
        ("0,1,2,3\n5,6,7,8\n", "looks like a header"),
        ("1,2,3,nan\n", "not finite"),
    ],
)
def test_wrong_csv_files_are_refused_without_their_values(kind, tmp_path, text, pattern):
    (tmp_path / "audio.csv").write_text(text)
    with pytest.raises(PatientDataError, match=pattern) as caught:
        kind.read(tmp_path, "Patient x")
    assert "secret" not in str(caught.value)


def test_wrong_safetensors_are_refused(kind, tmp_path):
    path = tmp_path / "audio.safetensors"
    save_file({"x": torch.zeros(3, 4), "y": torch.zeros(3, 4)}, path)
    rejected(kind, tmp_path, "does not say which tensor")
    save_file({"x": torch.zeros(3, 4, dtype=torch.int64)}, path)
    rejected(kind, tmp_path, r"floating-point numbers.*Got I64")
    path.write_bytes(b"x" * 99)
    rejected(kind, tmp_path, "not a safetensors file")


def test_a_file_that_cannot_be_this_is_not_missing(kind, tmp_path):
    (tmp_path / "audio.wav").write_bytes(b"x")
    rejected(kind, tmp_path, "its format is not read")
    (tmp_path / "audio.wav").unlink()
    np.save(tmp_path / "audio.npy", np.zeros((3, 4)))
    (tmp_path / "audio.csv").write_text("1,2,3,4\n")
    rejected(kind, tmp_path, "several files")


def test_a_sequence_of_zeros_is_a_measurement_with_a_warning(kind, tmp_path):
    np.save(tmp_path / "audio.npy", np.zeros((3, 4)))
    (warning,) = kind.read(tmp_path, "Patient x").warnings
    assert "every feature is 0" in warning


def test_fit_standardises_each_feature():
    g = torch.Generator().manual_seed(0)
    scale = torch.tensor([1.0, 10.0, 0.1, 0.0])
    values = torch.randn(200, 5, 4, generator=g) * scale + torch.arange(4.0)
    fitted = modality(modality(spec()).fit(values, None))
    standard = (values - fitted.center(values)) / fitted.spread(values)
    assert torch.allclose(standard.mean((0, 1)), torch.zeros(4), atol=1e-4)
    assert torch.allclose(standard[..., :3].std((0, 1)), torch.ones(3), atol=1e-3)
    assert fitted.spec.steps.std[3] == 1.0
    assert modality(spec(standardise=False)).fit(values, None) == spec(standardise=False)
    # Networks see the same whatever the units are.
    torch.manual_seed(0)
    one = fitted.encoder(8, {})(values).values
    torch.manual_seed(0)
    other = modality(modality(spec()).fit(1000 * values, None)).encoder(8, {})(1000 * values)
    assert torch.allclose(one, other.values, atol=1e-3)


def test_the_likelihood_is_a_unit_gaussian_in_standard_units():
    kind = modality(spec(2, 1, mean=(3.0,), std=(2.0,)))
    values = torch.tensor([[[5.0], [3.0]]])
    found = kind.log_likelihood(torch.zeros(1, 2, 1), values, None)
    assert found.item() == pytest.approx(-0.5 - math.log(2 * math.pi))
    assert kind.mean(torch.ones(1, 2, 1)).flatten().tolist() == [5.0, 5.0]


def test_fewer_tokens_than_steps(kind):
    assert kind.encoder(8, {}).tokens == 5
    encoder = kind.encoder(8, {"steps": 2})
    assert encoder.tokens == 2 and encoder(torch.randn(3, 5, 4)).values.shape == (3, 2, 8)
    assert kind.encoder(8, {"steps": 99}).tokens == 5


def test_what_is_written_says_that_it_is_synthetic(kind, tmp_path):
    from safetensors import safe_open

    values = torch.randn(5, 4)
    path = kind.write(tmp_path, values, None, None)
    assert path.name == "audio_synthetic.safetensors"
    assert torch.equal(load_file(path)["audio"], values)
    with safe_open(path, framework="pt") as file:
        assert "SYNTHETIC" in file.metadata()["description"]


def test_the_picture_is_a_heat_map_of_standardised_features():
    kind = modality(spec(5, 3, mean=(1.0, 0.0, 0.0), std=(2.0, 1.0, 1.0)))
    values = torch.zeros(5, 3)
    values[2, 0] = 5.0
    picture = kind.picture(values)
    assert picture.shape == (1, 3, 5) and picture[0, 0].tolist() == [-0.5, -0.5, 2.0, -0.5, -0.5]
    assert modality(spec(5, 100)).picture(torch.randn(5, 100)).shape == (1, 48, 5)
