"""The plan of a run, made before any work: the settings of each stage, what would stop it, what it costs."""
