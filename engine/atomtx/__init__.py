"""
Backups of a moment.

atomtx snapshots the file systems that a job names, shows the frozen files to a backup client at
the paths where they always live, and takes everything away again.  Each change that it makes to
the machine is written in a journal before it is made, so that after a crash `atomtx recover`
finishes the interrupted backup of the same moment, or undoes it.

The modules, in reading order:

    errors.py       the exception tree, the exit statuses
    names.py        Dataset, Snapshot, RunId: parse, check, print                      pure
    states.py       the states of a run, the table of transitions, the machine         pure
    intents.py      one frozen dataclass an effect, and what undoes it                 pure
    plan.py         what is there, what was asked for -> the plan                      pure
    inventory.py    datasets, pools and mounts, and where each can be read             pure
    subvolumes.py   which btrfs subvolumes a request means, and what is left out       pure
    selection.py    which volumes a request means, and what is left out                pure
    records.py      the journal's rows as plain values                                 pure
    recovery.py     journal and probes -> resume, roll forward, roll back, wait ...    pure
    redact.py       take secrets out of what is kept or shown                          pure
    journalfile.py  the journal's file: its numbers, and whether we may touch it
    provenance.py   whether a journal may act here: its machine's, and the newest seen
    schema.py       the tables; bringing an older journal up to date
    aside.py        setting a journal aside, renamed
    copying.py      copies of the journal, each of one instant
    database.py     its connections, its upgrade, its errors as ours
    journal.py      the only module that writes to the database
    history.py      reading the journal for people, with the standard library alone
    audit.py        what is wrong with a journal, if anything
    statedir.py     the state directory, and the folder of each run in it
    locks.py        the kernel locks F, R and C, and who holds them
    process.py      the only module that starts programs
    btrfsio.py      btrfs as the kernel shows it: ioctls, a mount that nobody else sees
    interrupts.py   SIGINT and SIGTERM as a request to compensate
    volumes/        kind.py, zfs.py, btrfs.py ...: find, snapshot, hold, probe, destroy
    mounts/         mountinfo.py, namespace.py, tree.py ...: mount, probe, unmount
    clients/        restic.py, kopia.py, command.py ...: the backup programs
    task.py         what a front end asks of a runner, and what that leaves
    output.py       the client's output: lines, redacted, capped
    supervisor.py   the client under the runner's eyes: read, stopped, ended
    runner.py       holds the namespace and the client; outlives a killed front end
    errand.py       the front end's end of a runner
    preparing.py    ask the machine and the client, and make the plan; changes nothing
    probing.py      what the machine says about a run
    cleaning.py     take everything of a run away again
    executor.py     journal the intent, make the effect, journal the outcome; and backwards
    settling.py     interrupted runs: probe, decide, act
    adoption.py     objects with our marks that are in no journal
    cli/            one command, one file
"""

__version__ = "0.1.0"
