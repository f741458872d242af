"""DVC's pipeline, run with several stages side by side: the graph, the workers, what runs next, and how far it is."""
