"""Run the demo's session in the virtual machine of the tests, and show it as it goes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from tests.vm.machine import MachineError, install, open_machine  # noqa: E402


def main() -> int:
    """Return the session's exit status."""
    with open_machine() as machine:
        install(machine)
        machine.put(HERE / "session.sh", "/root/session.sh")
        argv = [*machine.ssh(tty=sys.stdout.isatty()), "/root/session.sh"]
        return subprocess.run(argv).returncode


if __name__ == "__main__":
    try:
        sys.exit(main())
    except MachineError as error:
        sys.exit(f"demo: {error}")
