"""Measure: clean and robust accuracy with intervals, suites of attacks, and flags where a number cannot be believed."""

from distrobust.evaluation.accuracy import Counts, Score, score, wilson
from distrobust.evaluation.counting import count_correct, foolbox_pgd
from distrobust.evaluation.evaluation import Evaluation, run
from distrobust.evaluation.flags import Flag
from distrobust.evaluation.suite import Suite

__all__ = ["Counts", "Evaluation", "Flag", "Score", "Suite", "count_correct", "foolbox_pgd", "run", "score", "wilson"]
