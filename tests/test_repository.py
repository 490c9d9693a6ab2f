"""Rules of the house that a machine can see."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted(
    p for folder in ("fastvst", "kernels", "examples", "bench", "tests") for p in (ROOT / folder).rglob("*.py")
)


def python(code: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=120)


@pytest.mark.slow
@pytest.mark.parametrize(
    "command", [["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"]], ids=" ".join
)
def test_linters(command):
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.mark.parametrize(
    "module", ["fastvst", "fastvst.data", "fastvst.model", "fastvst.spatial.boxes", "fastvst_kernels"]
)
def test_imports_are_light(module, tmp_path):
    heavy = ["transformers", "pandas", "moderngl", "embreex", "trimesh", "datasets", "matplotlib", "torchvision"]
    done = python(f"import sys, {module}; print(*[m for m in {heavy} if m in sys.modules])", tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def test_kernels_know_nothing_of_fastvst(tmp_path):
    done = python(
        "import sys, fastvst_kernels; print([m for m in sys.modules if m.split('.')[0] == 'fastvst'])", tmp_path
    )
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_the_folder_kernels_is_not_a_package(tmp_path):
    done = python("import importlib.util as u; print(u.find_spec('kernels'))", tmp_path)
    assert done.stdout.strip() == "None", "the install must bring fastvst_kernels, not the folder that holds it"


def test_transformers_does_not_take_the_folder_for_the_package_of_that_name():
    code = "from transformers.utils.import_utils import is_kernels_available as f; print(f())"
    assert python(code, ROOT).stdout.strip() == "False", "not even from the repository's root"


def test_files_are_one_idea_long():
    long = {str(p.relative_to(ROOT)): n for p in SOURCES if (n := len(p.read_text().splitlines())) > 500}
    assert long == {}


def test_nothing_is_unpickled_and_nothing_is_left_open():
    forbidden = re.compile(r"\bpickle\.load|torch\.load\(|allow_pickle=True|\bTODO\b|\bFIXME\b|NotImplementedError")
    found = [
        f"{p.relative_to(ROOT)}:{number}"
        for p in SOURCES
        if p.relative_to(ROOT).parts[0] != "tests"
        for number, line in enumerate(p.read_text().splitlines(), 1)
        if forbidden.search(line)
    ]
    assert found == []


def test_no_environment_variable_is_configuration():
    allowed = "RANK|WORLD_SIZE|MASTER_|TRITON_INTERPRET|XDG|TOKENIZERS|LP_NUM_THREADS"  # and Mesa's threads
    found = [
        f"{p.relative_to(ROOT)}:{number}: {line.strip()}"
        for p in SOURCES
        if p.relative_to(ROOT).parts[0] in ("fastvst", "kernels")
        for number, line in enumerate(p.read_text().splitlines(), 1)
        if re.search(r"os\.environ(\.get)?[\[(]", line) and not re.search(allowed, line)
    ]
    assert found == []


def test_ci_runs_the_command_of_the_readme():
    command = (ROOT / ".ci/run").read_text().strip().splitlines()[-1]
    assert command in (ROOT / "README.md").read_text()
