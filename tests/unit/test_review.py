"""The server of `dymo-med review`: what it shows, what it keeps, and whom it refuses."""

import hashlib
import http.client
import json
import os
import re
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from urllib.parse import unquote

import pytest

from dymo_med.cli import main
from dymo_med.errors import ConfigError, PatientDataError
from dymo_med.inference.report import environment
from dymo_med.review import ReviewServer, add_review, read_reviews

HOSTILE = "\"><script>alert('x')<!--&{{ 7*7 }}"
PREDICTION = {
    "record_id": "p1",
    "classes": ["low", "high"],
    "probabilities": [0.2, 0.8],
    "predicted": "high",
    "status": "answered",
    "content_sha256": "a" * 64,
}


def page_text():
    form = environment().get_template("reader.html.j2").render()
    return f"<!doctype html><title>t</title><body><main>{form}</main></body>"


def write(folder, **prediction):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.html").write_text(page_text(), encoding="utf-8")
    (folder / "prediction.json").write_text(json.dumps(PREDICTION | prediction))
    return folder


class Client:
    def __init__(self, server):
        self.server, self.port = server, server.server_port
        self.origin = f"http://127.0.0.1:{self.port}"

    def ask(self, method, path, body=None, headers=(), host=True):
        link = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        link.putrequest(method, path, skip_host=True)
        if host:
            link.putheader("Host", f"127.0.0.1:{self.port}" if host is True else host)
        if body is not None and "Content-Length" not in dict(headers):
            link.putheader("Content-Length", str(len(body)))
        for name, value in dict(headers).items():
            link.putheader(name, value)
        link.endheaders(body)
        answer = link.getresponse()
        content = answer.read()
        link.close()
        return answer, content

    def get(self, path, **more):
        return self.ask("GET", path, **more)

    def token(self, path="/report.html"):
        return re.search(rb'data-token="([^"]+)"', self.get(path)[1])[1].decode()

    def post(self, path="/review", verdict="agree", headers=(), body=None, **more):
        body = json.dumps({"verdict": verdict, **more}).encode() if body is None else body
        given = {
            "Origin": self.origin,
            "X-Review-Token": self.server.token,
            "Content-Type": "application/json",
        }
        given = {k: v for k, v in {**given, **dict(headers)}.items() if v is not None}
        answer, content = self.ask("POST", path, body, given)
        return answer.status, json.loads(content)


@contextmanager
def serving(out):
    server = ReviewServer(out, 0)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield Client(server)
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def patient(tmp_path):
    return write(tmp_path / "out")


@pytest.fixture
def client(patient):
    with serving(patient) as client:
        yield client


def test_a_review_is_kept_with_what_it_is_about(client, patient):
    status, answer = client.post(verdict="disagree", comment="No lesion.\nSee t1.", reviewer="AB")
    assert status == 201
    file = json.loads((patient / "review.json").read_text(encoding="utf-8"))
    assert list(file) == ["schema_version", "reviews"] and file["schema_version"] == 1
    (review,) = file["reviews"]
    assert answer == {"reviews": [review]}
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", review.pop("time"))

    def digest(name):
        return hashlib.sha256((patient / name).read_bytes()).hexdigest()

    assert review == {
        "verdict": "disagree",
        "comment": "No lesion.\nSee t1.",
        "reviewer": "AB",
        "report_sha256": digest("report.html"),
        "prediction_sha256": digest("prediction.json"),
        "content_sha256": "a" * 64,
    }
    assert sorted(p.name for p in patient.iterdir()) == [
        "prediction.json",
        "report.html",
        "review.json",
    ]


def test_without_a_prediction_there_is_no_hash_of_one(client, patient):
    (patient / "prediction.json").unlink()
    assert client.post()[0] == 201
    (review,) = read_reviews(patient)
    assert review.prediction_sha256 is None and review.content_sha256 is None
    assert review.comment == "" and review.reviewer is None


def test_reviews_are_only_ever_appended(client, patient):
    assert json.loads(client.get("/review")[1]) == {"reviews": []}
    before = []
    for number in range(3):
        client.post(comment=f"{number} ü\u202e\U0001f642")
        file = json.loads((patient / "review.json").read_text(encoding="utf-8"))
        assert file["reviews"][:-1] == before and len(file["reviews"]) == number + 1
        before = file["reviews"]
    assert json.loads(client.get("/review")[1])["reviews"] == before


def test_a_crowd_waits_its_turn(patient):
    """Before the server takes the first, sixty have knocked: none is turned away."""
    server = ReviewServer(patient, 0)
    crowd = [socket.create_connection(server.server_address[:2], timeout=120) for _ in range(60)]
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        for one in crowd:
            one.sendall(f"GET / HTTP/1.0\r\nHost: 127.0.0.1:{server.server_port}\r\n\r\n".encode())
        assert [one.recv(12) for one in crowd] == [b"HTTP/1.0 200"] * 60
    finally:
        for one in crowd:
            one.close()
        server.shutdown()
        server.server_close()


def test_twenty_at_once_lose_nothing(client, patient):
    with ThreadPoolExecutor(20) as pool:
        done = list(pool.map(lambda i: client.post(comment=str(i))[0], range(20)))
    assert done == [201] * 20
    assert {r.comment for r in read_reviews(patient)} == {str(i) for i in range(20)}
    assert not [p for p in patient.iterdir() if p.name.startswith(".")]


def test_a_downloaded_review_can_be_put_there(client, patient):
    review = {
        "time": "2026-01-02T03:04:05.678Z",
        "verdict": "agree",
        "comment": "",
        "reviewer": "A",
    }
    review |= dict.fromkeys(("report_sha256", "prediction_sha256", "content_sha256"))
    (patient / "review.json").write_text(json.dumps({"schema_version": 1, "reviews": [review]}))
    assert client.post()[0] == 201
    reviews = read_reviews(patient)
    assert len(reviews) == 2 and reviews[0].model_dump() == review


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"{",
        b'{"schema_version": 2, "reviews": []}',
        b'{"schema_version": 1, "reviews": [{}]}',
        b'{"schema_version": 1, "reviews": [], "more": 1}',
        b"\xff\xfe",
        b"[" * 100_000,
    ],
)
def test_an_unreadable_file_is_never_written_over(client, patient, content):
    (patient / "review.json").write_bytes(content)
    status, answer = client.post()
    assert status == 409 and "cannot be read" in answer["error"]
    assert client.get("/review")[0].status == 409
    assert (patient / "review.json").read_bytes() == content
    assert b"review.json cannot be read" in client.get("/")[1]
    with pytest.raises(PatientDataError, match=r"review\.json: it cannot be read"):
        add_review(patient, "agree")


def test_a_link_or_a_pipe_is_no_review_file(client, patient, tmp_path):
    elsewhere = tmp_path / "elsewhere.json"
    for text in ('{"schema_version": 1, "reviews": []}', None):
        if text is None:
            elsewhere.unlink()
        else:
            elsewhere.write_text(text)
        (patient / "review.json").unlink(missing_ok=True)
        (patient / "review.json").symlink_to(elsewhere)
        assert client.post()[0] == 409
        assert (patient / "review.json").is_symlink() and elsewhere.exists() == (text is not None)
    (patient / "review.json").unlink()
    os.mkfifo(patient / "review.json")
    assert client.post()[0] == 409


def test_the_page_that_was_read_is_the_one_that_is_judged(client, patient):
    seen = re.search(rb'data-report="([^"]+)"', client.get("/report.html")[1])[1].decode()
    assert seen == hashlib.sha256((patient / "report.html").read_bytes()).hexdigest()
    assert client.post(report_sha256=seen)[0] == 201
    (patient / "report.html").write_text(page_text() + " ", encoding="utf-8")
    status, answer = client.post(report_sha256=seen)
    assert status == 409 and "Reload" in answer["error"]
    assert len(read_reviews(patient)) == 1


def test_the_list_of_patients(tmp_path):
    write(tmp_path / "p1")
    write(tmp_path / "p 2%", record_id="second", status="caution")
    (write(tmp_path / "p3") / "prediction.json").unlink()
    (write(tmp_path / "p4") / "prediction.json").write_text("[" * 100_000)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "prediction.json").write_text("{}")
    with serving(tmp_path) as client:
        client.post("/p1/review", "disagree")
        client.post("/p1/review", "agree")
        text = client.get("/")[1].decode()
        rows = re.findall(r"<tr><th scope=\"row\">(.*?)</tr>", text, re.S)
        links = [unquote(re.search(r'href="/(.*?)/report.html"', row)[1]) for row in rows]
        assert links == ["p 2%", "p1", "p3", "p4"]
        assert "1 of 4 reviewed" in text and "notes" not in text
        assert "second" in rows[0] and "answered with caution" in rows[0]
        assert "high, 80 %" in rows[1] and "Agrees (reviews: 2)" in rows[1]
        assert all("see the page" in row and "not reviewed" in row for row in rows[2:])
        for link in re.findall(r'href="(/.*?)"', text):
            assert client.get(link)[0].status == 200
        # A file that changes is read again; a patient who comes later is there.
        write(tmp_path / "p1", predicted="low", probabilities=[0.7, 0.3])
        write(tmp_path / "p5")
        text = client.get("/")[1].decode()
        assert "low, 70 %" in text and "1 of 5 reviewed" in text


def test_an_evaluation(tmp_path):
    write(tmp_path / "reports" / "p1")
    for name in ("index.html", "run.json", "metrics.csv", "notes.txt", "plots/auroc.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("<script>1 < 2</script>")
    with serving(tmp_path) as client:
        text = client.get("/")[1].decode()
        assert 'href="/reports/p1/report.html"' in text and 'href="/index.html"' in text
        for name in ("index.html", "run.json", "metrics.csv", "plots/auroc.png"):
            assert client.get(f"/{name}")[0].status == 200
        for name in ("notes.txt", "plots", "plots/", "reports", "reports/p1", "reports/p1/"):
            assert client.get(f"/{name}")[0].status == 404
        assert client.post("/reports/p1/review")[0] == 201
        assert len(read_reviews(tmp_path / "reports" / "p1")) == 1


def test_names_and_answers_cannot_leave_the_list(tmp_path):
    name = HOSTILE.replace("/", "")
    write(tmp_path / name, record_id=HOSTILE, predicted=HOSTILE, classes=[HOSTILE, "b"])
    write(tmp_path / "a\u202eb", record_id="\u202eright to left")
    folder = tmp_path / os.fsdecode(b"c\xff")
    folder.mkdir()
    (folder / "report.html").write_text(page_text(), encoding="utf-8")
    with serving(tmp_path) as client:
        text = client.get("/")[1].decode()
        assert "<script" not in text and "<!--" not in text and "49" not in text
        assert "\u202e" not in text
        links = re.findall(r'href="(/.*?)"', text)
        assert len(links) == 3
        for link in links:
            assert client.get(link)[0].status == 200
            at = link.replace("report.html", "review")
            assert client.post(at, comment=HOSTILE, reviewer=HOSTILE)[0] == 201
            # Read by the page as data, never as a page.
            answer, content = client.get(at)
            assert answer.headers["Content-Type"] == "application/json"
            assert json.loads(content)["reviews"][0]["comment"] == HOSTILE
        text = client.get("/")[1].decode()
        assert "<script" not in text and "3 of 3" in text


def test_pages_may_run_their_own_scripts_only(client):
    answer, content = client.get("/report.html")
    policy = answer.headers["Content-Security-Policy"]
    assert re.search(r"default-src 'none'; script-src 'sha256-[^ ;]{44}'; ", policy)
    assert "connect-src 'self'" in policy and "frame-ancestors 'none'" in policy
    assert content.count(b"<script") == 1
    assert "script-src 'none'" in client.get("/")[0].headers["Content-Security-Policy"]


@pytest.mark.parametrize("path", ["/", "/report.html", "/prediction.json", "/review", "/absent"])
def test_every_answer_is_guarded(client, path):
    answer, content = client.get(path)
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["Cache-Control"] == "no-store"
    assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
    assert "Access-Control-Allow-Origin" not in answer.headers
    assert answer.headers["Server"] == "dymo-med"
    head, nothing = client.ask("HEAD", path)
    assert (head.status, nothing) == (answer.status, b"")
    assert head.headers["Content-Length"] == str(len(content))


def test_an_older_page_gets_the_section_too(patient):
    (patient / "report.html").write_text("<main><p>Old</p></main><footer></footer>")
    with serving(patient) as client:
        content = client.get("/report.html")[1].decode()
        assert f'<section id="reader" data-token="{client.server.token}"' in content
        assert content.startswith("<main><p>Old</p><section") and content.endswith(
            "</section></main><footer></footer>"
        )
        assert client.post()[0] == 201


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:{port}",
        "127.0.0.1",
        "127.0.0.1:1",
        "127.0.0.1:{port}.evil.example",
        "0.0.0.0:{port}",
        "",
        False,
    ],
)
def test_another_name_is_refused(client, patient, host):
    """A name that someone else made to lead to this computer."""
    host = host and host.format(port=client.port)
    assert client.get("/", host=host)[0].status == 403
    body = b'{"verdict": "agree"}'
    headers = {
        "Origin": f"http://{host}",
        "X-Review-Token": client.server.token,
        "Content-Type": "application/json",
    }
    assert client.ask("POST", "/review", body, headers, host)[0].status == 403
    assert not (patient / "review.json").exists()


def test_localhost_is_a_name_of_this_computer(client):
    host = f"localhost:{client.port}"
    assert client.get("/", host=host)[0].status == 200
    assert client.server.server_address[0] == "127.0.0.1"


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": None},
        {"Origin": "null"},
        {"Origin": "http://evil.example"},
        {"Origin": "http://127.0.0.1"},
        {"Origin": "http://localhost:{port}"},  # another origin than the name that was asked
        {"Origin": "https://127.0.0.1:{port}"},
        {"X-Review-Token": None},
        {"X-Review-Token": ""},
        {"X-Review-Token": "x" * 43},
        {"X-Review-Token": "\xe9"},
    ],
)
def test_a_post_from_elsewhere_is_refused(client, patient, headers):
    given = {k: v and v.format(port=client.port) for k, v in headers.items()}
    status, answer = client.post(headers=given)
    assert status == 403 and answer["error"].startswith("Refused")
    assert not (patient / "review.json").exists()


def test_the_token_is_in_the_page_and_new_in_every_run(patient):
    with serving(patient) as first, serving(patient) as second:
        assert first.token() == first.server.token and len(first.server.token) >= 32
        assert second.token() != first.token()
        assert second.post(headers={"X-Review-Token": first.token()})[0] == 403
    assert b'data-token=""' in (patient / "report.html").read_bytes()


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{}",
        b"[]",
        b"{",
        b'{"verdict": "maybe"}',
        b'{"verdict": true}',
        b'{"verdict": "agree", "time": "2026-01-01T00:00:00Z"}',
        b'{"verdict": "agree", "comment": null}',
        b'{"verdict": "agree", "comment": "\\ud800"}',
        b'{"verdict": "agree", "comment": "\xff"}',
        b'{"verdict": "agree", "reviewer": ""}',
        b'{"verdict": "agree", "report_sha256": "x"}',
        json.dumps({"verdict": "agree", "comment": "x" * 10_001}).encode(),
        json.dumps({"verdict": "agree", "reviewer": "x" * 201}).encode(),
        b"[" * 100_000,
    ],
)
def test_what_is_no_review_is_refused(client, patient, body):
    assert client.post(body=body)[0] == 400
    assert not (patient / "review.json").exists()


def test_the_longest_comment(client, patient):
    comment = "\U0001f642" * 10_000
    assert client.post(comment=comment)[0] == 201  # twelve bytes each, as JSON escapes it here
    assert read_reviews(patient)[0].comment == comment


def test_too_much_is_refused_without_being_kept(client, patient):
    status, answer = client.post(body=b"x" * (128 * 1024 + 1))
    assert status == 413 and "more than" in answer["error"]
    assert not (patient / "review.json").exists()


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Content-Length": "-1"}, 400),
        ({"Content-Length": "x"}, 400),
        ({"Transfer-Encoding": "chunked", "Content-Length": "2"}, 411),
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
    ],
)
def test_another_form_of_body_is_refused(client, headers, status):
    assert client.post(headers=headers)[0] == status


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"])
def test_other_methods_are_refused(client, patient, method):
    for path in ("/", "/report.html", "/review"):
        answer, _ = client.ask(method, path)
        assert answer.status == 405 and answer.headers["Allow"] == "GET, HEAD"
    assert client.ask("BREW", "/")[0].status == 501
    assert client.post("/report.html")[0] == client.post("/")[0] == 405
    assert (patient / "report.html").is_file()


@pytest.mark.parametrize(
    "path",
    [
        "/../secret.json",
        "/%2e%2e/secret.json",
        "/..%2fsecret.json",
        "/..%5csecret.json",
        "/p1/../../secret.json",
        "/p1/%2e%2e/%2e%2e/secret.json",
        "/%2fetc/passwd",
        "//etc/passwd",
        "/p1/./report.html",
        "/p1//report.html",
        "/p1%2freport.html",
        "/p1/report.html%00.json",
        "/p1/report.html/",
        "/.hidden/report.html",
        "/p1/.hidden.json",
        "/p1",
        "/p1/",
        "/p1/notes.txt",
        "/p1/secret.json",
        "/other.json",
        "/other/data.json",
        "/deep/p1/report.html",
        "/out/report.html",
        "/leading-out/report.html",
        "/p2/report.html",
        "/p1/selection.csv",
        "/%ff/report.html",
        "/" + "x" * 5000 + "/report.html",
        "http://127.0.0.1/p1/report.html",
        "*",
    ],
)
def test_nothing_else_is_seen(tmp_path, path):
    root, outside = tmp_path / "out", tmp_path / "outside"
    for folder in (root / "p1", root / ".hidden", root / "deep" / "p1", outside):
        write(folder)
    for file in (
        tmp_path / "secret.json",
        root / "other.json",
        root / "p1" / "secret.json",
        root / "p1" / ".hidden.json",
        root / "p1" / "notes.txt",
    ):
        file.write_text("{}")
    (root / "other").mkdir()
    (root / "other" / "data.json").write_text("{}")
    (root / "leading-out").symlink_to(outside)
    (root / "p2").mkdir()
    (root / "p2" / "report.html").symlink_to(outside / "report.html")
    (root / "p1" / "selection.csv").symlink_to(tmp_path / "secret.json")
    with serving(root) as client:
        answer, content = client.get(path)
        assert answer.status in (400, 404) and set(json.loads(content)) == {"error"}
        assert client.server.pages.keys() == [("p1",)]
        if path.endswith("report.html"):
            assert client.post(path.replace("report.html", "review"))[0] in (400, 404, 405)
    assert not list(tmp_path.rglob("review.json"))


def test_a_folder_that_cannot_be_written_is_said(client, patient, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dymo_med.review.write_json", full)
    status, answer = client.post()
    assert status == 500 and "could not be written" in answer["error"]


def test_a_review_alone_keeps_its_folder_from_being_replaced(patient):
    """`predict` into the same folder again would lose it."""
    from dymo_med.files import check_replaceable

    check_replaceable(patient, "prediction.json", ("prediction.json", "report.html"))
    add_review(patient, "agree")
    with pytest.raises(ConfigError, match=r"review\.json"):
        check_replaceable(patient, "prediction.json", ("prediction.json", "report.html"))


@pytest.mark.parametrize("kind", ["absent", "empty", "file"])
def test_no_page_is_an_error_of_usage(tmp_path, capsys, kind):
    out = tmp_path / "out"
    if kind == "empty":
        (out / "deep" / "er").mkdir(parents=True)
        (out / "deep" / "er" / "report.html").write_text("")
    if kind == "file":
        out.write_text("")
    with pytest.raises(SystemExit) as stopped:
        main(["review", str(out), "--no-browser"])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {out}: ") and "Expected" in line


def test_a_port_that_is_taken_is_an_error_of_usage(client, patient, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["review", str(patient), "--port", str(client.port), "--no-browser"])
    assert stopped.value.code == 2
    assert "Name another one with --port" in capsys.readouterr().err


def test_the_command_says_where_and_ends_with_ctrl_c(patient, capsys, monkeypatch):
    opened = []
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr("webbrowser.open", opened.append)

    def stop(self, *_):
        raise KeyboardInterrupt

    monkeypatch.setattr(ReviewServer, "serve_forever", stop)
    for more in ([], ["--no-browser"]):
        with pytest.raises(SystemExit) as stopped:
            main(["review", str(patient), "--port", "0", *more])
        assert stopped.value.code == 0
    said = capsys.readouterr().out
    assert re.search(r"1 patient at http://127\.0\.0\.1:\d+/\n", said)
    assert len(opened) == 1 and opened[0] in said
