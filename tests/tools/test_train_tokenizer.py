"""The shipped tiny tokenizer is what the training script makes."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer

from fastvst.data.tokenizer import tiny_tokenizer
from tools.train_tokenizer import main


def test_the_script_makes_the_shipped_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--out", str(tmp_path / "tiny.json")])
    assert Tokenizer.from_file(str(tmp_path / "tiny.json")).to_str() == tiny_tokenizer().to_str()
    assert "4096 tokens" in capsys.readouterr().out
