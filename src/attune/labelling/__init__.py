"""The labelling page: people choose between two images of a prompt, on a page served by this machine to itself."""
