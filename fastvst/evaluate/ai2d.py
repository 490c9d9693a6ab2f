"""AI2D: 3,088 questions about diagrams, in VLMEvalKit's TSV (masked test set)."""

from __future__ import annotations

from fastvst.evaluate import choice

SET = choice.ChoiceSet("AI2D", file="AI2D_TEST.tsv", questions=3088)
NAME = SET.name
DOWNLOAD = SET.download
MAX_NEW_TOKENS = choice.MAX_NEW_TOKENS
PROCESSOR = choice.PIXELS

load = SET.load
prompt = SET.prompt
score = SET.score
