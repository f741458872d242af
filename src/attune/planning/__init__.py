"""The plan of a run, made before any work: what each stage is told, what would stop it, what it costs."""
