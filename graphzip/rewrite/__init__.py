"""The only place that edits a model."""
