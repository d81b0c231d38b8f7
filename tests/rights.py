"""A program without the rights of root, who may read and write everything."""

import os
import subprocess
import sys
from pathlib import Path

WITHOUT_RIGHTS = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"] if os.geteuid() == 0 else []


def lorabooth(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """The command line, as any user has it."""
    command = [*WITHOUT_RIGHTS, sys.executable, "-m", "lorabooth", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
