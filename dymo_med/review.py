"""Patients' pages in the browser of the person at this computer, whose verdicts are kept.

A server for one person: it listens on this computer only, serves the files of patients' folders and
nothing else, and writes nothing but `review.json` beside a page. Other web pages that are open in
the same browser are the danger: they can ask this server too, so every question must name it by its
own address, and whatever writes must come from a page that this very run has served.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
import secrets
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import TCPServer
from typing import Annotated, Any, Literal
from urllib.parse import quote, unquote_to_bytes, urlunsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dymo_med.errors import ConfigError, PatientDataError, Problem
from dymo_med.files import write_json
from dymo_med.inference.report import (
    environment,
    guarded,
    percent,
    policy,
    scripts_of,
    words,
)

SCHEMA_VERSION: Literal[1] = 1
HOST = "127.0.0.1"
# Ten thousand characters of a comment, were each escaped at length, and room for the rest.
_MOST_BYTES = 128 * 1024
_PAGE, _PREDICTION, _REVIEWS = "report.html", "prediction.json", "review.json"
_PATIENT_FILES = (_PAGE, _PREDICTION, "selection.csv", _REVIEWS)
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".json": "application/json",
    ".csv": "text/csv; charset=utf-8",
    ".png": "image/png",
}
# As `reader.html.j2` writes it; a name cannot forge it, since quotes in names are escaped.
_BLANK = b'<section id="reader" data-token="" data-report=""'
_LOCK = threading.Lock()

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Verdict = Literal["agree", "disagree"]
Comment = Annotated[str, Field(max_length=10_000)]
Name = Annotated[str, Field(min_length=1, max_length=200)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Review(_Part):
    """What one reader said of one page at one time: an entry of `review.json`.

    Attributes:
        time: UTC, ISO 8601.
        verdict: Whether the reader shares the answer.
        comment: May be empty.
        reviewer: Whoever it was, if that was said.
        report_sha256: Of the page that was read; None if it was downloaded from a page that was
            opened as a file and cannot know.
        prediction_sha256: Of the `prediction.json` beside it, likewise; None if there is none.
        content_sha256: As `prediction.json` gives it.
    """

    time: Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|\+00:00)$")]
    verdict: Verdict
    comment: Comment
    reviewer: Name | None
    report_sha256: Sha256 | None
    prediction_sha256: Sha256 | None
    content_sha256: Sha256 | None


class ReviewFile(_Part):
    """`review.json`: everything that readers said, in the order in which they said it."""

    schema_version: Literal[1]
    reviews: list[Review]


class _Posted(_Part):
    """What a page sends."""

    verdict: Verdict
    comment: Comment = ""
    reviewer: Name | None = None
    report_sha256: Sha256 | None = None


class _PageChanged(Exception):
    """The page is no longer the one that was read."""


def read_reviews(folder: Path) -> list[Review]:
    """Return the reviews of a page, oldest first; none if there is no `review.json`.

    Args:
        folder: Where the page is.

    Raises:
        PatientDataError: If there is one that cannot be read. It may hold what someone wrote, so
            it is never written over.
    """
    path = folder / _REVIEWS
    if not os.path.lexists(path):
        return []
    with suppress(OSError, ValidationError):
        if _regular(path):
            return ReviewFile.model_validate_json(path.read_bytes()).reviews
    raise PatientDataError(
        Problem(
            str(path),
            "it cannot be read as reviews",
            expected=f"a JSON file of schema_version {SCHEMA_VERSION}",
            remedy="Repair it or move it away",
        )
    )


def add_review(
    folder: Path,
    verdict: Verdict,
    comment: str = "",
    reviewer: str | None = None,
    *,
    seen_sha256: str | None = None,
) -> list[Review]:
    """Append a review to the `review.json` of a page; two at once lose nothing.

    Args:
        folder: Where the page is.
        verdict: What the reader says.
        comment: Why.
        reviewer: Who.
        seen_sha256: Of the page that was read; None = the one that is there.

    Returns:
        All reviews of the page.

    Raises:
        PatientDataError: If the `review.json` that is there cannot be read.
    """
    with _alone(folder):
        reviews = read_reviews(folder)
        file = folder / _PREDICTION
        prediction = file.read_bytes() if _regular(file) else None
        page = hashlib.sha256((folder / _PAGE).read_bytes()).hexdigest()
        if seen_sha256 not in (None, page):
            raise _PageChanged
        review = Review(
            time=datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            verdict=verdict,
            comment=comment,
            reviewer=reviewer,
            report_sha256=page,
            prediction_sha256=hashlib.sha256(prediction).hexdigest() if prediction else None,
            content_sha256=_content(prediction),
        )
        reviews = [*reviews, review]
        written = ReviewFile(schema_version=SCHEMA_VERSION, reviews=reviews)
        write_json(folder / _REVIEWS, written.model_dump())
    return reviews


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep others away from a folder's reviews: other threads, and other servers for it."""
    with _LOCK:
        if sys.platform == "win32":
            yield
            return
        import fcntl

        # The folder itself is locked: a file for it would stay behind.
        handle = os.open(folder, os.O_RDONLY)
        try:
            with suppress(OSError):  # some network drives cannot lock
                fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)


def _regular(path: Path) -> bool:
    """Return whether it is a file itself, and no link to what may be somewhere else."""
    return path.is_file() and not path.is_symlink()


def _content(prediction: bytes | None) -> str | None:
    """Return what `prediction.json` says of itself, if it does."""
    digest = _mapping(prediction).get("content_sha256")
    return digest if isinstance(digest, str) and re.fullmatch("[0-9a-f]{64}", digest) else None


def _mapping(text: bytes | None) -> Mapping[str, Any]:
    """Return a JSON object, empty if it is none."""
    try:
        data = json.loads(text or b"{}")
    except (ValueError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}


class Pages:
    """The pages under a folder, and which of its files may be seen.

    Args:
        out: A prediction's folder, a folder of these, or an evaluation with `reports/`.

    Raises:
        ConfigError: If no patient's page is there.
    """

    def __init__(self, out: Path) -> None:
        if not out.is_dir():
            raise ConfigError(
                Problem(
                    str(out),
                    "it is not there" if not out.exists() else "it is a file",
                    expected="a folder that `predict` or `evaluate` wrote",
                    remedy="Check the path",
                )
            )
        self.root = out.resolve()
        self._summaries: dict[Path, tuple[tuple[int, int], tuple[str, str, str]]] = {}
        if not self.keys():
            raise ConfigError(
                Problem(
                    str(out),
                    "there is no patient's page in it",
                    expected=f"{_PAGE}, FOLDER/{_PAGE} or reports/RECORD/{_PAGE}",
                    remedy="Name the folder that `predict` wrote, a folder of these, or an "
                    "evaluation with reports",
                )
            )

    def keys(self) -> list[tuple[str, ...]]:
        """Return where the pages are: the names of the folders that lead to each."""
        found: list[tuple[str, ...]] = [()]
        for above in ((), ("reports",)):
            with suppress(OSError):
                names = sorted(p.name for p in self.root.joinpath(*above).iterdir())
                found += [(*above, name) for name in names]
        return [key for key in found if self.folder(key) is not None]

    def folder(self, key: Sequence[str]) -> Path | None:
        """Return the folder of a page, None if there is no page or it is somewhere else.

        Args:
            key: Names of the folders that lead there.
        """
        deep = len(key) == 2 and key[0] == "reports"
        if len(key) > 1 and not deep:
            return None
        page = self._inside((*key, _PAGE))
        return None if page is None else self.root.joinpath(*key)

    def file(self, parts: Sequence[str]) -> Path | None:
        """Return a file that may be seen, None for all others.

        Args:
            parts: Names of the folders that lead there, and its own.
        """
        if not parts or Path(parts[-1]).suffix not in _TYPES:
            return None
        *key, name = parts
        patient = name in _PATIENT_FILES and self.folder(key) is not None
        # What the page of a cohort links to.
        cohort = key in ([], ["plots"]) and self.cohort_page
        return self._inside(parts) if patient or cohort else None

    @property
    def cohort_page(self) -> bool:
        """Whether this is an evaluation, with a page of the whole cohort."""
        return all(self._inside((name,)) is not None for name in ("index.html", "run.json"))

    def _inside(self, parts: Sequence[str]) -> Path | None:
        """Return a file below the root that does not lead out of it, not hidden."""
        if any(not p or p.startswith(".") or set(p) & set("/\\\0") for p in parts):
            return None
        path = self.root.joinpath(*parts)
        try:
            real = path.resolve(strict=True)
        except (OSError, RuntimeError):
            return None
        return path if real.is_relative_to(self.root) and real.is_file() else None

    def rows(self) -> list[dict[str, Any]]:
        """Return what the list of patients shows."""
        rows = []
        for key in self.keys():
            folder = self.root.joinpath(*key)
            record, answer, status = self._summary(self._inside((*key, _PREDICTION)))
            row: dict[str, Any] = {
                "record": record or (key[-1] if key else self.root.name),
                "href": "/" + "/".join(quote(os.fsencode(p), safe="") for p in (*key, _PAGE)),
                "answer": answer,
                "status": status,
                "reviews": 0,
                "unreadable": False,
            }
            try:
                reviews = read_reviews(folder)
            except PatientDataError:
                row["unreadable"] = True
            else:
                row |= {"reviews": len(reviews), "verdict": reviews and reviews[-1].verdict}
            rows.append(row)
        return rows

    def _summary(self, path: Path | None) -> tuple[str, str, str]:
        """Return record, answer and status; blank where the file does not say."""
        try:
            if path is None:
                return "", "", ""
            stat = path.stat()
            version = (stat.st_mtime_ns, stat.st_size)
            # Files with pictures in them are large, and the list is opened after every patient.
            if self._summaries.get(path, (None,))[0] != version:
                self._summaries[path] = (version, _summary(_mapping(path.read_bytes())))
        except OSError:
            return "", "", ""
        return self._summaries[path][1]


def _summary(data: Mapping[str, Any]) -> tuple[str, str, str]:
    record, predicted = data.get("record_id"), data.get("predicted")
    status = data.get("status")
    answer = predicted if isinstance(predicted, str) else ""
    with suppress(KeyError, TypeError, ValueError, IndexError):
        p = data["probabilities"][data["classes"].index(predicted)]
        if 0 <= p <= 1:
            answer += f", {percent(p)}"
    known = status if status in ("answered", "caution", "abstained") else None
    return (
        record if isinstance(record, str) else "",
        answer,
        words()["status"][known] if known else "",
    )


class _Refusal(Exception):
    """What is answered instead: a status and a key of the words `reader.errors`."""

    def __init__(self, status: HTTPStatus, key: str) -> None:
        super().__init__(key)
        self.status, self.key = status, key


class ReviewServer(ThreadingHTTPServer):
    """Serves patients' pages to the browser on this computer, and keeps reviews.

    Args:
        out: See `Pages`.
        port: Where to listen; 0 = any free port.

    Raises:
        ConfigError: If there is no page, or the port cannot be had.
    """

    daemon_threads = True
    # Browsers open several connections at once; the base class lets five wait.
    request_queue_size = 128

    def __init__(self, out: Path, port: int = 8000) -> None:
        self.pages = Pages(out)
        self.token = secrets.token_urlsafe(32)
        try:
            super().__init__((HOST, port), _Handler)
        except (OSError, OverflowError) as error:
            raise ConfigError(
                Problem(
                    f"port {port}",
                    "it cannot be listened on",
                    expected="a free port",
                    got=str(getattr(error, "strerror", None) or error),
                    remedy="Name another one with --port",
                )
            ) from None

    def server_bind(self) -> None:
        """Take the port; unlike the base class, ask no name server who we are."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = HOST, int(self.server_address[1])

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Keep quiet about browsers that hang up; anything else is a bug worth a traceback."""
        if not isinstance(sys.exc_info()[1], ConnectionError | TimeoutError):
            super().handle_error(request, client_address)

    @property
    def url(self) -> str:
        """Address of the list of patients."""
        return urlunsplit(("http", f"{HOST}:{self.server_port}", "/", "", ""))

    def run(self) -> None:
        """Serve until Ctrl-C; a review that is being written is finished."""
        try:
            self.serve_forever()
        except KeyboardInterrupt:
            pass
        finally:
            with _LOCK:
                self.server_close()


class _Handler(BaseHTTPRequestHandler):
    """Answers one question; everything that is not expected is refused."""

    server: ReviewServer
    timeout = 30  # of a browser that says nothing

    def do_GET(self) -> None:
        """Answer with the list of patients, a page, a file, or the reviews of a page."""
        try:
            self._authority()
            parts = self._parts()
            if parts == ["favicon.ico"]:
                return self._reply(HTTPStatus.NO_CONTENT, "image/png", b"")
            if not parts:
                return self._html(self._index())
            if parts[-1] == "review":
                return self._reviews(HTTPStatus.OK, read_reviews(self._folder(parts)))
            path = self.server.pages.file(parts)
            if path is None:
                raise _Refusal(HTTPStatus.NOT_FOUND, "absent")
            content = path.read_bytes()
            if path.suffix != ".html":
                return self._reply(HTTPStatus.OK, _TYPES[path.suffix], content)
            self._html(self._filled(content) if path.name == _PAGE else content)
        except PatientDataError:
            self._refuse(_Refusal(HTTPStatus.CONFLICT, "read"))
        except (ConnectionError, TimeoutError):
            raise
        except OSError:
            self._refuse(_Refusal(HTTPStatus.NOT_FOUND, "absent"))
        except _Refusal as refusal:
            self._refuse(refusal)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        """Append a review to a page's `review.json`."""
        try:
            # Read first: a browser that is still sending would not see the answer.
            body = self._body()
            authority = self._authority()
            own = urlunsplit(("http", authority, "", "", ""))
            token = self.headers.get("X-Review-Token", "")
            if self.headers.get_all("Origin") != [own] or not hmac.compare_digest(
                token.encode(), self.server.token.encode()
            ):
                raise _Refusal(HTTPStatus.FORBIDDEN, "foreign")
            parts = self._parts()
            if not parts or parts[-1] != "review":
                raise _Refusal(HTTPStatus.METHOD_NOT_ALLOWED, "method")
            folder = self._folder(parts)
            if self.headers.get_content_type() != "application/json":
                raise _Refusal(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "invalid")
            posted = _Posted.model_validate_json(body)
            reviews = add_review(
                folder,
                posted.verdict,
                posted.comment,
                posted.reviewer,
                seen_sha256=posted.report_sha256,
            )
            self._reviews(HTTPStatus.CREATED, reviews)
        except ValidationError:
            self._refuse(_Refusal(HTTPStatus.BAD_REQUEST, "invalid"))
        except _PageChanged:
            self._refuse(_Refusal(HTTPStatus.CONFLICT, "changed"))
        except PatientDataError:
            self._refuse(_Refusal(HTTPStatus.CONFLICT, "unreadable"))
        except (ConnectionError, TimeoutError):
            raise
        except OSError:
            self._refuse(_Refusal(HTTPStatus.INTERNAL_SERVER_ERROR, "disk"))
        except _Refusal as refusal:
            self._refuse(refusal)

    def do_PUT(self) -> None:
        """Refuse: nothing is replaced."""
        self._refuse(_Refusal(HTTPStatus.METHOD_NOT_ALLOWED, "method"))

    do_DELETE = do_PATCH = do_OPTIONS = do_TRACE = do_CONNECT = do_PUT

    def _authority(self) -> str:
        """Return by which name we were asked for; a name that is not ours was made to lead here."""
        port = self.server.server_port
        # Browsers leave out port 80.
        own = {name if port == 80 else f"{name}:{port}" for name in (HOST, "localhost")}
        named = self.headers.get_all("Host") or []
        if len(named) != 1 or named[0] not in own:
            raise _Refusal(HTTPStatus.FORBIDDEN, "foreign")
        return str(named[0])

    def _parts(self) -> list[str]:
        """Return the names in the address; the way back up and hidden files do not exist."""
        path = self.path.split("?")[0].split("#")[0]
        if not path.startswith("/"):
            raise _Refusal(HTTPStatus.BAD_REQUEST, "malformed")
        if path == "/":
            return []
        # Divided first: a slash that was written as %2F is part of a name, and no name has one.
        return [os.fsdecode(unquote_to_bytes(part)) for part in path[1:].split("/")]

    def _folder(self, parts: Sequence[str]) -> Path:
        folder = self.server.pages.folder(parts[:-1])
        if folder is None:
            raise _Refusal(HTTPStatus.NOT_FOUND, "absent")
        return folder

    def _body(self) -> bytes:
        """Return what was sent, if it is no longer than a review can be."""
        lengths = self.headers.get_all("Content-Length") or []
        if "Transfer-Encoding" in self.headers or len(lengths) != 1:
            raise _Refusal(HTTPStatus.LENGTH_REQUIRED, "malformed")
        if not re.fullmatch(r"[0-9]{1,15}", lengths[0]):
            raise _Refusal(HTTPStatus.BAD_REQUEST, "malformed")
        length = int(lengths[0])
        if length > _MOST_BYTES:
            # Most browsers look for an answer only when they have sent all.
            left = min(length, 8 * _MOST_BYTES)
            while left > 0 and (chunk := self.rfile.read(min(left, 65536))):
                left -= len(chunk)
            raise _Refusal(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "too_large")
        return self.rfile.read(length)

    def _index(self) -> bytes:
        template = environment().get_template("review.html.j2")
        pages = self.server.pages
        text = guarded(template.render(rows=pages.rows(), cohort_page=pages.cohort_page))
        # Names of files need not be text.
        return text.encode("utf-8", "backslashreplace")

    def _filled(self, content: bytes) -> bytes:
        """Return a page that knows where to send reviews, and of which version of it."""
        digest = hashlib.sha256(content).hexdigest()
        if b'<section id="reader"' not in content:
            # Written before there was such a section.
            form = environment().get_template("reader.html.j2").render().encode()
            before, end, after = content.rpartition(b"</main>")
            content = before + form + end + after if end else content + form
        filled = f'<section id="reader" data-token="{self.server.token}" data-report="{digest}"'
        return content.replace(_BLANK, filled.encode(), 1)

    def _html(self, content: bytes) -> None:
        """Answer with a page whose own scripts may run, and no other."""
        self._reply(HTTPStatus.OK, _TYPES[".html"], content, scripts_of(content))

    def _reviews(self, status: HTTPStatus, reviews: Sequence[Review]) -> None:
        self._json(status, {"reviews": [r.model_dump() for r in reviews]})

    def _refuse(self, refusal: _Refusal) -> None:
        self._json(refusal.status, {"error": words()["reader"]["errors"][refusal.key]})

    def _json(self, status: HTTPStatus, data: Any) -> None:
        self._reply(status, _TYPES[".json"], json.dumps(data).encode())

    def _reply(
        self, status: HTTPStatus, kind: str, content: bytes, scripts: str = "'none'"
    ) -> None:
        self.send_response(status)
        if status != HTTPStatus.NO_CONTENT:
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
        if status == HTTPStatus.METHOD_NOT_ALLOWED:
            self.send_header("Allow", "GET, HEAD")
        self.send_header("Content-Security-Policy", f"{policy(scripts)}; frame-ancestors 'none'")
        for name, value in (
            ("X-Content-Type-Options", "nosniff"),
            ("X-Frame-Options", "DENY"),
            ("Cross-Origin-Resource-Policy", "same-origin"),
            ("Cross-Origin-Opener-Policy", "same-origin"),
            ("Referrer-Policy", "same-origin"),
            ("Cache-Control", "no-store"),
        ):
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer what is not even understood; see `BaseHTTPRequestHandler`."""
        self._refuse(_Refusal(HTTPStatus(code), "malformed"))

    def version_string(self) -> str:
        """Return what we call ourselves: no versions."""
        return "dymo-med"

    def log_message(self, format: str, *values: Any) -> None:
        """Log nothing: addresses hold the names of patients."""
