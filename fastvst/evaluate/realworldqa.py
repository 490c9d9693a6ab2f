"""RealWorldQA: 765 questions about photographs, in VLMEvalKit's TSV."""

from __future__ import annotations

from fastvst.evaluate import choice

SET = choice.ChoiceSet("RealWorldQA", file="RealWorldQA.tsv", questions=765)
NAME = SET.name
DOWNLOAD = SET.download
MAX_NEW_TOKENS = choice.MAX_NEW_TOKENS
PROCESSOR = choice.PIXELS

load = SET.load
prompt = SET.prompt
score = SET.score
