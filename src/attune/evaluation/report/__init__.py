"""The published comparison: tables, figures and words from one summary."""
