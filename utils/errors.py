"""The one exception that is meant for the user rather than for a debugger, and what a disk may say."""

import errno

# Numbers of an OSError that say that a place cannot be written to: full, read-only, forbidden, broken.
NOT_WRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}


class UserError(ValueError):
    """Something the user can put right: its text says what is wrong, where (file, line, key) and what to do.

    Entry points print the text alone and leave with exit code 1; every other exception keeps its traceback.
    """
