"""The reward process."""

from __future__ import annotations

import subprocess
import sys


def test_a_reward_process_imports_no_large_package() -> None:
    code = (
        "import sys, fastvst.rl.rewards.worker; print([m for m in ('torch', 'scipy', 'pyarrow') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
