"""Which channels a model has, which of them are coupled, and what it costs to run."""
