"""What ``export.py`` is made of: formats, the files in them, and the proof that they compute what was trained."""
