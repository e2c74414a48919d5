"""Pictures of a run, as matplotlib figures: for a notebook, a logger, and the HTML report.

Every function takes a history (or several, where runs are compared), draws on `ax` if one is given and
returns the figure.
"""

from adalora.report.figures.by_module import plot_ranks, plot_ranks_over_time, plot_singular_values
from adalora.report.figures.whole_run import (
    plot_budget,
    plot_churn,
    plot_compared,
    plot_loss,
    plot_metrics,
    plot_orthogonality,
    plot_score_quantiles,
    plot_scores,
)

__all__ = [
    "plot_budget",
    "plot_churn",
    "plot_compared",
    "plot_loss",
    "plot_metrics",
    "plot_orthogonality",
    "plot_ranks",
    "plot_ranks_over_time",
    "plot_score_quantiles",
    "plot_scores",
    "plot_singular_values",
]
