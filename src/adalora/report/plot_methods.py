"""Pictures and frames straight from the object that holds a history: `controller.plot_ranks()`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adalora.report.history import History

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class HistoryPlots:
    """The figures of `adalora.report.figures` as methods; matplotlib is imported when one is called.

    They draw what is known so far, so they work in the middle of a training too.

    Attributes:
        history: What is drawn.
    """

    history: History

    def plot_ranks(self, *, ax: Axes | None = None) -> Figure:
        """Rank of every module as a layer × module type heatmap, totals at the margins."""
        from adalora.report import figures

        return figures.plot_ranks(self.history, ax=ax)

    def plot_ranks_over_time(self) -> Figure:
        """One small heatmap per module type: layers upwards, steps to the right."""
        from adalora.report import figures

        return figures.plot_ranks_over_time(self.history)

    def plot_budget(self, *, ax: Axes | None = None) -> Figure:
        """Budget and live triplets over optimizer steps."""
        from adalora.report import figures

        return figures.plot_budget(self.history, ax=ax)

    def plot_loss(self, *, ax: Axes | None = None) -> Figure:
        """Training loss over optimizer steps, where it was logged."""
        from adalora.report import figures

        return figures.plot_loss(self.history, ax=ax)

    def plot_scores(self, *, ax: Axes | None = None) -> Figure:
        """All triplets at the newest allocation by score, with the threshold."""
        from adalora.report import figures

        return figures.plot_scores(self.history, ax=ax)

    def plot_orthogonality(self, *, ax: Axes | None = None) -> Figure:
        """Orthogonality error at every allocation."""
        from adalora.report import figures

        return figures.plot_orthogonality(self.history, ax=ax)

    def plot_singular_values(self) -> Figure:
        """Singular values of every module's final update, once the run has finished."""
        from adalora.report import figures

        return figures.plot_singular_values(self.history)
