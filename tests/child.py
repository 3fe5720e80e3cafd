"""A fresh Python for what one process cannot show: imports, environment, forks, OpenMP."""

import os
import subprocess
import sys
import textwrap


def python(code: str, *, fails: bool = False, timeout: float = 120, **environment: str) -> str:
    """What `code` prints; with `fails` it must end with an error, and what it says is returned."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert (done.returncode != 0) == fails, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert done.returncode >= 0, f"killed by signal {-done.returncode}\n{done.stderr}"
    return done.stderr if fails else done.stdout + done.stderr
