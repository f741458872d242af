"""CLIP as all scorers use it: its features, the images made ready for it, and open_clip's layout."""
