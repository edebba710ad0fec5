"""
Backups of a moment.

atomtx snapshots the file systems that a job names, shows the frozen files to a backup client at
the paths where they always live, and takes everything away again.  Each change that it makes to
the machine is written in a journal before it is made, so that after a crash `atomtx recover`
finishes the interrupted backup of the same moment, or undoes it.

The modules, in reading order:

    errors.py       the exception tree, the exit statuses
    names.py        Dataset, Snapshot, RunId: parse, check, print                      pure
    words.py        values in words: sizes, time spans, ages; and spans read           pure
    signals.py      signals as a program expects to find them
    convention.py   the names of kept snapshots: a prefix, and when they were taken    pure
    states.py       the states of a run, the table of transitions, the machine         pure
    intents.py      one frozen dataclass an effect, and what undoes it                 pure
    plan.py         what is there, what was asked for -> the plan                      pure
    inventory.py    datasets, pools and mounts, and where each can be read             pure
    subvolumes.py   which btrfs subvolumes a request means, and what is left out       pure
    directories.py  which directories are read live, and what is left out              pure
    logical.py      which logical volumes of LVM a request means                       pure
    selection.py    which volumes a request means, and what is left out                pure
    records.py      the journal's rows as plain values                                 pure
    recovery.py     journal and probes -> resume, roll forward, roll back, wait ...    pure
    steps.py        what may be a step of a job, and what became of each               pure
    retention.py    which kept snapshots of one volume stay, by restic's rules         pure
    replica.py      what is to be sent of a dataset to its copy                        pure
    tokens.py       what a resume token of `zfs receive` asks for                      pure
    redact.py       take secrets out of what is kept or shown                          pure
    notices.py      which events of a run deserve a notice, and what it says           pure
    tomllines.py    the line of each key of a TOML text                                pure
    trust.py        files that only root may have written
    credentials.py  variables whose values are in files, or come from systemd
    journalfile.py  the journal's file: its numbers, and whether we may touch it
    provenance.py   whether a journal may act here: its machine's, and the newest seen
    schema.py       the tables; bringing an older journal up to date
    aside.py        setting a journal aside, renamed
    copying.py      copies of the journal, each of one instant
    database.py     its connections, its upgrade, its errors as ours
    journal.py      the only module that writes to the database
    history.py      reading the journal for people, with the standard library alone
    health.py       whether the backups of a job are as fresh as they should be        pure
    audit.py        what is wrong with a journal, if anything
    statedir.py     the state directory, and the folder of each run in it
    system/         what differs between operating systems: linux.py, freebsd.py
    locks.py        the kernel locks F, R and C, and who holds them
    process.py      the only module that starts programs
    pipeline.py     a stream from one program into others, through our hands
    sdnotify.py     tell the service manager where we are
    btrfsio.py      btrfs as the kernel shows it: ioctls, a mount that nobody else sees
    lvmio.py        LVM as its commands and the kernel tell it
    interrupts.py   SIGINT and SIGTERM as a request to compensate
    delivery.py     give one message to a server: a program of its own
    notifiers.py    tell somebody of a run: command, mail, pings, apprise
    outbox.py       notices that another process is to give
    volumes/        kind.py, zfs.py, btrfs.py, lvm.py ...: find, snapshot, hold, probe, destroy
    mounts/         mountinfo.py, namespace.py, nullfs.py, tree.py: mount, probe, unmount
    clients/        restic.py, kopia.py, borg.py, xfsdump.py ...: the backup programs
    config_kinds.py  the kinds of values that a configuration holds                    pure
    config_schema.py  what a configuration can hold: the one definition                pure
    config.py       the configuration: found, trusted, read and checked; jobs by name
    config_text.py  the configuration as text: shown, or begun                         pure
    units.py        the units of systemd for the jobs                                  pure
    task.py         what a front end asks of a runner, and what that leaves
    output.py       the client's output: lines, redacted, capped
    supervisor.py   the client under the runner's eyes: read, stopped, ended
    runner.py       holds the namespace and the client; outlives a killed front end
    errand.py       the front end's end of a runner
    preparing.py    ask the machine and the client, and make the plan; changes nothing
    wanted.py       which volumes are meant where snapshots stay
    snapping.py     the plan of snapshots that stay
    catchup.py      which kept moments a repository lacks, and the plan of each run    pure
    newest.py       the newest kept snapshot of each dataset, and where it is seen     pure
    pruning.py      which of them no rule keeps, and the run that destroys those
    unsnapping.py   which of them were meant to go, and go the same way
    probing.py      what the machine says about a run
    launching.py    how the client of a run is run
    sessions.py     a command of the user's in a session of its own
    verifying.py    what of a backup is compared with which generation                 pure
    restoring.py    a run's backup brought back into a directory that goes away again
    hooks.py        the user's own commands around a run, and their undos
    cleaning.py     take everything of a run away again
    moment.py       whether the snapshots are of one moment, and how they are shown
    executor.py     journal the intent, make the effect, journal the outcome; and backwards
    cloning.py      copies in other pools and on other machines: the plan, both ends
    stepping.py     the steps of a job at work: one after the other
    cloner.py       a clone at work: hold, send, prove, release
    settling.py     interrupted runs: probe, decide, act
    adoption.py     objects with our marks that are in no journal
    installing.py   units of systemd, written and taken away
    integrity/      entry.py, store.py, scanning.py, checking.py ...: what the files of a tree are
    cli/            one command, one file
"""

__version__ = "0.1.0"
