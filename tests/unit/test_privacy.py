"""Pseudonyms and the key they are made with."""

import hashlib
import hmac
import os
import stat
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from dymo_med.errors import ConfigError
from dymo_med.privacy import KEY_VARIABLE, key_file, pseudonym, shown


@pytest.fixture
def key(tmp_path, monkeypatch):
    """Where this test's key will be."""
    path = tmp_path / "settings" / "key"
    monkeypatch.setenv(KEY_VARIABLE, str(path))
    return path


def test_a_pseudonym_is_the_keyed_hash(key):
    first = pseudonym("MRN-0042")
    secret = bytes.fromhex(key.read_text(encoding="ascii").strip())
    assert len(secret) == 32
    assert first == hmac.new(secret, b"MRN-0042", hashlib.sha256).hexdigest()[:32]
    assert pseudonym(" MRN-0042 ") == first != pseudonym("MRN-0043")
    assert shown("MRN-0042", identify=False) == f"pseudonym {first}"
    assert shown("MRN-0042 ", identify=True) == "patient MRN-0042"


def test_another_key_gives_another_pseudonym(key):
    first = pseudonym("MRN-0042")
    key.unlink()
    assert pseudonym("MRN-0042") != first


def test_only_the_user_can_read_the_key(key):
    pseudonym("a")
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert stat.S_IMODE(key.parent.stat().st_mode) == 0o700
    assert [p.name for p in key.parent.iterdir()] == ["key"]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o777])
def test_a_key_that_others_can_read_is_refused(key, mode):
    pseudonym("a")
    key.chmod(mode)
    with pytest.raises(ConfigError, match="others can read the key") as caught:
        pseudonym("MRN-0042")
    assert "MRN-0042" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"secret", b"0" * 63, b"0" * 64 + b"\n\n", b"\xff" * 64])
def test_what_is_no_key_is_refused(key, content):
    key.parent.mkdir()
    key.touch(0o600)
    key.write_bytes(content)
    with pytest.raises(ConfigError, match="64 hexadecimal digits"):
        pseudonym("a")
    assert key.read_bytes() == content


def test_a_key_that_cannot_be_made_is_a_clear_error(key):
    key.parent.write_text("a file where the folder should be")
    with pytest.raises(ConfigError, match=KEY_VARIABLE):
        pseudonym("a")


@pytest.mark.parametrize(
    ("environment", "where"),
    [
        ({}, "home/.config/dymo-med/pseudonym.key"),
        ({"XDG_CONFIG_HOME": "{root}/xdg"}, "xdg/dymo-med/pseudonym.key"),
        ({"XDG_CONFIG_HOME": "relative"}, "home/.config/dymo-med/pseudonym.key"),
        ({"XDG_CONFIG_HOME": "{root}/xdg", KEY_VARIABLE: "{root}/own"}, "own"),
    ],
)
def test_where_the_key_is(tmp_path, monkeypatch, environment, where):
    for name in ("XDG_CONFIG_HOME", KEY_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name, value in environment.items():
        monkeypatch.setenv(name, value.format(root=tmp_path))
    assert key_file() == tmp_path / where


def _pseudonym(path: str) -> str:
    os.environ[KEY_VARIABLE] = path
    return pseudonym("MRN-0042")


def test_processes_that_start_at_once_agree_on_one_key(key):
    with ProcessPoolExecutor(4) as pool:
        found = list(pool.map(_pseudonym, [str(key)] * 8))
    assert len(set(found)) == 1
    assert [p.name for p in key.parent.iterdir()] == ["key"]
    assert Path(key).stat().st_nlink == 1
