"""Whatever bytes a description or a bundle's JSON holds, only our own errors come out.

`benchmarks/fuzz.py` does the same for longer, guided by coverage; the readers of tables and scans
have tests of this sort of their own.
"""

import json

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dymo_med.bundle import read_recipe
from dymo_med.data.cohort import read_cohort
from dymo_med.errors import ConfigError
from dymo_med.files import read_json
from tests.conftest import COHORT
from tests.unit.conftest import RECIPE

SETTINGS = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.dates()
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner),
    max_leaves=8,
)


@st.composite
def spoilt(draw, whole):
    """A description with one value, anywhere, replaced by any other or under another key."""
    data = json.loads(json.dumps(whole))
    place = data
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = draw(st.sampled_from(keys))
        inner = place[key]
        if not (isinstance(inner, dict | list) and inner) or draw(st.integers(0, 2)) == 0:
            break
        place = inner
    if isinstance(place, dict) and draw(st.booleans()):
        place[draw(st.text(max_size=8) | st.integers())] = place.pop(key)
    else:
        place[key] = draw(VALUES)
    return data


def only_ours(read, path):
    try:
        read(path)
    except ConfigError as error:
        assert error.problems and all(p.where and p.what and p.remedy for p in error.problems)


@pytest.mark.parametrize(("read", "whole"), [(read_recipe, RECIPE), (read_cohort, COHORT)])
def test_any_value_in_a_description(tmp_path, read, whole):
    @SETTINGS
    @given(spoilt(whole))
    def check(data):
        path = tmp_path / "x.yaml"
        path.write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")
        only_ours(read, path)

    check()


@SETTINGS
@given(st.binary(max_size=60) | st.text(alphabet="[]{}&*!|>-?:, \n'\"#%@`ab1.<", max_size=40))
def test_any_bytes_as_a_description(tmp_path, content):
    path = tmp_path / "x.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    for read in (read_recipe, read_cohort):
        only_ours(read, path)


@SETTINGS
@given(st.binary(max_size=60) | VALUES.map(lambda v: json.dumps(v, default=str).encode()))
def test_any_bytes_as_json(tmp_path, content):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    try:
        data = read_json(path)
    except ValueError as error:
        assert type(error) is ValueError and str(error)  # no decoder's, which repeats the content
    else:
        json.dumps(data, allow_nan=False)
