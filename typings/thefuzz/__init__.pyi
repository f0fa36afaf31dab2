"""What extraction/official_letters.py uses of thefuzz."""
