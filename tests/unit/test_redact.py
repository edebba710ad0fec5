"""A secret is known by its name or its form, and shown nowhere (promise 11)."""

from __future__ import annotations

import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atomtx.errors import UserError
from atomtx.redact import Redactor, check_arguments, journaled, secret_names


@pytest.mark.parametrize(
    "name",
    [
        "RESTIC_PASSWORD",
        "RESTIC_PASSWORD2",
        "RESTIC_PASSWORD_COMMAND",
        "RESTIC_REST_USERNAME",
        "AWS_ACCESS_KEY_ID",
        "AWS_SESSION_TOKEN",
        "AZURE_ACCOUNT_SAS",
        "B2_ACCOUNT_ID",
        "OS_APPLICATION_CREDENTIAL_SECRET",
        "ST_KEY",
        "RCLONE_CONFIG_PASS",
        "RCLONE_CONFIG_REMOTE_ACCOUNT",
        "BORG_PASSCOMMAND",
        "BORG_RSH",
        "KOPIA_SERVER_CONTROL_USER",
        "RCLONE_HEADER",
        "RCLONE_HEADER_UPLOAD",
        "RCLONE_HTTP_HEADERS",
        "RCLONE_WEBDAV_HEADERS",
        "my_token",
    ],
)
def test_secret_name(name: str) -> None:
    """A variable that a client documents as a secret, or that is named like one, is secret."""
    assert secret_names({name: "a value"}) == {name}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("RESTIC_PASSWORD_FILE", "/root/pw"),
        ("RESTIC_KEY_HINT", "0a1b"),
        ("AWS_SHARED_CREDENTIALS_FILE", "/root/aws"),
        ("GOOGLE_APPLICATION_CREDENTIALS", "/root/gs.json"),
        ("AZURE_FEDERATED_TOKEN_FILE", "/run/token"),
        ("BORG_KEY_FILE", "/root/key"),
        ("KOPIA_USE_KEYRING", "true"),
        ("RCLONE_CONFIG", "/root/rclone.conf"),
        ("RCLONE_CONFIG_REMOTE_TYPE", "sftp"),
        ("RESTIC_REPOSITORY", "sftp:me@host:/srv"),
        ("RESTIC_REPOSITORY", "rest:https://host:8000/a@b/"),
        ("SSH_AUTH_SOCK", "/run/agent"),
        ("RCLONE_LOG_FORMAT", "date,time"),
        ("OS_AUTH_URL", "https://host/authorization"),
    ],
)
def test_harmless_name(name: str, value: str) -> None:
    """A pointer to a secret, or a switch, is none: a resume needs its value."""
    assert not secret_names({name: value})


@pytest.mark.parametrize(
    "url",
    ["rest:https://me:sesame@host/", "s3:key:secret@https://host/bucket", "http://:p@proxy:3128"],
)
def test_url_password(url: str) -> None:
    """A repository is a secret only where its URL carries a password."""
    assert secret_names({"RESTIC_REPOSITORY": url}) == {"RESTIC_REPOSITORY"}


@pytest.mark.parametrize(
    "value",
    [
        "Authorization: Bearer sesame",
        "X-A,1,authorization,Basic sesame",
        "-H 'Bearer sesame'",
        "https://me:open@host/ Authorization: Bearer sesame",
        "Authorization: Token sesame",
        'Authorization: "sesame"',
    ],
)
def test_authorization(value: str) -> None:
    """A header that lets in is a secret under any name; what it lets in by is hidden alone, too."""
    env = {"RCLONE_MADE_UP": value}
    assert secret_names(env) == {"RCLONE_MADE_UP"}
    assert journaled(env) == ((), ("RCLONE_MADE_UP",))
    assert "sesame" not in Redactor(env).redact(f"sent {value}; got 403 for sesame")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("RESTIC_REPOSITORY", "rclone::s3,access_key_id=AK,secret_access_key=sesame:bucket"),
        ("RESTIC_REPOSITORY", "rclone::webdav,url='https://x',pass=sesame:"),
        ("RESTIC_REPOSITORY", "rclone::b2,account=a,key='sesame':bucket"),
        ("MADE_UP", "https;AccountName=x;AccountKey=sesame"),
        ("MADE_UP", "serve restic --stdio --webdav-pass=sesame"),
        ("MADE_UP", "sshpass -p sesame ssh"),
    ],
)
def test_assigned(name: str, value: str) -> None:
    """What assigns a secret within a value is one; of it that alone is hidden."""
    env = {name: value}
    assert secret_names(env) == {name}
    assert "sesame" not in Redactor(env).redact(f"cannot open {value}: 403 for sesame")
    assert Redactor(env).redact("account AK of x") == "account AK of x"
    with pytest.raises(UserError, match="carries a secret") as caught:
        check_arguments(["--repo", value])
    assert "sesame" not in str(caught.value)


@pytest.mark.parametrize(
    "word",
    [
        "--option=s3.access_key_file=/etc/key",
        "--password-file=/etc/pw",
        "--key=2",
        "PGPASSWORD=$(cat /etc/pw) pg_dump",
        'PGPASSWORD="$PW" pg_dump',
        "ssh -o PasswordAuthentication=no",
        "sshpass -f /etc/pw ssh",
        "sshpass -p $PW ssh",
    ],
)
def test_assigned_elsewhere(word: str) -> None:
    """A pointer to a secret is none, nor what a shell puts in."""
    check_arguments(["sh", "-c", word])
    assert secret_names({"MADE_UP": word}) == frozenset()


@pytest.mark.parametrize(
    "secret", ['corr"ect&horse<x', "back\\slash", "caf\udce9 au lait", "käse &"]
)
def test_spellings(secret: str) -> None:
    """A client prints it in JSON, as Go does too, or in bytes that are no UTF-8."""
    redact = Redactor({"RESTIC_PASSWORD": secret}).redact
    go = {"&": "\\u0026", "<": "\\u003c", ">": "\\u003e"}
    for text in (json.dumps(secret), json.dumps(secret, ensure_ascii=False)):
        spelt = text[1:-1]
        of_go = "".join(go.get(each, each) for each in spelt)
        assert redact(f'{{"m":"{spelt}","n":"{of_go}"}}') == '{"m":"***","n":"***"}'
    assert redact(os.fsencode(secret).decode("utf-8", "replace")) == "***"


@pytest.mark.parametrize("name", ["RCLONE_HEADER", "RCLONE_HTTP_HEADERS"])
@pytest.mark.parametrize(
    "value",
    [
        "X-Auth-Token: open,X-Api-Key: sesame",
        "X-Auth-Token: open, X-Api-Key: Key sesame",
        'X-A,1,"X-Api-Key",sesame',
        "X-Api-Key:sesame",
        "https://me:open@host/,X-Api-Key: sesame",
    ],
)
def test_header(name: str, value: str) -> None:
    """Of headers each value is hidden alone: a client prints one a line."""
    text = Redactor({name: value}).redact(f"sent {value}; < X-Api-Key: sesame; 403 for sesame")
    assert "sesame" not in text


def test_name_of_a_header() -> None:
    """A header's name is no secret."""
    assert Redactor({"RCLONE_HEADER": "X-Api-Key: sesame"}).redact("no X-Api-Key") == "no X-Api-Key"


@pytest.mark.parametrize(
    ("client", "names"),
    [
        ("restic", ["AWS_SECRET_ACCESS_KEY", "RESTIC_PASSWORD"]),
        ("kopia", ["AWS_SECRET_ACCESS_KEY", "KOPIA_PASSWORD"]),
        ("borg", ["AWS_SECRET_ACCESS_KEY", "BORGSTORE_RSH", "BORG_PASSCOMMAND"]),
        ("xfsdump", ["AWS_SECRET_ACCESS_KEY"]),
    ],
)
def test_journaled_of_a_client(client: str, names: list[str]) -> None:
    """A resume waits for no secret of another client; what a command reads nobody knows."""
    env = {"RESTIC_PASSWORD": "1", "KOPIA_PASSWORD": "2", "BORG_PASSCOMMAND": "3"}
    env |= {"BORGSTORE_RSH": "4", "AWS_SECRET_ACCESS_KEY": "5"}
    assert journaled(env, client) == ((), tuple(names))
    assert journaled(env, "command") == ((), tuple(sorted(env)))
    assert journaled(env, client, chosen=["KOPIA_PASSWORD"])[1] == tuple(
        sorted({*names, "KOPIA_PASSWORD"})
    )


def test_journaled() -> None:
    """The journal gets the values of harmless variables of clients, and names of their secrets."""
    env = {
        "RESTIC_REPOSITORY": "/srv/repo",
        "RESTIC_PASSWORD": "sesame",
        "HOME": "/root",
        "https_proxy": "http://proxy:3128",
        "EDITOR": "vi",
        "GITHUB_TOKEN": "other",
    }
    harmless, secrets = journaled(env)
    assert harmless == (
        ("HOME", "/root"),
        ("RESTIC_REPOSITORY", "/srv/repo"),
        ("https_proxy", "http://proxy:3128"),
    )
    assert secrets == ("RESTIC_PASSWORD",)


def test_redact_longest_first() -> None:
    """A secret that contains another one is replaced as a whole."""
    redactor = Redactor({"RESTIC_PASSWORD": "sesame", "AWS_SECRET_ACCESS_KEY": "sesame-open"})
    assert redactor.redact("key sesame-open, password sesame!") == "key ***, password ***!"


def test_redact_url() -> None:
    """Of a URL only the password is hidden, whoever printed it, encoded or not."""
    redactor = Redactor({"RESTIC_REPOSITORY": "rest:https://me:p%40ssword@host/"})
    assert redactor.redact("at https://me:p%40ssword@host/") == "at https://me:***@host/"
    assert redactor.redact("tried p@ssword") == "tried ***"
    assert redactor.redact("ftp://you:other@there") == "ftp://you:***@there"


def test_short_secret() -> None:
    """A very short value is not hunted for: the log would be unreadable."""
    assert Redactor({"RESTIC_PASSWORD": "a"}).redact("a banana") == "a banana"


@given(st.text(min_size=4).filter(str.strip), st.text(), st.text())
def test_never_shown(secret: str, before: str, after: str) -> None:
    """Whatever a secret looks like and wherever it stands, it is not in the redacted text."""
    redacted = Redactor({"KOPIA_PASSWORD": secret}).redact(f"{before}{secret}{after}")
    assert secret not in redacted or secret in "***"


@pytest.mark.parametrize(
    "argv",
    [
        ("restic", "-r", "rest:https://me:sesame@host/"),
        ("restic", "--repo=s3:key:sesame@https://host/bucket"),
        ("env", "RESTIC_PASSWORD=sesame", "restic"),
        ("kopia", "--password=sesame"),
        ("/usr/bin/kopia", "-p", "sesame"),
        ("kopia", "-psesame"),
        ("kopia", "--secret-access-key", "sesame"),
        ("kopia", "--key=sesame"),
        ("rclone", "--sftp-pass=sesame"),
        ("own", "--user-password-hash=sesame"),
        ("restic", "-o", "rclone.args=serve --stdio --header 'Authorization: Bearer sesame'"),
        ("sh", "--header=Authorization: Bearer sesame"),
        ("curl", "-H", "Authorization: Bearer sesame"),
        ("curl", "-H", "authorization:sesame"),
        ("sh", "-c", """curl -H 'Authorization: Token sesame' https://host"""),
        ("sh", "-c", """curl -H 'A: $B' -H "Authorization: Token $T" -H 'x: bearer sesame'"""),
    ],
)
def test_secret_argument(argv: tuple[str, ...]) -> None:
    """An argument with a secret is refused, and the message does not repeat it."""
    with pytest.raises(UserError, match="carries a secret") as caught:
        check_arguments(argv)
    assert "sesame" not in str(caught.value)


@pytest.mark.parametrize(
    "argv",
    [
        ("restic", "-p", "/root/pw", "--password-file=/root/pw", "--key-hint=0a1b"),
        ("restic", "--password-command=pass show restic"),
        ("env", "RESTIC_REPOSITORY=/srv", "restic"),
        ("restic", "-r", "sftp:me@host:/srv", "--exclude=*.key"),
        ("scp", "--key=/root/id"),
        ("curl", "-H", "Title: done", "https://host/authorization"),
        ("sh", "-c", """curl -H "Authorization: Bearer $TOKEN" https://host"""),
        ("sh", "-c", """curl -H "Authorization: ${SCHEME} $(cat /root/token)" https://host"""),
    ],
)
def test_harmless_argument(argv: tuple[str, ...]) -> None:
    """A name of a file, a command or a repository may be an argument."""
    check_arguments(argv)


def test_secret_of_several_lines() -> None:
    """A key of several lines is hidden line by line: so is the log written."""
    redactor = Redactor({"RESTIC_PASSWORD": "first line\nsecond line\n"})
    assert redactor.redact("it was: second line") == "it was: ***"
