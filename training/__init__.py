"""The trainer: what stands between the command line of ``train.py`` and the networks."""
