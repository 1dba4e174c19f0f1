"""The one exception that a user's own mistake raises."""


class JobError(ValueError):
    """A job that cannot run as written.

    The message is one line that names the setting and the remedy; the entry
    points print it without a traceback and exit with status 2.
    """
