"""From the rows of a source to the prepared data: rows are checked, images decoded, encoded and scored, all written."""
