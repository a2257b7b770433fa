"""Word and character error rates of a model directory, and of the fairseq checkpoint that it was converted from.

A source (`local`, `hub`) yields utterances, `recognize` and `fairseq_reference` transcribe them, `transcripts` keeps what
is finished, `score` counts errors, and `result` writes `evaluation.json`. `run` puts them together.
"""

from convert.evaluation.result import Evaluation
from convert.evaluation.run import evaluate

__all__ = ["Evaluation", "evaluate"]
