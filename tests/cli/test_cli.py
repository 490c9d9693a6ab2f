import pytest

from fastvst.cli import main


def test_help_names_the_commands(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    listed = shown.partition("positional arguments:")[2]
    for command in ("rooms", "data", "evaluate", "chat", "generate"):
        assert command in listed, f"{command} is not in the list of commands"
        assert command in shown.partition("positional arguments:")[0].replace(shown.splitlines()[0], ""), (
            f"the description leaves {command} out"
        )


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["evaluate", "rooms", "--data", "x"], "no checkpoint in runs/sft/hf"),
        (["evaluate", "rooms", "--model", "here=nowhere"], "no such checkpoint: nowhere"),
        (["evaluate", "vsi_bench", "--model", "a", "b", "--data", "x"], "only rooms compares several"),
        (["evaluate", "vsi_bench", "--model", "a"], "needs --data"),
        (["evaluate", "no_such_benchmark", "--data", "x", "--model", "y"], "no_such_benchmark"),
        (["evaluate", "vsi_bench", "--data", "nowhere", "--model", "nowhere", "--out", "o"], "nowhere"),
    ],
)
def test_bad_arguments_get_a_line_and_status_2(arguments, expected, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert expected in capsys.readouterr().err
