"""Diagnostics of a run while it trains."""

from __future__ import annotations

import warnings

from adalora.errors import AdaLoraWarning
from adalora.report.diagnostics import Diagnostics
from adalora.report.history import History, Record
from adalora.report.thresholds import DiagnosticThresholds, recorded_thresholds


class LiveDiagnostics:
    """A listener of a history: every finding becomes a `diagnostic` record and a warning, each code once a run.

    Attributes:
        diagnostics: What has been read so far.
    """

    def __init__(self, history: History, thresholds: DiagnosticThresholds | None) -> None:
        self.history = history
        self.diagnostics = Diagnostics(thresholds or recorded_thresholds(history))
        for record in history:  # a resumed run does not repeat itself
            self.diagnostics.update(record)

    def __call__(self, record: Record) -> None:
        """Take a new record."""
        if record["event"] == "start":
            changed = self.diagnostics.thresholds.model_dump(mode="json", exclude_defaults=True)
            if changed:  # a report written later then judges by the same limits
                self.history.add("thresholds", **changed)
        for finding in self.diagnostics.update(record):
            self.history.add("diagnostic", **finding)
            if record["event"] == "finish" and finding["code"] == "final-phase-too-short":
                continue  # of a run cut short the controller itself has warned, with the line to write
            text = f"{finding['code']}: {finding['message']}. {finding['cause']} {finding['cure']}"
            warnings.warn(text, AdaLoraWarning, stacklevel=3)


def diagnose_live(history: History, thresholds: DiagnosticThresholds | None = None) -> Diagnostics:
    """Watch a history while it is written: every finding becomes a `diagnostic` record and a warning.

    `adalora.attach` calls this itself. Records that the history holds already are read first, without warnings: a
    resumed run does not repeat itself. Called again, it only changes the limits, where some are given.

    Args:
        history: The history of a run.
        thresholds: Limits; those that the history has recorded, else the defaults, if None.
    """
    for listener in history.listeners:
        if isinstance(listener, LiveDiagnostics):
            if thresholds is not None:
                listener.diagnostics.thresholds = thresholds
            return listener.diagnostics
    live = LiveDiagnostics(history, thresholds)
    history.listeners.append(live)
    return live.diagnostics
