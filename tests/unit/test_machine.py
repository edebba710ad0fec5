"""The folder in which the tests keep their virtual machine: what removes it, and what does not."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.vm import machine


def test_clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that the tests have made goes, another one stays, whatever $ATOMTX_CACHE names."""
    ours, another = tmp_path / "a" / "ours", tmp_path / "another"
    monkeypatch.setenv("ATOMTX_CACHE", str(ours))
    machine.clean()
    (machine.cache_folder() / "machine").mkdir()
    machine.clean()
    assert not ours.exists()
    (another / "of somebody").mkdir(parents=True)
    monkeypatch.setenv("ATOMTX_CACHE", str(another))
    assert machine.cache_folder() == another
    with pytest.raises(machine.MachineError, match="remove it by hand"):
        machine.clean()
    assert (another / "of somebody").is_dir()
