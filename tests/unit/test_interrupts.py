"""Signals of a command that is a step of another one."""

from __future__ import annotations

import signal

import pytest

from atomtx.errors import Interrupted
from atomtx.interrupts import Interrupts


def test_both_are_told() -> None:
    """A signal during a step is known to the step, and to whoever runs the steps."""
    outer, inner = Interrupts(), Interrupts()
    with outer.lent():
        outer.install()
        with outer.lent():
            inner.install()
            signal.raise_signal(signal.SIGTERM)
        assert (outer.noted, inner.noted) == (signal.SIGTERM, signal.SIGTERM)
        with pytest.raises(Interrupted):
            outer.stop()


def test_step_is_over() -> None:
    """After the step the signals are told to the outer one alone."""
    outer, inner = Interrupts(), Interrupts()
    with outer.lent():
        outer.install()
        with outer.lent():
            inner.install()
        signal.raise_signal(signal.SIGINT)
    assert (outer.noted, inner.noted) == (signal.SIGINT, None)


def test_came_before() -> None:
    """A step that begins after a signal knows of it."""
    outer, inner = Interrupts(), Interrupts()
    with outer.lent():
        outer.install()
        signal.raise_signal(signal.SIGINT)
        with outer.lent():
            assert inner.install().noted == signal.SIGINT


def test_at_once() -> None:
    """A step that looks at no signal is ended by the one that runs it."""
    outer = Interrupts()
    with outer.lent():
        outer.install()
        with pytest.raises(Interrupted), outer.at_once():
            signal.raise_signal(signal.SIGTERM)


def test_at_once_of_a_step() -> None:
    """A step that has taken the signals over is not ended in the midst of an effect of its own."""
    outer, inner = Interrupts(), Interrupts()
    with outer.lent():
        outer.install()
        with outer.at_once(), outer.lent():
            inner.install()
            signal.raise_signal(signal.SIGTERM)
            with pytest.raises(Interrupted):
                inner.check()
        with pytest.raises(Interrupted):
            outer.check()
