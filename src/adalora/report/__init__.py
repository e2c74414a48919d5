"""What a run did: its history, the HTML report, diagnostics."""

from adalora.report.history import History

__all__ = ["History"]
