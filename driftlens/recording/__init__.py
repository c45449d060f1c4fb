"""Recording: observing gates and pathways of a model on fixed probes, one file per checkpoint."""
