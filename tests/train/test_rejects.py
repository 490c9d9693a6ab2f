"""Runs of examples/sft.py and examples/rl.py on rows of which too many cannot be used."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastvst.data import TooManyBadSamples
from fastvst.train.checkpoint import complete
from ranks import start_ranks
from rl_run import REWARD, load_rl, rl_arguments, run_rl, write_questions
from small_run import arguments, load_script, rows_of, run_sft, write_data, write_model

sft = load_script()
rl = load_rl()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "small")


def tear(folder: Path, every: int, first: int = 0) -> None:
    """Cut the pixels of some images off; their headers stay, so only the rank that decodes them notices."""
    for number, path in enumerate(sorted(folder.glob("*.png"), key=lambda p: int(p.stem))):
        if number >= first and number % every == 0:
            path.write_bytes(path.read_bytes()[:200])


def test_a_run_that_ends_for_rejects_has_saved_and_goes_on_with_a_higher_limit(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_data(tmp_path / "data", 60, image_every=2)
    tear(data.parent, 2)
    out = tmp_path / "run"
    command = arguments(out, data, model, "steps=8", "resume=auto", "bad_samples.min_samples=20", "log.every=1")
    with pytest.raises(TooManyBadSamples, match=r"of \d+ samples cannot be used(.|\n)*broken_image"):
        sft.main(command)
    done = len(rows_of(out))
    assert 1 <= done < 8 and complete(out / "checkpoints")[-1].name == f"step-{done:06d}"
    assert not (out / "hf").exists()
    last = rows_of(out)[-1]
    assert last["rejected"] > 0 and last["rejected_share"] > 0.01
    printed = capsys.readouterr().out
    assert f"rejected {last['rejected']} ({100 * last['rejected_share']:.2g}%)" in printed
    with pytest.raises(TooManyBadSamples):  # nothing has changed
        sft.main(command)
    sft.main([*command, "bad_samples.max_fraction=0.9"])
    assert [row["step"] for row in rows_of(out)] == list(range(1, 9)) and (out / "hf").exists()


@pytest.mark.parametrize("strict", ["false", "true"])
def test_two_ranks_end_at_the_same_step_although_one_sees_the_broken_pixels(
    model: Path, tmp_path: Path, strict: str
) -> None:
    data = write_data(tmp_path / "data", 60, image_every=2)
    tear(data.parent, 100, first=0)  # one image
    out = tmp_path / "run"
    limits = ["bad_samples.min_samples=10", "bad_samples.max_fraction=0.001", f"bad_samples.strict={strict}"]
    command = arguments(out, data, model, "steps=40", *limits)
    ends = start_ranks(run_sft, 2, command)
    texts = sorted(str(result).splitlines()[-1] for _, result in ends)
    assert all(code for code, _ in ends), ends
    assert sum("RankError: rank " in str(result) for _, result in ends) == 1, texts
    assert sum("broken_image" in str(result) for _, result in ends) == 2, texts
    done = len(rows_of(out))
    assert 1 <= done < 40 and complete(out / "checkpoints")[-1].name == f"step-{done:06d}"


def test_a_source_without_usable_first_rows_is_named_at_the_start(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = write_data(tmp_path / "good", 40)
    bad = write_data(tmp_path / "bad", 40, image_every=1)
    for image in bad.parent.glob("*.png"):
        image.unlink()
    sources = f'data.sources=[{{path = "{good}", name = "good"}}, {{path = "{bad}", name = "bad"}}]'
    sft.main(arguments(tmp_path / "run", good, model, "steps=1", sources))
    printed = capsys.readouterr().out
    assert "WARNING: bad: none of its first 20 rows can be used; the first reason: bad/0: missing_image" in printed
    assert "WARNING: good" not in printed and printed.index("WARNING: bad") < printed.index("step 1/1")


def test_rl_saves_before_it_ends_for_rejects(model: Path, tmp_path: Path) -> None:
    data = write_questions(tmp_path / "data", 60, image_every=2)
    tear(data.parent, 2)
    reward = tmp_path / "reward.py"
    reward.write_text(REWARD)
    out = tmp_path / "run"
    command = rl_arguments(out, data, model, reward, "steps=200", "sampling.prompts=32", "filter.tries=1")
    ends = start_ranks(run_rl, 2, command)
    assert all(code for code, _ in ends) and all("samples cannot be used" in str(result) for _, result in ends), ends
    done = len(rows_of(out))
    assert 2 <= done < 200 and complete(out / "checkpoints")[-1].name == f"step-{done:06d}"
    assert rows_of(out)[-1]["rejected_share"] > 0.05 and not (out / "hf").exists()
