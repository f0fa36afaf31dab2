"""What tasks/plugin.py uses of rouge-score."""
