"""The one kind of error a user can mend: every face prints its message as one line and leaves with code 2."""


class CrowdExitError(Exception):
    """Input or a setting that cannot be used; the message is one line and says what is wrong with what."""
