"""The configuration: one definition; everything that is wrong is told at once, with its line."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atomtx import cli, clients, config, config_kinds, config_schema, config_text, plan, redact
from atomtx.cli import backup, jobs
from atomtx.config import Config, ConfigError
from atomtx.config_kinds import Kind, keys, near, toml
from atomtx.config_schema import Credential, Job
from atomtx.errors import UserError

DOCUMENT = Path(__file__).parents[2] / "docs" / "configuration.md"
KEYS = tuple(keys(Job))
LETTERS = "abcdefghijklmnopqrstuvwxyz-_"
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root has others to fear")


def parse(text: str) -> Config:
    return config.parse(text, "/x.toml")


def wrong(text: str) -> list[str]:
    """Return what is said of a text that is refused, without the file's name."""
    with pytest.raises(ConfigError) as caught:
        parse(text)
    assert all(problem.path == "/x.toml" for problem in caught.value.problems)
    return [f"{problem.line}: {problem.what}" for problem in caught.value.problems]


def wrong_in_job(lines: str) -> list[str]:
    """Return what is said of the lines of a job that is right but for them."""
    said = wrong(f'[jobs.home]\nvolumes = ["tank/home"]\n{lines}\n')
    assert all("job home: " in line for line in said)
    return [line.replace("job home: ", "") for line in said]


# -- what is read ------------------------------------------------------------------------------

WHOLE = """
[defaults]
client = "restic"
retries = 3
environment = { RESTIC_REPOSITORY = "/srv/restic", RESTIC_PASSWORD_FILE = "/p", TZ = "UTC" }

[jobs.home]
volumes = ["tank/home", "/srv/www"]
recursive = true
exclude = ["tank/home/tmp"]
arguments = ["--tag", "nightly"]
layout = "tree"
root = "/restic"
keep-for = "6h"
time-limit = "1d"
grace = "90"
nice = 10
io-class = "best-effort:7"
environment.TZ = "Europe/Lisbon"
credentials.RESTIC_PASSWORD = { credential = "home" }
credentials.MY_KEY.file = "/etc/key"

[jobs."mail.2"]
all = true
client = "command"
command = ["my-backup", "--to", "a b"]
retries = 0
"""


def test_jobs() -> None:
    """A job has what it says, else what the defaults say; variables are merged one by one."""
    found = parse(WHOLE)
    home, mail = found.job("home"), found.job("mail.2")
    assert (home.volumes, home.exclude) == (("tank/home", "/srv/www"), ("tank/home/tmp",))
    assert (home.client, home.retries, home.nice, home.io_class) == (
        "restic",
        3,
        10,
        "best-effort:7",
    )
    assert (home.keep_for, home.time_limit, home.grace) == (21_600, 86_400, 90)
    assert home.environment == {"RESTIC_REPOSITORY": "/srv/restic", "TZ": "Europe/Lisbon"}
    assert home.sources == (("RESTIC_PASSWORD", "credential:home"), ("MY_KEY", "file:/etc/key"))
    assert (mail.client, mail.retries, mail.working_directory) == ("command", 0, "/")
    assert mail.command == ("my-backup", "--to", "a b")
    assert mail.environment["RESTIC_PASSWORD_FILE"] == "/p"


def test_origin() -> None:
    """Where each value comes from is known: the job's line, the defaults' line, or neither."""
    found = parse(WHOLE)
    assert found.origin("home", "keep-for") == "line 14"
    assert found.origin("home", "client") == "defaults, line 3"
    assert found.origin("home", "all") == "default"
    assert found.origin("home", "environment") == "line 19; defaults, line 5"
    assert found.origin("mail.2", "retries") == "line 27"


def test_empty() -> None:
    """A file without jobs is right, and has none."""
    assert parse("").jobs == {}
    with pytest.raises(UserError, match=r"has no job \"home\" \(its jobs: none\)"):
        parse("").job("home")
    with pytest.raises(UserError, match=r'did you mean "home"'):
        parse(WHOLE).job("hone")


# -- what is wrong -----------------------------------------------------------------------------


def test_all_at_once() -> None:
    """All that is wrong is told in one go, in the order of the lines."""
    assert wrong(
        'client = "restic"\n[defaults]\nretires = 3\nvolumes = ["a"]\n[jobs.home]\n'
        'volume = ["tank/home"]\nnice = 30\n[jobs.home.environment]\nRESTIC_PASSWORD = "x"\n'
        '[jobs."a/b"]\nvolumes = "tank"\nlayout = "tree"\n[job.x]\n'
    ) == [
        '1: unknown key "client"',
        '3: defaults: unknown key "retires"; did you mean "retries"?',
        "4: defaults: volumes belongs to a job",
        '6: job home: unknown key "volume"; did you mean "volumes"?',
        "7: job home: nice must be a whole number from 0 to 19, not 30",
        "9: job home: environment.RESTIC_PASSWORD looks like a secret; name a file with it under "
        'credentials: RESTIC_PASSWORD = { file = "/etc/atomtx/..." }',
        '10: job a/b: "a/b" must be a job\'s name: letters, digits and . _ -, at most 60',
        '11: job a/b: volumes must be a list such as ["a", "b"], not "tank"',
        '12: job a/b: the layout "tree" needs a root below /, such as root = "/restic"',
        '13: unknown key "job"; did you mean "jobs"?',
    ]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("recursive = 1", "recursive must be true or false, not 1"),
        ("retries = true", "retries must be a whole number from 0 to 1000, not true"),
        ('retries = "1"', 'not "1"'),
        ("keep-for = 6", 'keep-for must be a time in quotes such as "90s", "6h", not 6'),
        ('keep-for = "6 hours"', '"6 hours" is not a time'),
        ('keep-history = "10001y"', '"10001y" is longer than 10000y'),
        ('client = "rustic"', '"command", not "rustic"; did you mean "restic"?'),
        ('io-class = "idle:7"', 'io-class must be "idle", "best-effort" or'),
        ("client = 1", "client must be a text in quotes, not 1"),
        ('root = "restic"', 'root must be an absolute path, not "restic"'),
        ('working-directory = ""', "must be an absolute path"),
        ('command = "my-backup --all"', "command must be a list such as"),
        ('exclude = ["a", ""]', 'none empty; it holds ""'),
        ("exclude = [1]", "it holds 1"),
        ('environment = "A=pw"', 'environment must be a table such as { A = "b" }'),
        ("environment.A = 1", "environment.A must be a text in quotes"),
        ('environment."A-B" = "c"', '"A-B" cannot be a variable'),
        ('credentials."A-B".file = "/c"', '"A-B" must be the name of a variable'),
        ('credentials = "pw"', "credentials must be a table of tables"),
        (
            'credentials.A = "pw"',
            'credentials.A must name where the value is: { file = "/etc/atomtx/..." } or '
            '{ credential = "..." }',
        ),
        ("credentials.A = {}", "credentials.A needs either file or credential"),
        ('credentials.A = { file = "/a", credential = "a" }', "needs either file or credential"),
        ('credentials.A = { fiel = "/a" }', 'credentials.A: unknown key "fiel"; did you mean'),
        (
            'credentials.A = { file = "pw" }',
            "credentials.A.file must be the absolute path of a file that holds the value",
        ),
        ('credentials.A = { file = ["pw"] }', "credentials.A.file must be a text in quotes"),
        ('credentials.A = { credential = "pw/b" }', "must be the name of a systemd credential"),
        (
            'ping-url-file = "https://ping.example/pw"',
            "ping-url-file must be the absolute path of a file that holds the URL",
        ),
        (
            'apprise-file = "tgram://pw/id"',
            "apprise-file must be the absolute path of a file that holds URLs of apprise",
        ),
        ('apprise-file = ["tgram://pw/id"]', "apprise-file must be a text in quotes"),
        ('arguments = "-r rest:https://me:pw@host/"', 'not "-r rest:https://me:***@host/"'),
        ('environment.R = "rest:https://me:pw@host/"', "environment.R looks like a secret"),
        ('command = ["restic", "--password=x"]', "command: the argument --password carries"),
        ('arguments = ["RESTIC_PASSWORD=x"]', "arguments: the argument RESTIC_PASSWORD=..."),
        (
            'environment.BORG_PASSCOMMAND = "cat /pw"',
            'under credentials: BORG_PASSPHRASE = { file = "/etc/atomtx/..." }',
        ),
        ('quiesce = ["-r"]', 'quiesce must begin with a program, not with the option "-r"'),
        ("all = true", "all and volumes exclude each other"),
        ('root = "/restic"', 'root is of no use without layout = "tree"'),
        ('layout = "tree"', "needs a root"),
        ('layout = "tree"\nroot = "//"', "needs a root"),
        ('client = "command"', "needs a command"),
        (
            'notify-mail-from = "Backup nas"',
            "'Backup nas' is no address, such as",
        ),
    ],
)
def test_wrong(line: str, words: str) -> None:
    """A value that is wrong is one error, on its line, and no secret is repeated."""
    (said,) = wrong_in_job(line)
    assert said.startswith("3: ")
    assert words in said
    assert "pw" not in said


def test_two_ways() -> None:
    """A variable that is set twice, or in two ways, is refused: the client would take either."""
    both = 'environment.A = "b"\ncredentials.A.file = "/a"'
    assert wrong_in_job(both) == ["4: A is in both environment and credentials"]
    ways = 'environment.RESTIC_PASSWORD_FILE = "/p"\ncredentials.RESTIC_PASSWORD.file = "/a"'
    assert wrong_in_job(ways) == [
        "4: RESTIC_PASSWORD_FILE and RESTIC_PASSWORD say the same thing in two ways"
    ]


def test_no_volumes() -> None:
    """A job of nothing is refused on the line of its header; a misspelt key is told alone."""
    assert wrong("\n[jobs.x]\n") == ["2: job x: no volumes are named; give volumes, or all = true"]
    assert len(wrong("[jobs.x]\nvolume = ['a']\n")) == 1


def test_wrong_default() -> None:
    """What is wrong in the defaults for every job is told once a job, on the defaults' line."""
    text = '[defaults]\nroot = "/x"\n[jobs.a]\nvolumes = ["t/a"]\n'
    assert wrong(text) == ['2: defaults: root is of no use without layout = "tree"']


@pytest.mark.parametrize("text", ["jobs = 1", "[jobs]\nx = 1", "defaults = []", "[[jobs]]"])
def test_wrong_shape(text: str) -> None:
    """A value where a table must be is an error, not a traceback."""
    (said,) = wrong(text)
    assert "must be a table" in said


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a = 1\nb = \n", 2),
        ("a = 1\n\na = 2\n", 3),
        ('[jobs.a]\nx = "', 2),
        ("[jobs.a]\nx = [1,\n2,\n", 3),
        ("[a\n", 1),
    ],
)
def test_syntax(text: str, line: int) -> None:
    """What is no TOML is one error, on its line."""
    (said,) = wrong(text)
    assert said.startswith(f"{line}: not TOML: ")
    assert "(at " not in said


@pytest.mark.parametrize(
    ("value", "what"),
    [
        ("9" * 5000, "a number is too long"),
        ("[" * 5000 + "]" * 5000, "it is nested too deep"),
        ("{a=" * 400 + "1" + "}" * 400, "it is nested too deep"),
    ],
)
def test_beyond_python(value: str, what: str) -> None:
    """What Python cannot hold is an error as any other: it must not keep from recovering."""
    assert wrong(f"[jobs.a]\nnice = {value}\n") == [f"1: not TOML: {what}"]


def _misspelt(word: str) -> set[str]:
    cuts = range(len(word) + 1)
    return (
        {word[:n] + word[n + 1 :] for n in cuts}
        | {word[:n] + letter + word[n:] for n in cuts for letter in LETTERS}
        | {word[:n] + letter + word[n + 1 :] for n in cuts for letter in LETTERS}
        | {word[:n] + word[n : n + 2][::-1] + word[n + 2 :] for n in cuts}
    ) - {*KEYS, ""}


@pytest.mark.parametrize("key", KEYS)
def test_every_misspelling(key: str) -> None:
    """Every key with one letter missing, added, wrong or exchanged finds the right one."""
    bad = {word for word in _misspelt(key) if near(word.replace("_", "-"), KEYS) != key}
    assert bad == set()


# -- what is made of the definition ------------------------------------------------------------

_NAMES = st.from_regex(r"[A-Z_][A-Z0-9_]{0,8}", fullmatch=True).filter(
    lambda name: not redact.secret_names({name: ""}) and not name.endswith(("_FILE", "_COMMAND"))
)
_WORDS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1)
_PLAIN = _WORDS.filter(lambda text: not redact.secret_names({"A": text}))
_CREDENTIALS = st.builds(Credential, file=_WORDS.map(lambda text: f"/{text}")) | st.builds(
    Credential, credential=st.from_regex(r"[a-zA-Z0-9._-]+", fullmatch=True)
)


def _is_right(job: Job) -> bool:
    return not list(config_schema.problems(job))


JOBS = st.builds(
    Job,
    volumes=st.lists(_WORDS, min_size=1).map(tuple),
    recursive=st.booleans(),
    exclude=st.lists(_WORDS).map(tuple),
    client=st.sampled_from(["", "restic", "kopia"]),
    command=st.lists(_WORDS).map(tuple),
    arguments=st.lists(_WORDS).map(tuple),
    environment=st.dictionaries(_NAMES, _PLAIN),
    credentials=st.dictionaries(_NAMES, _CREDENTIALS),
    working_directory=_WORDS.map(lambda text: f"/{text}"),
    keep_snapshots=st.booleans(),
    retries=st.integers(0, 1000),
    keep_for=st.integers(0, 10**8),
    grace=st.integers(0, 10**8),
    nice=st.integers(0, 19),
    io_class=st.sampled_from(["", "idle", "best-effort", "realtime:0"]),
).filter(_is_right)


@given(JOBS, st.from_regex(config_schema.JOB_NAME, fullmatch=True))
def test_round_trip(job: Job, name: str) -> None:
    """What is written is read as it was, and what `show` prints is read as it was."""
    table = toml(config_kinds.Table(Job).written(job))
    found = parse(f"jobs = {{ {config_kinds.toml_key(name)} = {table} }}")
    assert found.jobs == {name: job}
    assert parse("\n".join(config_text.job_lines(found, name))).jobs == {name: job}


def test_show() -> None:
    """`show` prints each key with its value and origin; of a credential the place alone."""
    lines = list(config_text.job_lines(parse(WHOLE), "mail.2"))
    assert lines[0] == '[jobs."mail.2"]'
    assert any(line.split() == ["retries", "=", "0", "#", "line", "27"] for line in lines)
    assert any(line.startswith("# root: none ") for line in lines)
    assert len(lines) == len(KEYS) + 1
    facts = config_text.job_facts(parse(WHOLE), "home")
    assert facts["keep-for"] == {"value": "6h", "origin": "line 14"}
    assert facts["credentials"]["value"]["MY_KEY"] == {"file": "/etc/key"}
    assert tuple(facts) == KEYS


@pytest.mark.parametrize("uncomment", [False, True])
def test_new_file(uncomment: bool) -> None:
    """The file that `init` writes is right, and each of its examples is, by itself."""
    text = config_text.new_file(["home", "a.b"])
    found = parse(text)
    assert list(found.jobs) == ["home", "a.b"]
    examples = [line[1:] for line in text.splitlines() if line.startswith("#") and " = " in line]
    shown = {line.split(" = ")[0] for line in examples}
    assert shown >= {*KEYS} - {*config_schema.NOT_IN_DEFAULTS}
    for example in examples if uncomment else ():
        key = example.split(" = ")[0]
        if key in KEYS and key not in ("root", "all", "thaw"):
            assert key in tomllib.loads(example)
            text = f"[jobs.x]\nvolumes = ['a']\n{example}\n"
            read = parse(text).jobs["x"]
            assert example.startswith(config_text._pair(key, keys(Job)[key], read).split(" = ")[0])


def test_schema() -> None:
    """The JSON schema knows the same keys, and refuses others, as the reader does."""
    schema = config_schema.json_schema()
    job = schema["properties"]["jobs"]["additionalProperties"]
    assert schema["$schema"].endswith("2020-12/schema")
    assert tuple(job["properties"]) == KEYS
    assert set(KEYS) - set(schema["properties"]["defaults"]["properties"]) == {
        "volumes",
        "all",
        "read-live",
    }
    for table in (schema, job, schema["properties"]["defaults"]):
        assert table["additionalProperties"] is False
    assert job["properties"]["client"]["enum"] == list(clients.KNOWN)
    assert job["properties"]["grace"]["default"] == "1m"
    assert "default" not in job["properties"]["client"]
    json.dumps(schema)


def test_document() -> None:
    """The table of docs/configuration.md is that of the definition."""
    text = DOCUMENT.read_text()
    assert config_schema.reference() in text
    sentence = text.partition("may have any key of a job but ")[2].partition(". ")[0]
    assert tuple(re.findall("`(.*?)`", sentence)) == config_schema.NOT_IN_DEFAULTS


@pytest.mark.parametrize("text", re.findall(r"```toml\n(.*?)```", DOCUMENT.read_text(), re.DOTALL))
def test_examples(text: str) -> None:
    """The examples of the document are right."""
    assert parse(text).jobs


def test_defaults_hold() -> None:
    """The defaults of the definition are those of an unnamed job, and of the plan."""
    assert Job().grace == plan.GRACE_S
    for name, each in keys(Job).items():
        kind: Kind = each.metadata["kind"]
        value = config_kinds.default(each)
        if not each.metadata["unset"]:
            assert kind.read(kind.written(value), ("x", name), lambda *_: None) == value
    assert Job(**{each.name: config_kinds.default(each) for each in keys(Job).values()}) == Job()


def test_snapshots_that_stay() -> None:
    """What `snap` and `prune` would refuse is refused when the configuration is read."""
    found = [
        what
        for job in (
            Job(volumes=("tank",), snap_pattern="daily-%Y"),
            Job(volumes=("tank",), snap_keep=("--keep-daily",)),
            Job(volumes=("tank",), snap_keep=("--keep-daily", "many")),
            Job(volumes=("tank",), snap_keep=("--keep-daily", "7", "--keep-within=2m")),
        )
        for _, what in config_schema.problems(job)
    ]
    assert len(found) == 3
    assert found[0].startswith("snap-pattern: the names of 'daily-%Y' do not tell the minute")
    assert found[1] == "snap-keep: --keep-daily has no value"
    assert found[2].startswith("snap-keep: keep-daily: 'many' is not")


@pytest.mark.parametrize(
    ("client", "rules", "words"),
    [
        (
            "restic",
            ["--keep-daily 7"],
            '"--keep-daily 7" is one word; write it as two words: "--keep-daily", "7"',
        ),
        ("restic", ["keep-daily", "7"], "keep-daily is no rule of retention for restic"),
        ("restic", ["--keep-daily", "x"], "the rule --keep-daily: 'x' is no number"),
        ("borg", ["--keep-daily=1d"], "the rule --keep-daily: '1d' is no number"),
        ("kopia", ["--keep-latest=unlimited"], "the rule --keep-latest: 'unlimited' is no number"),
        ("", ["--keep-daily", "7"], "a command of your own cannot be told what to keep"),
        ("restic", ["--keep-daily=unlimited", "--keep-within", "1y5m", "--keep-tag", "a"], None),
        ("borg", ["--keep-within=10d", "--keep-13weekly", "4"], None),
        ("kopia", ["--keep-latest", "inherit", "--keep-annual=default"], None),
        ("xfsdump", ["--keep-chains", "3"], None),
    ],
)
def test_retention(client: str, rules: list[str], words: str | None) -> None:
    """Rules that each backup would refuse are refused when the configuration is read."""
    job = Job(volumes=("tank",), client=client, command=("x",), retention=tuple(rules))
    found = [(at, what) for at, what in config_schema.problems(job)]
    assert found == ([(("retention",), f"retention: {words}")] if words else [])


def test_retention_of_nobody() -> None:
    """Whose rules they are is not known where the environment decides on the client."""
    assert _is_right(Job(volumes=("tank",), retention=("--keep-chains", "3")))


def test_options() -> None:
    """Each key of a job is an option of `backup`, but those that make no sense as one."""
    options = {option.name for option in backup.backup.params}
    fields = {each.name for each in dataclasses.fields(Job)}
    elsewhere = {"volumes", "arguments", "environment", "credentials", "working_directory"}
    elsewhere |= {"write_paths", "snap_pattern"}  # for `install`, `snap`
    elsewhere |= {"snap_keep", "keep_until_saved"}  # for `prune`
    elsewhere |= {"clone_targets", "clone_rate", "steps"}  # for `clone`, `run`
    told = {name for name in fields if name.startswith(("notify", "ping", "apprise"))}
    assert fields - options == elsewhere | told
    assert options - fields == {
        *("names", "job_name", "no_job", "config_path", "wait", "dry_run", "quiet", "as_json"),
        *("from_snapshots", "limit"),
        "options",  # those of the client
        *("from_snapshots", "limit"),
    }


def test_option_names() -> None:
    """What is wrong with an option is told by the name that the option has."""
    of_job = {each.name: name for name, each in keys(Job).items()}
    context = click.Context(cli.cli)
    commands = [cli.cli.get_command(context, name) for name in cli.COMMANDS]
    commands += [
        each
        for group in commands
        if isinstance(group, click.Group)
        for each in group.commands.values()
    ]
    found = {
        (option.name, jobs.option(of_job[option.name]) in option.opts)
        for command in commands
        if command
        for option in command.params
        if isinstance(option, click.Option) and option.name in of_job
    }
    assert {name for name, _ in found} >= {"snap_pattern", "clone_targets", "clone_rate", "nice"}
    assert all(is_named for _, is_named in found), found


@pytest.mark.parametrize("name", ["time-limit", "keep-history"])
def test_zero(name: str) -> None:
    """What 0 means is no time of nothing: the key and the option say it in the same words."""
    (option,) = (o for o in backup.backup.params if f"--{name}" in o.opts)
    _, _, in_key = keys(Job)[name].metadata["what"].partition(" 0: ")
    _, _, in_help = (getattr(option, "help", "") or "").partition(" 0: ")
    assert in_key
    assert in_help.startswith(in_key.rstrip("."))


# -- which job is meant ------------------------------------------------------------------------

NONE: Mapping[str, Any] = {}


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The configuration that $ATOMTX_CONFIG names, and a machine with the pools tank and home2."""
    path = tmp_path / "atomtx.toml"
    path.write_text(WHOLE + '[jobs.tank]\nvolumes = ["tank"]\n')
    path.chmod(0o600)
    monkeypatch.setenv("ATOMTX_CONFIG", str(path))
    monkeypatch.setattr(jobs, "_pools", lambda: ["tank", "home2"])
    return path


def asked(*names: str, extra: tuple[str, ...] = (), **options: Any) -> jobs.Asked:
    return jobs.asked(names, extra, options)


def test_named(written: Path) -> None:
    """A name without a slash that the configuration has is a job; its options are laid over."""
    found = asked("home", extra=("--tag", "x"), retries=7, recursive=False, exclude=("a",))
    assert found.name == "home"
    assert (found.job.retries, found.job.recursive, found.job.exclude) == (7, False, ("a",))
    assert found.job.arguments == ("--tag", "nightly", "--tag", "x")
    assert found.job.volumes == ("tank/home", "/srv/www")
    assert found.sources["job home"]["MY_KEY"] == "file:/etc/key"
    assert asked(job_name="home").job == parse(written.read_text()).job("home")
    assert asked("home", layout="namespace").job.root == ""
    assert asked("home", command="a 'b c'", time_limit="2h").job.command == ("a", "b c")


def test_unnamed(written: Path) -> None:
    """Anything else is a dataset, with the program's own defaults and not the configuration's."""
    for names in (("tank/home",), ("/home",), ("home2",), ("tank/home", "home2"), ("data/lv",)):
        found = asked(*names)
        assert (found.name, found.job.volumes, found.job.retries) == ("", names, 1)
        assert found.sources == {}
    assert asked("tank", no_job=True).job.volumes == ("tank",)
    written.write_text("bad")
    assert asked("tank/home").name == asked("home", no_job=True).name == ""
    with pytest.raises(ConfigError):
        asked("tank")


@pytest.mark.parametrize(
    ("names", "options", "words"),
    [
        (("tank",), NONE, r"and a pool \(--job tank is the job, --no-job tank the pool"),
        (("home", "tank/a"), NONE, "home is a job of .*, and 2 names were given"),
        (("home", "mail.2"), NONE, "one job a call"),
        (("hone",), NONE, 'hone is neither a job of .* nor a pool .*did you mean "home"'),
        (
            ("photos",),
            NONE,
            "photos is neither a job of .* nor a pool .*its jobs: home, mail.2, tank",
        ),
        (("tank/a", "home2", "photos"), NONE, "photos is neither a job"),
        (("photos@monday",), NONE, "names a snapshot"),
        (
            (),
            NONE,
            r"nothing was named \(name a job \(home, mail.2, tank\) or volumes, or use --all",
        ),
        ((), {"recursive": True, "exclude": ("tank/a",)}, "nothing was named"),
        (("tank/a",), {"job_name": "home"}, "--job home and tank/a exclude each other"),
        ((), {"job_name": "home", "no_job": True}, "exclude each other"),
        ((), {"job_name": "nothing"}, 'has no job "nothing"'),
        (("tank/a",), {"config_path": "/x"}, "--config is of no use without a job"),
        (("home",), {"config_path": "/nowhere"}, "there is no configuration /nowhere"),
        (("home",), {"keep_for": "6 hours"}, '--keep-for must be a time such as .*"6 hours"'),
        (("home",), {"io_class": "fast"}, "--io-class must be"),
        (("home",), {"snap_pattern": ""}, "^--pattern is empty"),
        (("home",), {"clone_targets": ("a", "")}, "^--to is empty"),
        (("home",), {"exclude": ("",)}, "^--exclude is empty"),
        (("home",), {"root": ""}, "^--root is empty"),
        (("home",), {"clone_rate": "0"}, '^--rate must be a size such as "10M", not "0"'),
        (
            ("home",),
            {"command": "'"},
            r"^--command \"'\": No closing quotation \(quote it as for a shell",
        ),
    ],
)
def test_not_meant(
    written: Path, names: tuple[str, ...], options: dict[str, Any], words: str
) -> None:
    """A name that may mean two things, or means none, is refused, with how to say either."""
    with pytest.raises(UserError, match=words):
        asked(*names, **options)


def test_nothing_named(written: Path) -> None:
    """All datasets, or what is read live, are something; a wrong configuration is no matter."""
    assert asked(all=True).job.all
    assert asked(read_live=("/boot",)).job.read_live == ("/boot",)
    written.write_text("bad")
    with pytest.raises(UserError, match=r"nothing was named \(name volumes, or use --all"):
        asked()


@pytest.mark.parametrize("is_there", [True, False])
def test_exported_pool(
    written: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *, is_there: bool
) -> None:
    """A name that nobody knows may be that of a pool to import, where there is ZFS."""
    monkeypatch.setenv("PATH", str(tmp_path))
    if is_there:
        (tmp_path / "zpool").touch(mode=0o755)
    with pytest.raises(UserError) as caught:
        asked("usb")
    assert ("`zpool import usb`" in (caught.value.hint or "")) is is_there


def test_known(written: Path) -> None:
    """Jobs named besides are of the configuration that was read; else it is read for them."""
    assert jobs.known((), "/nowhere", asked("tank/a")) == ()
    assert jobs.known(("tank",), None, asked("tank/a")) == ("tank",)
    found = [asked("home"), asked(job_name="home"), asked("home2")]
    written.unlink()
    for each in found:
        assert jobs.known(("tank", "home"), None, each) == ("tank", "home")
        with pytest.raises(UserError, match='has no job "nothing"'):
            jobs.known(("nothing",), None, each)
    with pytest.raises(UserError, match="there is no configuration"):
        jobs.known(("tank",), None, asked("tank/a"))


def test_ambiguity_is_no_matter_for_job(written: Path) -> None:
    """`--job` forces the job where there is a pool of that name."""
    assert asked(job_name="tank").job.volumes == ("tank",)


def test_no_configuration(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without a configuration every name is a dataset's; one that was named must be there."""
    monkeypatch.delenv("ATOMTX_CONFIG", raising=False)
    monkeypatch.setattr(config, "DEFAULT", str(tmp_path / "absent"))
    assert asked("tank").name == ""
    with pytest.raises(UserError, match=r"nothing was named \(name volumes, or use --all"):
        asked()
    monkeypatch.setenv("ATOMTX_CONFIG", str(tmp_path / "absent"))
    with pytest.raises(UserError, match="there is no configuration"):
        asked("tank")


# -- files -------------------------------------------------------------------------------------


@as_root
def test_credential_files(tmp_path: Path) -> None:
    """The files of credentials are looked at: absent, or readable by others, is an error."""
    good, open_ = tmp_path / "good", tmp_path / "open"
    for path, mode in ((good, 0o600), (open_, 0o644)):
        path.write_text("x\n")
        path.chmod(mode)
    head = "[jobs.a]\nvolumes = ['t/a']\n"
    text = "".join(
        f"credentials.{name}.file = '{path}'\n"
        for name, path in (("A", good), ("B", open_), ("C", tmp_path / "absent"))
    )
    found = config.credential_problems(parse(head + text + "credentials.D.credential='d'\n"), {})
    assert [problem.line for problem in found] == [4, 5]
    assert "can be read by others" in found[0].what
    assert "No such file" in found[1].what
    env = {"CREDENTIALS_DIRECTORY": str(tmp_path)}
    found = config.credential_problems(parse(head + "credentials.D.credential='d'\n"), env)
    assert "is not in" in found[0].what
