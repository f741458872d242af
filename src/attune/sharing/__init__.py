"""What is done with a model once it is trained: pictures of any prompt, a package with its card, an upload."""
