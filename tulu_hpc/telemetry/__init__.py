"""Metric sinks, progress lines, plots and the HTML report. Imports no other room."""
