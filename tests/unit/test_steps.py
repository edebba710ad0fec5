"""What may be a step of a job, and what became of each."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from atomtx import plan, stepping, steps
from atomtx.errors import ExitStatus, UserError
from atomtx.records import Run, Step, status_of
from atomtx.states import PLANNED, Verb
from tests.runs import a_plan, a_run


def run_of(*ended: tuple[str | None, str | None]) -> Run:
    """Return a run of as many steps, each with its outcome and detail."""
    words = [("snap", "--job", "home"), ("backup", "a b"), ("prune",)][: len(ended)]
    intents = stepping.intents(words)
    made = tuple(
        Step(n, 0, intent, None, *each)
        for n, (intent, each) in enumerate(zip(intents, ended, strict=True))
    )
    return a_run(stepping.make_plan("home", "/x.toml"), state=PLANNED, steps=made)


def child(outcome: str | None, verb: Verb = Verb.BACKUP, cleanup: str | None = None) -> Run:
    run = a_run(a_plan(verb=verb))
    return replace(run, state="destroyed", outcome=outcome, cleanup=cleanup)


GOOD, BAD, LEFT = ("done", "exit status 0"), ("failed", "exit status 1; run x"), (None, None)


@pytest.mark.parametrize(
    ("text", "words"),
    [("snap", ["snap"]), ("backup 'a b' -- --tag x", ["backup", "a b", "--", "--tag", "x"])],
)
def test_parse(text: str, words: list[str]) -> None:
    assert list(steps.parse(text)) == words


@pytest.mark.parametrize("text", ["", "run home", "recover", "'snap", "atomtx snap", "--help"])
def test_no_step(text: str) -> None:
    """The step is named, in one line."""
    with pytest.raises(UserError, match=r"^the step ") as raised:
        steps.parse(text)
    assert "\n" not in raised.value.message


@pytest.mark.parametrize(
    ("words", "made", "status"),
    [
        ("snap", [], None),
        ("snap", [child("rolled-back"), child("completed")], 0),
        ("backup", [child("failed")], None),
        ("backup", [child("partial")], 3),
        ("backup", [child("completed", cleanup="parked")], 4),
        ("backup", [child(None)], None),
        ("prune", [child("partial", Verb.PRUNE)], None),
        ("prune", [child("completed", Verb.PRUNE)], 0),
        ("unsnap", [child("rolled-back", Verb.PRUNE), child("partial", Verb.PRUNE)], None),
        ("unsnap", [child("completed", Verb.PRUNE)], 0),
        ("clone", [child("partial", Verb.CLONE)], 3),
        ("backup --from-snapshots", [child("completed")], None),
        ("backup -- --from-snapshots", [child("completed")], 0),
        ("sure scan /x", [], None),
    ],
)
def test_ended_by(words: str, made: list[Run], status: int | None) -> None:
    """Whether a step is done is said by its runs; 0 is not None."""
    found = steps.ended_by(steps.parse(words), made)
    assert (found is None) == (status is None)
    assert found == status


@pytest.mark.parametrize("count", [0, 1, 3, 9])
def test_detail(count: int) -> None:
    """What is written is read back."""
    made = [child("completed") for _ in range(count)]
    detail = steps.detail(ExitStatus.PARKED, made)
    assert Step(1, 0, stepping.intents([("snap",)])[0], None, "done", detail).status == 4
    assert len(detail) < 120
    assert not made or made[-1].id in detail


def test_to_do() -> None:
    """Nothing is begun after a step that failed."""
    assert [step.id for step in steps.to_do(run_of(GOOD, LEFT, LEFT))] == [1, 2]
    assert steps.to_do(run_of(BAD, LEFT)) == ()


@pytest.mark.parametrize(
    ("ended", "outcome", "reason"),
    [
        ([GOOD, GOOD], "completed", None),
        (
            [GOOD, BAD, LEFT],
            "failed",
            "step 2 (backup 'a b'): exit status 1; run x; not run: prune",
        ),
        (
            [("failed", "exit status 6; run x"), LEFT],
            "failed",
            "step 1 (snap --job home): its run waits: `atomtx recover` goes on with that "
            "(exit status 6; run x); not run: backup 'a b'",
        ),
        (
            [("done", "exit status 3"), GOOD],
            "partial",
            "step 1 (snap --job home): it did a part of its work (exit status 3)",
        ),
        (
            [GOOD, ("done", "exit status 4; run x"), GOOD],
            "completed",
            "step 2 (backup 'a b'): it is done, and something of it is still in use: "
            "`atomtx recover` (exit status 4; run x)",
        ),
    ],
)
def test_verdict(ended: list[tuple[str, str]], outcome: str, reason: str | None) -> None:
    assert steps.verdict(run_of(*ended)) == (outcome, reason)


@pytest.mark.parametrize(
    ("statuses", "status"), [((0, 0), 0), ((0, 7), 7), ((4, 0), 4), ((7, 3), 3)]
)
def test_status(statuses: tuple[int, ...], status: int) -> None:
    """The exit status of a run of steps is the worst of theirs."""
    run = run_of(*(("done", f"exit status {each}") for each in statuses))
    outcome, _ = steps.verdict(run)
    assert status_of(replace(run, state="ran", outcome=outcome.value)) == status


@pytest.mark.parametrize(
    ("words", "is_one"),
    [
        ("backup --job home", True),
        ("backup home --from-snapshots", True),
        ("backup other", False),
        ("snap --job home", False),
        ("backup tank/a -- home", False),
    ],
)
def test_pinged(words: str, is_one: bool) -> None:
    """The check that a ping belongs to is that of the job's backups."""
    assert steps.is_backup_of(steps.parse(words), "home") is is_one


def test_names() -> None:
    """The job, and where it stands, are found again from what is journaled."""
    run = run_of(LEFT)
    again = replace(run, plan=plan.from_json(plan.to_json(run.plan)))
    assert (stepping.job_of(again), stepping.config_of(again)) == ("home", "/x.toml")


def test_older_journal() -> None:
    """The plan of a run that was begun before there were steps is of none."""
    data = json.loads(plan.to_json(a_plan()))
    assert data.pop("parent") == ""
    assert plan.from_json(json.dumps(data)).parent == ""
