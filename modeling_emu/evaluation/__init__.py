"""Evaluation: one file per benchmark, each of which gives a report; how a model is asked; how a report is written.

    pipeline = load_pipeline(folder)
    report = evaluate_shapes(pipeline, num_samples=200, seed=0)
    print(report.to_markdown())

A benchmark's file scores given answers with pure functions, so that scores can be checked without a model.
"""

from .report import Figure, Report, compute_wilson_interval
from .shapes import evaluate_shapes


__all__ = ["Figure", "Report", "compute_wilson_interval", "evaluate_shapes"]
