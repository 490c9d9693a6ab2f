"""The kernels are a package of their own: torch is all they import."""

import subprocess
import sys
from pathlib import Path

import fastvst_kernels

CODE = """
import sys, torch
before = set(sys.modules)
import fastvst_kernels
new = {name.split(".")[0] for name in set(sys.modules) - before}
print(sorted(new & {"fastvst", "transformers", "triton", "numpy", "PIL", "pandas", "safetensors"}))
"""


def test_import_brings_nothing_but_torch():
    output = subprocess.run([sys.executable, "-c", CODE], check=True, capture_output=True, text=True).stdout
    assert output.strip() == "[]"


def test_every_public_name_exists_and_is_documented():
    for name in fastvst_kernels.__all__:
        assert getattr(fastvst_kernels, name).__doc__, name


def test_pointwise_operators_never_read_values_of_device_tensors():
    """`.item()`, `.cpu()`, `.tolist()` and `nonzero` make the host wait for the device."""
    root = Path(fastvst_kernels.__file__).parent
    folders = [root / name for name in ("norm", "activation", "rope", "window")]
    for path in [root / "linear.py", *(file for folder in folders for file in folder.glob("*.py"))]:
        if path.name == "cpu.py":
            continue
        text = path.read_text()
        assert not [word for word in (".item()", ".cpu()", ".tolist()", "nonzero(") if word in text], path
