"""The one exception that is meant for the user rather than for a debugger."""


class UserError(ValueError):
    """Something the user can put right: its text says what is wrong, where (file, line, key) and what to do.

    Entry points print the text alone and leave with exit code 1; every other exception keeps its traceback.
    """
