"""The kernels are a package of their own: torch, and triton through torch's FLOP counter, is all they import."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import fastvst_kernels

CODE = """
import sys, torch
before = set(sys.modules)
import fastvst_kernels
new = {name.split(".")[0] for name in set(sys.modules) - before}
print(sorted(new & {"fastvst", "transformers", "numpy", "PIL", "pandas", "safetensors"}))
"""

WITHOUT_NUMPY = """
import sys
sys.modules["numpy"] = None  # every import of it fails
import torch
from fastvst_kernels import decode_attention, packed_attention, window_attention
offsets = torch.tensor([0, 4, 6, 9], dtype=torch.int32)
groups = torch.tensor([-1, 0, 0], dtype=torch.int32)
q, k, v = (torch.randn(9, heads, 16, requires_grad=True) for heads in (2, 1, 1))
packed_attention(q, k, v, offsets, causal=True, groups=groups).sum().backward()
qkv = torch.randn(9, 48, requires_grad=True)
window_attention(qkv, None, torch.zeros(9, 2, dtype=torch.int32), offsets, num_heads=1).sum().backward()
pages = torch.randn(3, 4, 1, 16)
decode_attention(torch.randn(2, 2, 16), pages, pages, torch.tensor([[0, 1], [2, 0]]), torch.tensor([7, 2]))
"""


def test_import_brings_nothing_but_torch():
    output = subprocess.run([sys.executable, "-c", CODE], check=True, capture_output=True, text=True).stdout
    assert output.strip() == "[]"


def test_attention_runs_without_numpy():
    """torch does not depend on numpy, and neither does the package."""
    subprocess.run([sys.executable, "-c", WITHOUT_NUMPY], check=True)


def test_every_public_name_exists_and_is_documented():
    for name in fastvst_kernels.__all__:
        assert getattr(fastvst_kernels, name).__doc__, name


def test_pointwise_operators_never_read_values_of_device_tensors():
    """`.item()`, `.cpu()`, `.tolist()` and `nonzero` make the host wait for the device."""
    root = Path(fastvst_kernels.__file__).parent
    folders = [root / name for name in ("norm", "activation", "rope", "rotary", "window")]
    for path in [root / "linear.py", *(file for folder in folders for file in folder.glob("*.py"))]:
        if path.name == "cpu.py":
            continue
        text = path.read_text()
        assert not [word for word in (".item()", ".cpu()", ".tolist()", "nonzero(") if word in text], path


def test_no_function_hides_a_module_of_its_name():
    """`fastvst_kernels.norm` is always the folder: a function of that name in __init__ would replace it."""
    for name in fastvst_kernels.__all__:
        assert importlib.util.find_spec(f"fastvst_kernels.{name}") is None, name
