"""MMStar: 1,500 questions in six capabilities (`category`), in VLMEvalKit's TSV."""

from __future__ import annotations

from fastvst.evaluate import choice

SET = choice.ChoiceSet("MMStar", file="MMStar.tsv", questions=1500, required=("category",))
NAME = SET.name
DOWNLOAD = SET.download
MAX_NEW_TOKENS = choice.MAX_NEW_TOKENS
PROCESSOR = choice.PIXELS

load = SET.load
prompt = SET.prompt
score = SET.score
