"""Notifiers, with real programs and a real server: what arrives, what fails, what hangs."""

from __future__ import annotations

import email
import email.policy
import json
import os
import socket
import sys
import textwrap
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

import atomtx
from atomtx import locks, notifiers
from atomtx.notices import Event, Notice, NotifySettings
from tests.unit.test_notices import told

FAILED = told(outcome="failed", reason="a näme", exit_status=1)
COMPLETED = told()
PARKED = told(cleanup="parked", exit_status=4)
LIMIT_S = 60.0
HANGS_S = 10.0  # the limit of what never ends; a slow start must fit in


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(atomtx.__file__).parent.parent))
    monkeypatch.setattr(notifiers, "PAUSE_S", 0.0)


def program(path: Path, code: str) -> str:
    """Write an executable in Python."""
    path.write_text(f"#!{sys.executable}\n{textwrap.dedent(code)}")
    path.chmod(0o755)
    return str(path)


# -- command -----------------------------------------------------------------------------------


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command gets its words as they are, the facts as variables, the text as its input."""
    monkeypatch.setenv("OF_THE_USER", "yes")
    code = """
        import json, os, sys
        got = {"argv": sys.argv[1:], "env": dict(os.environ), "stdin": sys.stdin.read()}
        json.dump(got | {"cwd": os.getcwd(), "fds": os.listdir("/proc/self/fd")},
                  open(sys.argv[1], "w"))
    """
    got = tmp_path / "got"
    argv = (program(tmp_path / "tell", code), str(got), "$(reboot)", "two words")
    assert notifiers.send(NotifySettings(command=argv), [FAILED]) == []
    found = json.loads(got.read_text())
    assert found["argv"] == list(argv[1:])
    assert found["stdin"] == FAILED.text
    assert found["cwd"] == "/"
    assert found["env"]["OF_THE_USER"] == "yes"
    assert FAILED.variables.items() <= found["env"].items()
    assert found["env"]["ATOMTX_EXIT_STATUS"] == "1"


def test_no_lock_inherited(tmp_path: Path) -> None:
    """No notifier holds a lock of ours: one that hangs would else keep a run from recovery."""
    lock = tmp_path / "front.lock"
    lock.touch()
    code = """
        import os, sys
        open_files = [os.path.realpath(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd")]
        sys.exit(sys.argv[1] in open_files and "inherited")
    """
    tell = program(tmp_path / "tell", code)
    with locks.acquired(lock) as descriptor:
        assert descriptor is not None
        os.set_inheritable(descriptor, True)
        assert notifiers.send(NotifySettings(command=(tell, str(lock))), [FAILED]) == []
        # The check can fail: it sees a descriptor that is passed on.
        assert os.spawnv(os.P_WAIT, tell, [tell, str(lock)]) == 1
        os.set_inheritable(descriptor, False)
        assert os.spawnv(os.P_WAIT, tell, [tell, str(lock)]) == 0


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import sys; print('first'); sys.exit('no route')", "failed: no route"),
        ("import sys; sys.exit(3)", "failed: exit status 3"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "failed: exit status -9"),
        ("import sys; sys.stdin.close(); print('x' * 10_000_000); sys.exit('full')", "full"),
    ],
)
def test_command_fails(tmp_path: Path, code: str, words: str) -> None:
    """A failure is one line: the command, and its own last words."""
    tell = program(tmp_path / "tell", code)
    (line,) = notifiers.send(NotifySettings(command=(tell,)), [FAILED])
    assert line.startswith("command: ")
    assert line.endswith(words)
    assert "\n" not in line


def test_command_missing(tmp_path: Path) -> None:
    """A command that is not there is one line."""
    gone = str(tmp_path / "gone")
    (line,) = notifiers.send(NotifySettings(command=(gone,)), [FAILED])
    assert line == f"command: cannot start {gone}: No such file or directory"


def test_secret_of_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Promise 11: the words of a command that failed are redacted."""
    monkeypatch.setenv("NTFY_TOKEN", "tk_0123456789")
    tell = program(tmp_path / "tell", "import os, sys; sys.exit('bad ' + os.environ['NTFY_TOKEN'])")
    (line,) = notifiers.send(NotifySettings(command=(tell,)), [FAILED])
    assert line.endswith("failed: bad ***")


HANGS = """#!/bin/sh
trap '' TERM HUP INT
sleep 600 &
echo $$ $! > "$1"
wait
"""
SENDS = """#!/bin/sh
printf 'sent ' >> {}
"""


def script(path: Path, text: str) -> str:
    """Write an executable that starts quickly."""
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_hangs(tmp_path: Path) -> None:
    """One that hangs is ended with its whole process group, and does not hold the others up."""
    pids, good = tmp_path / "pids", tmp_path / "good"
    hangs = script(tmp_path / "hangs", HANGS)
    mail = script(tmp_path / "sendmail", SENDS.format(good))
    settings = NotifySettings(
        command=(hangs, str(pids)), mail=("root",), sendmail=mail, time_limit_s=HANGS_S
    )
    lines = notifiers.send(settings, [FAILED, PARKED])
    assert lines == [
        f"command: {hangs} did not end within 10 s, and was killed",
        "command: no time was left for 1 notices",
    ]
    assert good.read_text() == "sent sent "
    found = [int(pid) for pid in pids.read_text().split()]
    assert len(found) == 2
    assert locks.wait_until(lambda: not any(map(is_alive, found)), 10)


def test_escaped(tmp_path: Path) -> None:
    """A descendant that left the session and holds the output open is not waited for."""
    code = """
        import subprocess, sys
        child = subprocess.Popen(["sleep", "600"], start_new_session=True)
        open(sys.argv[1], "w").write(str(child.pid))
    """
    pid = tmp_path / "pid"
    tell = program(tmp_path / "tell", code)
    assert notifiers.send(NotifySettings(command=(tell, str(pid))), [FAILED]) == []
    left = int(pid.read_text())
    assert is_alive(left)
    os.kill(left, 9)


def test_wanted() -> None:
    """A notifier is told of the events that it is set for alone; a ping of every end."""
    trouble = NotifySettings(command=("x",), ping_url="http://x/")
    found = {name: told for name, _, told in notifiers._notifiers(trouble, [FAILED, COMPLETED])}
    assert found == {"command": [FAILED], "ping": [FAILED, COMPLETED]}
    parked = replace(trouble, on=frozenset({Event.PARKED}))
    found = {name: told for name, _, told in notifiers._notifiers(parked, [FAILED, PARKED])}
    assert found["command"] == [PARKED]


# -- mail --------------------------------------------------------------------------------------

# Takes and refuses what sendmail -t -i does: postfix's exit statuses, and its words.
SENDMAIL = """
    import email, email.policy, sys
    if sorted(sys.argv[1:]) != ["-i", "-t"]:
        sys.exit("sendmail: fatal: usage: sendmail [options]")
    raw = sys.stdin.buffer.read()
    head, _, body = raw.partition(b"\\n\\n")
    for line in head.split(b"\\n"):
        if not (line[:1] in b" \\t" or b":" in line) or not line.isascii() or len(line) > 998:
            print("sendmail: fatal: malformed header", file=sys.stderr)
            sys.exit(65)
    message = email.message_from_bytes(raw, policy=email.policy.default)
    to = message["To"].addresses if message["To"] else ()
    if not to:
        print("sendmail: fatal: No recipient addresses found in message header", file=sys.stderr)
        sys.exit(64)
    if not body.isascii() or any(len(line) > 998 for line in body.split(b"\\n")) or b"\\r" in raw:
        print("sendmail: fatal: body is not for every mailer", file=sys.stderr)
        sys.exit(65)
    with open({path!r}, "ab") as file:
        file.write(raw + b"\\0")
"""


@dataclass
class Mailer:
    program: str
    path: Path

    def mails(self) -> list[Any]:
        raw = self.path.read_bytes().split(b"\0")[:-1] if self.path.exists() else []
        return [email.message_from_bytes(one, policy=email.policy.default) for one in raw]


@pytest.fixture
def mailer(tmp_path: Path) -> Mailer:
    path = tmp_path / "mails"
    code = textwrap.dedent(SENDMAIL).replace("{path!r}", repr(str(path)))
    return Mailer(program(tmp_path / "sendmail", code), path)


def by_mail(mailer: Mailer, **values: Any) -> NotifySettings:
    return NotifySettings(sendmail=mailer.program, **{"mail": ("root",), **values})


def test_mail(mailer: Mailer) -> None:
    """A mail has its recipients, a date, an id, and the whole text, whatever is in it."""
    settings = by_mail(mailer, mail=("root", "ann@example.org"))
    assert notifiers.send(settings, [FAILED]) == []
    (mail,) = mailer.mails()
    assert [address.addr_spec for address in mail["To"].addresses] == ["root", "ann@example.org"]
    assert mail["From"] == "root"
    assert mail["Subject"] == FAILED.subject
    assert mail["Date"].datetime is not None
    assert mail["Message-ID"].endswith("@nas>")
    assert mail["Auto-Submitted"] == "auto-generated"
    assert mail["X-Atomtx-Event"] == "failed"
    assert mail.get_content() == FAILED.text
    assert "a näme" in mail.get_content()


def test_mail_of_a_dot(mailer: Mailer) -> None:
    """A client's line that is a dot, or begins as a header does, ends nothing."""
    hostile = told(outcome="failed", job="x\nBcc: eve@example.org", log=(".", "From x", "To: eve"))
    assert notifiers.send(by_mail(mailer), [hostile]) == []
    (mail,) = mailer.mails()
    assert mail["Bcc"] is None
    assert mail.get_content() == hostile.text


def test_mail_refused(mailer: Mailer) -> None:
    """What sendmail refuses comes back in its own words; the stand-in refuses as it does."""
    (line,) = notifiers.send(by_mail(mailer, mail=(",",)), [FAILED])
    assert line.startswith("mail: ")
    assert "No recipient addresses found" in line
    assert mailer.mails() == []


def test_mail_by_path(mailer: Mailer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a program that is named, sendmail is where it usually is, or on PATH."""
    monkeypatch.setattr(notifiers, "SENDMAIL", (str(tmp_path / "none"),))
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert notifiers.send(NotifySettings(mail=("root",)), [FAILED]) == []
    assert len(mailer.mails()) == 1
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    (line,) = notifiers.send(NotifySettings(mail=("root",)), [FAILED])
    assert line == "mail: no sendmail is installed"
    monkeypatch.setattr(notifiers, "SENDMAIL", (mailer.program,))
    assert notifiers.send(NotifySettings(mail=("root",)), [FAILED]) == []


def test_mail_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mailer gets none of the repository's secrets."""
    monkeypatch.setenv("RESTIC_PASSWORD", "hunter22")
    monkeypatch.setenv("HOME", "/root")
    code = "import os, sys; sys.exit(str(sorted({'RESTIC_PASSWORD', 'HOME'} & set(os.environ))))"
    mail = program(tmp_path / "sendmail", code)
    (line,) = notifiers.send(NotifySettings(mail=("root",), sendmail=mail), [FAILED])
    assert line.endswith("failed: ['HOME']")


# -- pings -------------------------------------------------------------------------------------


@dataclass
class Server:
    url: str
    answers: list[int] = field(default_factory=list)  # one a request; 200 after the last
    requests: list[tuple[str, str, str]] = field(default_factory=list)


@pytest.fixture
def server() -> Iterator[Server]:
    """A real server; 0 as an answer is none, for as long as the test runs."""
    over = threading.Event()
    made = Server("")

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            made.requests.append((self.path, body, self.headers["User-Agent"]))
            status = made.answers.pop(0) if made.answers else 200
            if status == 0:
                over.wait()
                return
            self.send_response(status)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"OK")

        def log_message(self, *_: object) -> None:
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.url = f"http://127.0.0.1:{httpd.server_address[1]}/uuid-0123"
    thread = threading.Thread(target=httpd.serve_forever, args=(0.05,))
    thread.start()
    yield made
    over.set()
    httpd.shutdown()
    thread.join()
    httpd.server_close()


def pinging(url: str, **values: Any) -> NotifySettings:
    return NotifySettings(ping_url=url, **{"time_limit_s": LIMIT_S, **values})


@pytest.mark.parametrize(
    ("notice", "path", "status"),
    [(COMPLETED, "", "/0"), (FAILED, "/fail", "/1"), (PARKED, "/fail", "/4")],
)
def test_ping(server: Server, notice: Notice, path: str, status: str) -> None:
    """Success is the URL, anything else /fail; or the exit status; the text is the body."""
    assert notifiers.send(pinging(server.url), [notice]) == []
    assert notifiers.send(pinging(server.url, ping_exit_status=True), [notice]) == []
    assert [path for path, _, _ in server.requests] == [f"/uuid-0123{path}", f"/uuid-0123{status}"]
    assert server.requests[0][1] == notice.text
    assert server.requests[0][2] == f"atomtx/{atomtx.__version__}"


def test_ping_start(server: Server) -> None:
    """A run's begin is /start, before the query of the URL; without a URL it is nothing."""
    assert notifiers.start(pinging(server.url + "/?create=1"), "begins") == []
    assert server.requests[0][:2] == ("/uuid-0123/start?create=1", "begins")
    assert notifiers.start(NotifySettings(), "begins") == []


def test_ping_of_rolled_back(server: Server) -> None:
    """A run that `recover` rolled back is no success, though `recover` itself exits with 0."""
    undone = told(outcome="rolled-back", found_unfinished=True)
    assert notifiers.send(pinging(server.url), [undone]) == []
    assert notifiers.send(pinging(server.url, ping_exit_status=True), [undone]) == []
    assert [path for path, _, _ in server.requests] == ["/uuid-0123/fail", "/uuid-0123/1"]


def test_ping_file(server: Server, tmp_path: Path) -> None:
    """The URL may be in a file, such as a credential of systemd's."""
    file = tmp_path / "url"
    settings = NotifySettings(ping_url_file=str(file))
    (line,) = notifiers.send(settings, [FAILED])
    assert line == f"ping: cannot read the file of URLs {file}: No such file or directory"
    file.write_text("\n")
    assert notifiers.send(settings, [FAILED]) == [f"ping: {file} is empty"]
    file.write_text(f"{server.url}\n")
    assert notifiers.send(settings, [FAILED]) == []
    assert len(server.requests) == 1


def test_ping_again(server: Server) -> None:
    """Trouble of the server is tried again; a refusal is not."""
    server.answers = [500, 503]
    assert notifiers.send(pinging(server.url), [FAILED]) == []
    assert len(server.requests) == 3
    server.answers = [500, 500, 500]
    assert notifiers.send(pinging(server.url), [FAILED]) == [
        "ping: 127.0.0.1 was not told: it answered 500"
    ]
    assert len(server.requests) == 6
    server.answers = [404]
    assert notifiers.send(pinging(server.url), [FAILED]) == [
        "ping: 127.0.0.1 was not told: it answered 404"
    ]
    assert len(server.requests) == 7


def test_ping_hangs(server: Server) -> None:
    """A server that never answers is given up when the time is over."""
    server.answers = [0, 0, 0]
    (line,) = notifiers.send(pinging(server.url, time_limit_s=2), [FAILED])
    assert line == "ping: 127.0.0.1 was not told within 2 s"


def test_ping_refused() -> None:
    """Where nobody listens that is said, with the host alone: the URL is a secret."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (line,) = notifiers.send(pinging(f"http://127.0.0.1:{port}/uuid-0123"), [FAILED])
    assert line == "ping: 127.0.0.1 was not told: Connection refused"


@pytest.mark.parametrize(
    "url",
    ["file:///etc/uuid-0123", "uuid-0123", "http://[uuid-0123/", "http://127.0.0.1:x/uuid-0123",
     "http://127.0.0.1/uuid-0123 \r\nX: y", "ftp://127.0.0.1/uuid-0123"],
)  # fmt: skip
def test_ping_bad_url(url: str) -> None:
    """A URL that cannot be used is one line without it; no file is opened."""
    (line,) = notifiers.send(pinging(url), [FAILED])
    assert line.startswith("ping: ")
    assert " was not told: " in line
    assert "uuid" not in line


# -- apprise -----------------------------------------------------------------------------------

# The part of apprise that we call: add() tells False for a URL that it does not know.
APPRISE = """
class Apprise:
    def __init__(self):
        self.urls = []
    def __len__(self):
        return len(self.urls)
    def add(self, url):
        known = "://" in url
        self.urls += [url] * known
        return known
    def notify(self, *, title, body):
        if not self.urls:
            return False
        open(self.urls[0].partition("://")[2], "w").write(title + "\\n" + body)
        return not self.urls[0].startswith("down")
"""


@pytest.fixture
def apprise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for the extra."""
    folder = tmp_path / "packages"
    folder.mkdir()
    (folder / "apprise.py").write_text(APPRISE)
    monkeypatch.setenv("PYTHONPATH", f"{os.environ['PYTHONPATH']}:{folder}")
    return tmp_path / "told"


def test_apprise(apprise: Path, tmp_path: Path) -> None:
    """apprise gets subject and text; its URLs may be in a file."""
    assert notifiers.send(NotifySettings(apprise=(f"up://{apprise}",)), [FAILED]) == []
    assert apprise.read_text() == f"{FAILED.subject}\n{FAILED.text}"
    apprise.unlink()
    file = tmp_path / "urls"
    file.write_text(f"\nup://{apprise}\n")
    assert notifiers.send(NotifySettings(apprise_file=str(file)), [FAILED]) == []
    assert apprise.exists()


def test_apprise_fails(apprise: Path) -> None:
    """What it could not deliver, and a URL that it does not know, is said without the URL."""
    down = NotifySettings(apprise=(f"down://{apprise}",))
    assert notifiers.send(down, [FAILED]) == [
        "apprise: apprise was not told: apprise could not deliver it"
    ]
    odd = NotifySettings(apprise=(f"up://{apprise}", "secret"))
    assert notifiers.send(odd, [FAILED]) == [
        "apprise: apprise was not told: apprise does not know its URL number 2"
    ]


def test_apprise_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the extra it is said how to get it."""
    folder = tmp_path / "packages"
    folder.mkdir()
    (folder / "apprise.py").write_text("raise ImportError")
    monkeypatch.setenv("PYTHONPATH", f"{folder}:{os.environ['PYTHONPATH']}")
    (line,) = notifiers.send(NotifySettings(apprise=("json://x",)), [FAILED])
    assert line.endswith("apprise is not installed: pip install 'atomtx[apprise]'")


def test_real_apprise(server: Server) -> None:
    """The real one delivers; it is among the packages that the tests need."""
    url = server.url.replace("http", "json", 1)
    assert notifiers.send(NotifySettings(apprise=(url,)), [FAILED]) == []
    (request,) = server.requests
    assert json.loads(request[1])["title"] == FAILED.subject


# -- all ---------------------------------------------------------------------------------------


def test_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even a bug in a notifier is one line, and not the run's result."""

    def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(notifiers, "_command", broken)
    assert notifiers.send(NotifySettings(command=("x",)), [FAILED]) == [
        "command: a bug: ZeroDivisionError"
    ]


def test_nobody() -> None:
    """Where nobody is to be told, nothing is done."""
    assert notifiers.send(NotifySettings(), [FAILED]) == []
    assert notifiers.send(NotifySettings(command=("/gone",)), [COMPLETED]) == []


def test_ping_of_file(tmp_path: Path) -> None:
    """urllib opens files as well; a URL of one is refused, not taken for a server that answered."""
    file = tmp_path / "there"
    file.touch()
    assert notifiers.send(pinging(file.as_uri()), [COMPLETED]) == [
        "ping: the server was not told: its URL is none of http or https"
    ]


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("endless", "has more than"),
        ("pipe", "is not a regular file"),
        ("writable", "can be written by others"),
    ],
)
def test_file_of_urls_refused(tmp_path: Path, what: str, words: str) -> None:
    """A file of URLs that is no such file is one line, read with a bound: it must not hang."""
    file = tmp_path / what
    if what == "endless":
        with open(file, "wb") as made:
            made.truncate(1 << 40)
    elif what == "pipe":
        os.mkfifo(file)
    else:
        file.write_text("https://hc.example/x\n")
        file.chmod(0o666)
    (line,) = notifiers.send(NotifySettings(ping_url_file=str(file)), [COMPLETED])
    assert line.startswith("ping: the file of URLs")
    assert words in line
