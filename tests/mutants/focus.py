"""
Which tests are asked about which mutant: those that can see it, the fastest first.

A mutant counts as not found when these do not find it, whatever another test might say.
"""

from __future__ import annotations

from pathlib import Path

_UNIT = "tests/unit/test_"
_RECOVERY = (f"{_UNIT}recovery.py",)
_LOCKS = (f"{_UNIT}locks.py", f"{_UNIT}probing.py")
_RUNNER = f"{_UNIT}runner.py"
_EXECUTOR = f"{_UNIT}executor.py"
_HOOKS = f"{_UNIT}hooks.py"
_SNAPPING = f"{_UNIT}snapping.py"
_CATCHUP = f"{_UNIT}catchup.py"
_FULL_DISK = f"{_UNIT}full_disk.py"
_FREEBSD = "tests/freebsd/test_sweep.py"

_PROCESS = (
    "(test_runner and not test_lines and not round_trip and not test_log and not test_span"
    " and not overlong)"
)
_STOP = "stop or grace or limit or chatty"
_SHUTDOWN = "shutdown or told or over_its_limit or undone_when or interrupted or not_kept"
# By module and function, the tests to ask, as pytest's -k has them.
_FOCUS = {
    "supervisor": {
        "__init__": f"{_PROCESS} or while_it_is_read or seldom",
        "run": "limit or stop or commands or go or progress or daemon or secrets",
        "_judged": _STOP,
        "_run_one": (
            "locks or missing or commands or daemon or go or failure or secrets or before"
            " or is_marked"
        ),
        "_watch": (
            "fanotify or go or last_line or chatty or two_commands or daemon or stop or progress"
        ),
        "_hear_out": "last_words or last_line or chatty or filter or daemon",
        "_turn": f"{_STOP} or progress or last_line",
        "_feeder": "last_line or chatty or secrets or commands",
        "_take": "progress or last_line or secrets or commands",
        "_tell_progress": "progress",
        "_hear": f"{_STOP} or second_signal",
        "_look": "while_it_is_read or seldom",
        "_on_signal": _STOP,
        "_stop": _STOP,
        "_limit": _STOP,
        "_ask_to_end": _STOP,
        "_escalate": _STOP,
        "_end_descendants": "daemon or orphan or commands or descendant",
        "_signal_descendants": f"{_STOP} or daemon or orphan or another_process",
        "redacted": "secrets or test_bug or test_go or failure",
        "_reaped_all": "daemon or orphan or commands or go or descendant",
    },
    "runner": {
        "_serve": (
            f"{_PROCESS} or taken_away or nothing_read or while_it_is_read or test_bug or be_read"
        ),
        "_assemble": f"{_PROCESS} or used_up",
        "_made": f"{_PROCESS} or test_points",
        "_why": "refuses or cannot_be_watched",
        "_reserve_end": "reserve or test_go or room or no_room_for_the_end",
        "_leave_end": "without_room or told or test_go",
        "is_written": "without_room or told or test_go",
        "_unread": "reads_nothing or nothing_read or before_it_read or test_go",
    },
    "executor": {
        "__init__": (
            "course or inside or no_room or told or waiting or at_go or killed_runner"
            " or busy or handed_on or cannot_look or new_moment"
        ),
        "advance": "course or no_room",
        "_advance": f"course or kept_waiting or retries or busy or killed_runner or {_SHUTDOWN}",
        "_course": "course",
        "_try": (
            "course or interrupted or no_room or overtaken or ours or taken or dead or cannot_be"
            " or used_up"
        ),
        "_unless_signalled": _SHUTDOWN,
        "_leave": _SHUTDOWN,
        "_failed_unstopped": _SHUTDOWN,
        "_waiting": "retries",
        "_left": "cannot_be_read or cannot_look",
        "_is_kept": _SHUTDOWN,
        "give_up": "rolled_back or killed_always or runner_that or no_room or interrupted",
        "resume": "retries or killed or resumed_by or waiting",
        "_failure": "retries or shutdown or killed",
        "_prepared": "course",
        "_intend_hooks": "course",
        "take_over": "killed",
        "undo_hooks": "course",
        "record_end": "end_is_known or no_room_at_all or told",
        "_dismiss": "course or runner_that or interrupted",
        "_take": "course or pools or moment or ours or killed or effects or empty",
        "_check_pools": "ours or pools",
        "_record_moment": "course or effects or moment or clock",
        "_tell_skew": "course or pools",
        "_take_all": "course or pools or ours or effects",
        "_take_pool": "course or ours or effects",
        "_hold_kept": "course",
        "_try_to_hold": "course",
        "_hold": "course or effects",
        "_keep": "course",
        "_keep_all": "course",
        "_kept": "course",
        "_record_kept": "course",
        "_as_taken": "course",
        "_hold_and_mount": "course or effects or tree or pools or on_the_way or empty or limit",
        "_intend_mounts": "course or effects or killed_runner or on_the_way or retries",
        "_mount_again": "on_the_way",
        "_start": "course or interrupted_at_go or killed",
        "_await_end": (
            "course or failed or partial or retries or waiting or too_old"
            f" or killed_runner or no_room or progress or always or {_SHUTDOWN}"
        ),
        "_end": "course or told or failed or known",
        "_told_to_runner": _SHUTDOWN,
        "_after_lost_runner": "killed_runner or always",
        "_again": "retries",
        "_is_kept_waiting": "retries or waiting",
        "mend": "retries or killed_runner or course or known or resumed",
        "_mended": "retries or killed_runner",
        "_record_end": "course or failed or partial or keep or known or no_room",
        "_record_or_make_room": "course or no_room or told or failed",
        "_make_room": "no_room",
        "_keep_end": "no_room or told",
    },
    "moment": {
        "mount_intent": "course or tree",
        "task_of": "course or environment or tmp or limit or test_tree or pools or retries",
        "_freezes_tmp": "course or tmp",
        "_needed": "needed_elsewhere",
        "moment_of": "course or environment or moment or test_tree or parent",
        "_newer_parent": "course or parent",
        "check_empty": "course or empty",
        "check_taken": "course or ours",
        "skew": "course or pools",
        "_proven": "course",
        "kept": "keep or partial",
        "_emptied": "course or empty",
        "judged": "course or empty",
        "_emptied_words": "empty",
    },
}
# What of the executor other files test: asked after its own.
_ELSEWHERE = {
    "__init__": (_HOOKS,),
    "advance": (_HOOKS,),
    "_advance": (_HOOKS, _SNAPPING),
    "_course": (_SNAPPING, _CATCHUP),
    "_try": (_HOOKS, _FULL_DISK),
    "_leave": (_HOOKS,),
    "_waiting": (_HOOKS,),
    "_left": (_HOOKS,),
    "give_up": (_HOOKS, _FULL_DISK),
    "resume": (_HOOKS, _CATCHUP),
    "_failure": (_FULL_DISK,),
    "_prepared": (_HOOKS,),
    "_intend_hooks": (_HOOKS,),
    "take_over": (_HOOKS,),
    "undo_hooks": (_HOOKS,),
    "_take": (_HOOKS, _SNAPPING),
    "_check_pools": (_SNAPPING,),
    "_record_moment": (_HOOKS, _SNAPPING, _CATCHUP),
    "_tell_skew": (_CATCHUP,),
    "_take_all": (_HOOKS,),
    "_hold_kept": (_CATCHUP, _HOOKS),
    "_try_to_hold": (_CATCHUP,),
    "_hold": (_CATCHUP,),
    "_keep": (_SNAPPING, _HOOKS),
    "_keep_all": (_SNAPPING,),
    "_kept": (_SNAPPING,),
    "_record_kept": (_SNAPPING, _HOOKS),
    "_as_taken": (_SNAPPING,),
    "_hold_and_mount": (_HOOKS, _CATCHUP),
    "_intend_mounts": (_HOOKS,),
    "_await_end": (_FULL_DISK,),
    "_record_end": (_HOOKS, _FULL_DISK),
    "_record_or_make_room": (_FULL_DISK, _CATCHUP),
    "_make_room": (_FULL_DISK,),
    "_keep_end": (_FULL_DISK,),
}
MODULES = ("recovery", "locks", "supervisor", "runner", "executor", "moment")
# Their tests start no program of ours anew: mutants can be tried in forks.
WARM = {
    "recovery": _RECOVERY,
    "executor": (_EXECUTOR, _HOOKS, _SNAPPING, _CATCHUP, _FULL_DISK),
    "moment": (_EXECUTOR,),
}


def tests_of(module: str, function: str) -> tuple[str, ...]:
    """Return pytest's arguments for a mutant of a function."""
    if module == "recovery":
        return _RECOVERY
    if module == "locks":
        return _LOCKS
    focus = _FOCUS[module].get(function)
    if module == "executor" and focus and (files := _ELSEWHERE.get(function)):
        whole = " or ".join(Path(file).stem for file in files)
        return (_EXECUTOR, *files, "-k", f"({focus} or {whole}) and not anywhere")
    if module in ("executor", "moment"):
        return (_EXECUTOR, "-k", focus) if focus else (_EXECUTOR,)
    on_freebsd = (_FREEBSD,) if function == "_made" else ()
    return (_RUNNER, _EXECUTOR, *on_freebsd, "-k", f"{focus or _PROCESS} or environment")
