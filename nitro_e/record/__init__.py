"""The record that a run leaves for people: metrics, progress, charts and pages."""
