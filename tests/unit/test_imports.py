"""Importing a method must be quick, because settings are checked before any work."""

import subprocess
import sys

from attune.config import plugins

HEAVY = {"transformers", "diffusers", "peft", "accelerate", "attune.spm", "attune.diffusion.policy"}


def test_methods_are_imported_without_heavy_libraries():
    names = ", ".join(f"attune.methods.{name}" for name in plugins.available("methods"))
    code = f"import sys, {names}; sys.exit(' '.join(sorted(sys.modules.keys() & {HEAVY})) or None)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
