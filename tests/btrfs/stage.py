"""Whole runs on real btrfs, on files: the engine's own processes, and no virtual machine."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from atomtx import btrfsio, directories, selection
from atomtx.mounts import mountinfo
from atomtx.names import RunId
from atomtx.plan import ClientPlan, Plan, Request, assemble
from atomtx.preparing import filesystems
from atomtx.volumes import plain
from tests.scene import Scene

SIZE_BYTES = 300 * 2**20


def call(*argv: str | os.PathLike[str]) -> str:
    """Run a program; an error shows what it said."""
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 0, (argv, done.stdout, done.stderr)
    return done.stdout


class Disk:
    """A btrfs on a file, with its top level mounted where no run looks."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.image = home / "image"
        self.top = home / "top level"
        home.mkdir()
        # Shared, as systemd has all mounts: the namespaces of runs that other tests make at the
        # same time would pin private ones.
        call("mount", "--bind", home, home)
        call("mount", "--make-shared", home)
        self.top.mkdir()
        with open(self.image, "wb") as file:
            file.truncate(SIZE_BYTES)
        call("mkfs.btrfs", "--quiet", self.image)
        self._mounted: list[Path] = []
        self.mount(self.top, device=self.image, options="loop")
        self.device = call("findmnt", "-no", "SOURCE", self.top).strip()
        self.uuid = call("findmnt", "-no", "UUID", self.top).strip()

    def mount(self, where: Path, *, options: str, device: str | Path = "") -> Path:
        where.mkdir(parents=True, exist_ok=True)
        call("mount", "-o", options, device or self.device, where)
        self._mounted.append(where)
        return where

    def make(self, name: str) -> Path:
        """Make a subvolume below the top level."""
        call("btrfs", "-q", "subvolume", "create", self.top / name)
        return self.top / name

    def unmount_all(self) -> list[Path]:
        """Unmount everything, lazily where it is in use; return what was mounted."""
        mounted, self._mounted = self._mounted, []
        for where in reversed(mounted):
            subprocess.run(["umount", "-R", where], capture_output=True, check=False)
            subprocess.run(["umount", "-l", where], capture_output=True, check=False)
        return mounted

    def close(self) -> None:
        self.unmount_all()
        call("umount", "-R", "-l", self.home)

    def left(self) -> list[str]:
        """Return what lies at the top level under a name of ours."""
        return sorted(name for name in os.listdir(self.top) if name.startswith(".atomtx"))

    def snapshots(self) -> list[btrfsio.Row]:
        with btrfsio.top_level(self.uuid) as top:
            return [row for row in btrfsio.subvolumes(top) if "/.atomtx-" in row.path]


class Stage(Scene):
    """A scene with plans over real subvolumes."""

    def __init__(self, home: Path, disk: Disk) -> None:
        home.mkdir()
        super().__init__(home)
        self.disk = disk

    def plan_of(
        self,
        *paths: Path,
        recursive: bool = False,
        exclude: Iterable[Path] = (),
        live: Iterable[Path] = (),
        **values: Any,
    ) -> Plan:
        """Return the plan that `atomtx backup` would make, for a client that copies."""
        client, root = values.pop("client", "command"), values.pop("root", "")
        request = Request(
            tuple(map(str, paths)),
            recursive=recursive,
            exclude=tuple(map(str, exclude)),
            layout="tree" if root else "namespace",
            root=root,
            live=tuple(map(str, live)),
        )
        plain.reach(request.live)
        table = mountinfo.read()
        read_live = directories.select(request, table, plain.identify, is_file=plain.is_file)
        on_btrfs = filesystems(request, table)
        found = selection.select(request, (), (), table, on_btrfs, live=read_live)
        repository = "repo" if client == "played" else None
        command = ClientPlan(client, (self.client,), (), "/", "1.2", repository, (), ())
        return assemble(
            request,
            found,
            pools=(),
            run=values.pop("run", None) or RunId.new(),
            client=command,
            **values,
        )

    def saved(self, path: Path, copy: int = -1) -> Path:
        """Return what a whole copy of the client, by default the newest, has of *path*."""
        found = sorted((self.home / "copies").glob("done.*"), key=lambda p: p.stat().st_mtime_ns)
        return Path(f"{found[copy]}{path}")

    def left(self) -> list[str]:
        return [*super().left(), *self.disk.left(), *(row.path for row in self.disk.snapshots())]


def tree(root: Path) -> dict[str, bytes | None]:
    """Return each file's bytes below a directory, None for a directory."""
    return {
        str(path.relative_to(root)): path.read_bytes() if path.is_file() else None
        for path in sorted(root.rglob("*"))
    }
