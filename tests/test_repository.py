"""Rules of CONTRIBUTING that a machine can check: imports, lengths, mechanics, words, and what the documents name."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import house

ROOT = Path(__file__).parent.parent
SOURCES = [ROOT / path for path in house.sources()]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "kernels/README.md"])


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


def test_no_import_circle():
    assert house.circles(house.import_graph()) == []


def test_imports_point_down():
    assert house.upward_imports(house.import_graph()) == []


@pytest.mark.parametrize(
    "rule",
    [house.private_imports, house.tuple_assignments, house.too_long, house.format_skips, house.old_words],
    ids=lambda rule: rule.__name__,
)
def test_sources_keep_the_rule(rule):
    assert [problem for path in house.sources() for problem in rule(path)] == []


@pytest.mark.parametrize(("script", "limit"), [("sft.py", 400), ("rl.py", 450)])
def test_training_scripts_stay_short(script, limit):
    assert len((ROOT / "examples" / script).read_text().splitlines()) < limit


def test_the_rules_find_what_breaks_them(tmp_path):
    graph = {"fastvst.data.a": {"fastvst.data.b"}, "fastvst.data.b": {"fastvst.data.a"}, "fastvst.model.c": set()}
    assert house.circles(graph) == [["fastvst.data.a", "fastvst.data.b"]]
    assert house.upward_imports({"fastvst.model.c": {"fastvst.data.a"}}) == ["fastvst.model.c imports fastvst.data.a"]
    assert house.upward_imports({"fastvst.nowhere": set()}) == ["fastvst.nowhere belongs to no level"]
    bad = tmp_path / "bad.py"
    bad.write_text(
        '"""An ess' + 'ay."""\nfrom fastvst.data.images import _hidden\na, b = 1, 2\na, b = b, a\n'
        "c, d = divmod(7, 2)\nx = [1]  # fmt: " + "skip\ndef long():\n" + "    x = 1\n" * 61
    )
    assert len(list(house.private_imports(bad))) == 1
    assert len(list(house.tuple_assignments(bad))) == 1, "a swap and real unpacking are allowed"
    assert len(list(house.format_skips(bad))) == 1 and len(list(house.old_words(bad))) == 1
    assert len(list(house.too_long(bad))) == 1


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_paths_that_a_document_names_exist(document):
    text = document.read_text(encoding="utf-8")
    top = "fastvst|kernels|examples|tools|bench|tests|docs"
    named = set(re.findall(rf"(?<![\w/.-])(?:{top})/[\w/.-]*\w", text))
    made = ("fastvst/results", "bench/gpu/cache.tar.xz")  # by commands; git ignores them
    named = {name for name in named if not name.startswith(made)}
    prose = re.sub(r"(?m)^ {4}.*$", "", text)  # in code, `kernel[grid](arguments)` is no link
    links = {match for match in re.findall(r"\]\(([^)#]+)\)", prose) if "://" not in match}
    missing = sorted(n for n in named if not (ROOT / n).exists() and not list(ROOT.glob(n + "*")))
    missing += sorted(link for link in links if not (document.parent / link).exists())
    assert missing == []


# The planner's samples in an unnamed file that no other process can open, and an exception that is on its way between
# two processes of a run: bytes that the run itself has pickled.
OWN_BYTES = ("fastvst/data/spool.py", "fastvst/data/planner_process.py")


def test_nothing_is_unpickled_and_nothing_is_left_open():
    forbidden = re.compile(r"\bpickle\.load|torch\.load\(|allow_pickle=True|\bTODO\b|\bFIXME\b|NotImplementedError")
    found = [
        f"{p.relative_to(ROOT)}:{number}"
        for p in SOURCES
        if p.relative_to(ROOT).parts[0] != "tests"
        for number, line in enumerate(p.read_text().splitlines(), 1)
        if forbidden.search(line) and p.relative_to(ROOT).as_posix() not in OWN_BYTES
    ]
    assert found == []


def test_no_environment_variable_is_configuration():
    launcher = "RANK|WORLD_SIZE|MASTER_|TORCHELASTIC"  # of torchrun
    allowed = f"{launcher}|TRITON_INTERPRET|XDG|TOKENIZERS|LP_NUM_THREADS"  # and Mesa's threads
    allowed += "|OPENAI_API_KEY"  # a secret has no place in options, which are printed and stored
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
