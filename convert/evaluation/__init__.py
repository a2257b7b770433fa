"""Measures word and character error rates of a model directory, and of the fairseq checkpoint it came from."""

from convert.evaluation.result import Evaluation
from convert.evaluation.run import evaluate

__all__ = ["Evaluation", "evaluate"]
