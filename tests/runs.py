"""Plans and runs for the tests of the engine: as the planner and the journal make them."""

from __future__ import annotations

import dataclasses
from typing import Any

from atomtx import plan, states
from atomtx.names import Dataset, RunId
from atomtx.plan import ClientPlan, Plan, PlannedVolume
from atomtx.records import Run, Volume

# Of this process alone: tests that run beside these must not be taken for the run's own processes.
RUN, OTHER = RunId.new(), RunId.new()
POOL_GUIDS = {"tank": "11", "zroot": "22"}
CLIENT = ClientPlan("command", ("true",), (), "/", "", None, (), ())


def a_plan(*names: str, run: RunId = RUN, **values: Any) -> Plan:
    """Return the plan of a run over datasets, each mounted at its own name below `/`."""
    names = names or ("tank/a", "tank/a/b")
    made = Plan(
        run=run,
        job="job",
        label=", ".join(names),
        volumes=tuple(_planned(Dataset(name), run) for name in names),
        targets=plan.targets(f"/{name}" for name in names),
        layout="namespace",
        root="",
        live_paths=(),
        excludes=(),
        notes=(),
        client=CLIENT,
    )
    return dataclasses.replace(made, **values)


def no_hooks(folder: Any) -> Any:
    """Return what carries out the hooks of a run that has none."""
    from atomtx.hooks import Hooks
    from atomtx.interrupts import Interrupts

    return Hooks(folder, Interrupts(), step=lambda _: None, warn=lambda _: None)


def _planned(dataset: Dataset, run: RunId) -> PlannedVolume:
    guid = f"guid of {dataset}"
    snapshot = str(dataset.snapshot(run))
    pool = dataset.pool
    return PlannedVolume("zfs", pool, POOL_GUIDS[pool], dataset.name, guid, f"/{dataset}", snapshot)


def a_run(the_plan: Plan | None = None, *, proven: bool = True, **values: Any) -> Run:
    """Return a run as the journal has it; *proven*: its snapshots' identities are journaled."""
    the_plan = the_plan or a_plan()
    made = Run(
        id=the_plan.run,
        job=the_plan.job,
        label=the_plan.label,
        state=states.SNAPSHOTTED,
        rev=1,
        outcome=None,
        cleanup=None,
        reason=None,
        attempts=0,
        plan=the_plan,
        moment_at=None,
        started_at=1_785_000_000_000_000,
        boot_id="boot",
        pid=42,
        volumes=tuple(_volume(n, v, proven) for n, v in enumerate(the_plan.volumes)),
        steps=(),
    )
    return dataclasses.replace(made, **values)


def _volume(n: int, planned: PlannedVolume, proven: bool) -> Volume:
    return Volume(
        n=n,
        kind=planned.kind,
        pool=planned.pool,
        pool_guid=planned.pool_guid,
        name=planned.name,
        mountpoint=planned.mountpoint,
        snapshot=planned.snapshot,
        guid=f"{100 + n}" if proven else None,
        createtxg="7" if proven else None,
    )
