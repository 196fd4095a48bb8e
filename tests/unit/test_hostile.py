"""Names and values that try to break out of the page, the table or the folder."""

import csv
import io
import json
import shutil
from html.parser import HTMLParser

import pytest

from dymo_med.errors import PatientDataError
from dymo_med.files import as_was, csv_text
from dymo_med.inference.audit import audit
from dymo_med.inference.predict import predict_patient
from dymo_med.inference.prediction_file import PredictionFile, read_prediction
from dymo_med.inference.report import render, visible

HOSTILE = {
    "script": "<script>alert(1)</script>",
    "quotes": "\"'><img src=x onerror=alert(1)>",
    "comment": "--><!-- ]]></style></title></textarea>",
    "template": "{{ 7*7 }}{% for x in y %}{0.__class__}%s",
    "traversal": "../../../../etc/passwd",
    "newlines": "one\r\ntwo\n\n<b>three",
    "formula": '=HYPERLINK("http://x","y")',
    "comma": 'a,"b",c;d\te',
    "long": "x" * 10_000,
    "rtl": "\u202egpj.exe\u2066abc\u200f \u05d0\u05d1\u05d2 \u0627\u0644\u0639",
    "null": "a\x00b\x08",
    "controls": "a\x00b\x07c\x1b[31md\x7fe\u0085f",
    "entities": "&lt;script&gt; &#60;b&#62;",
}


class Tags(HTMLParser):
    """The page's tags with the names of their attributes, and its text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, tuple(name for name, _ in attributes)))

    def handle_endtag(self, tag):
        self.tags.append(f"/{tag}")

    def handle_comment(self, data):
        self.tags.append("comment")

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def content(bundle, cohort_dir, tmp_path_factory):
    """The content of a prediction of a patient who lacks something."""
    out = tmp_path_factory.mktemp("hostile") / "out"
    predict_patient(cohort_dir / "patients" / "p011_v2", bundle, out, draws=2)
    data = json.loads((out / "prediction.json").read_text(encoding="utf-8"))
    data.pop("content_sha256")
    return data


def renamed(data, word):
    """Return the content with a word in every place that takes free text."""
    data = json.loads(json.dumps(data))

    def swap(value, old, new):
        if isinstance(value, dict):
            return {(new if k == old != "high" else k): swap(v, old, new) for k, v in value.items()}
        if isinstance(value, list):
            return [swap(v, old, new) for v in value]
        return new if value == old else value

    for name in ("t1", "labs", "ldh", "high"):  # modalities, a column, a class
        data = swap(data, name, f"{word} {name}")
    for key in ("record_id", "patient_id", "target", "bundle_name", "method_why", "command"):
        data[key] = word
    data["warnings"] = [word]
    data["exhibits"]["bundle_description"] = word
    for cell in data["exhibits"]["cells"]:
        cell.update(text=word, unit=word)
    for source in data["sources"].values():
        source.update(file=word, facts={"size": word})
    data["limits"]["cohort"] = word
    return PredictionFile.make(data)


@pytest.mark.parametrize("name", HOSTILE)
def test_no_text_changes_what_the_page_is_made_of(content, name):
    harmless, hostile = (
        Tags(render(renamed(content, "x"))),
        Tags(render(renamed(content, HOSTILE[name]))),
    )
    assert hostile.tags == harmless.tags
    shown = " ".join(" ".join(hostile.text).split())
    assert " ".join(visible(HOSTILE[name]).split())[:200] in shown


@pytest.mark.parametrize("name", HOSTILE)
def test_no_text_turns_or_steers_what_follows_it(content, name):
    page = render(renamed(content, HOSTILE[name]))
    assert not set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u200e\u200f") & set(page)
    assert not set("\x00\x07\x08\x1b\x7f\u0085") & set(page)


@pytest.mark.parametrize("name", HOSTILE)
def test_the_file_keeps_every_text_as_it_is(content, name):
    file = renamed(content, HOSTILE[name])
    again = PredictionFile.model_validate_json(file.to_text())
    assert again == file and again.record_id == HOSTILE[name]


@pytest.mark.parametrize("name", HOSTILE)
def test_no_text_makes_a_cell_into_two(name):
    word = HOSTILE[name]
    text = csv_text(["a", "b"], [{"a": word, "b": 1.5}, {"a": "next", "b": None}])
    rows = list(csv.reader(io.StringIO(text, newline="")))
    assert [[as_was(cell) for cell in row] for row in rows] == [
        ["a", "b"],
        [word, "1.5"],
        ["next", ""],
    ]


@pytest.mark.parametrize(
    "name",
    ["<script>alert(1)<", "\"'><img src=x onerror=alert(1)>", "=1+1", "a\u202ecod", "x" * 255],
)
def test_a_folder_may_be_called_anything_printable(bundle, cohort_dir, tmp_path, name):
    folder = shutil.copytree(cohort_dir / "patients" / "p011_v2", tmp_path / "in" / name)
    out = tmp_path / "out"
    p = predict_patient(folder, bundle, out, explain=False, draws=0)
    assert p.record_id == name and audit(out).problems == ()
    assert sorted(x.name for x in tmp_path.iterdir()) == ["in", "out"]
    assert all(f.resolve().is_relative_to(out) for f in out.rglob("*"))
    plain = predict_patient(cohort_dir / "patients" / "p011_v2", bundle, tmp_path / "o", draws=0)
    assert plain.probabilities == p.probabilities
    file = read_prediction(out / "prediction.json")
    page = (out / "report.html").read_text(encoding="utf-8")
    harmless = render(
        PredictionFile.make(
            file.model_dump(mode="json", exclude={"content_sha256"})
            | {"record_id": "p", "patient_id": "p", "command": "c"}
        )
    )
    assert Tags(page).tags == Tags(harmless).tags


@pytest.mark.parametrize("name", ["a\nb", "a\rb", "a\x1bb"])
def test_a_folder_that_cannot_be_printed_is_refused(bundle, cohort_dir, tmp_path, name):
    folder = shutil.copytree(cohort_dir / "patients" / "p011_v2", tmp_path / name)
    with pytest.raises(PatientDataError, match="cannot be printed"):
        predict_patient(folder, bundle, tmp_path / "out")
    assert not (tmp_path / "out").exists()
