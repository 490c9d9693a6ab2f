from __future__ import annotations

import subprocess
import sys

import pytest

from fastvst import __version__
from fastvst.cli import COMMANDS, main
from fastvst.cli.scripts import SCRIPTS

PLAIN = sorted(set(COMMANDS) - set(SCRIPTS))


def test_help_names_every_command_in_one_line(capsys):
    for words in (["--help"], []):
        with pytest.raises(SystemExit) as stop:
            main(words)
        assert stop.value.code == 0
        listed = capsys.readouterr().out.partition("commands:")[2].splitlines()
        for name, command in COMMANDS.items():
            assert [line for line in listed if line.split() == [name, *command.help.split()]], name


@pytest.mark.parametrize("name", PLAIN)
def test_the_help_of_a_command_says_what_it_does_and_shows_an_example(name, capsys):
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    command = COMMANDS[name]
    assert f"{command.help[0].upper()}{command.help[1:]}." in shown and command.example in shown


def test_texts_of_help_begin_in_lower_case_and_end_without_a_stop(capsys):
    for name, command in COMMANDS.items():
        assert command.help[0].islower() and command.help[-1].isalnum() or command.help[-1] == ")", name
        assert command.example.startswith(f"fastvst {name} ")


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["evalaute"], "there is no command 'evalaute'; did you mean `fastvst evaluate`?"),
        (["cold_start"], "did you mean `fastvst cold-start`?"),
        (["qqq"], "`fastvst --help`"),
        (["data", "chek", "x"], "fastvst data: argument action: invalid choice: 'chek'"),
        (["data", "chek", "x"], "did you mean 'check'?"),
        (["data", "check", "x", "--modle", "y"], "unrecognized arguments: --modle y; did you mean '--model'?"),
        (["generate"], "fastvst generate: the following arguments are required: "),
        (["--verson"], "COMMAND"),
    ],
)
def test_a_wrong_word_is_one_line_with_the_near_word(arguments, expected, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    shown = capsys.readouterr()
    assert not shown.out and expected in shown.err and len(shown.err.splitlines()) == 1


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["evaluate", "rooms", "--data", "x"], "no checkpoint in runs/sft/hf"),
        (["evaluate", "rooms", "--model", "here=nowhere"], "no such checkpoint: nowhere"),
        (["evaluate", "vsi_bench", "--model", "a", "b", "--data", "x"], "only rooms compares several"),
        (["evaluate", "vsi_bench", "--model", "a"], "needs --data"),
        (["evaluate", "no_such_benchmark", "--data", "x", "--model", "y"], "no_such_benchmark"),
        (["evaluate", "vsi_bench", "--data", "nowhere", "--model", "nowhere", "--out", "o"], "nowhere"),
        (["merge"], "pass either two or more checkpoints, or --adapter DIR"),
        (["sft", "--nproc"], "--nproc is ''"),
        (["rl", "--nproc", "two"], "--nproc is 'two'; expected the number of processes"),
    ],
)
def test_bad_arguments_get_a_line_and_status_2(arguments, expected, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert expected in capsys.readouterr().err


def test_help_version_and_scripts_need_no_torch():
    code = (
        "import sys; from fastvst.cli import main\ntry: main(['{}'])\nexcept SystemExit: print('torch' in sys.modules)"
    )
    for word in ("--help", "--version", "qqq"):
        done = subprocess.run([sys.executable, "-c", code.format(word)], capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == "False"


def test_the_module_is_the_command():
    done = subprocess.run([sys.executable, "-m", "fastvst", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"fastvst {__version__}\n"
