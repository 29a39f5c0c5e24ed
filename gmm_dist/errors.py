"""Errors that a user can cause, and mend."""


class UserError(ValueError):
    """Report bad input in one line: what is wrong with its numbers, where, and the remedy.

    Jobs print the message on stderr and end with status 2. Anything else that is raised is
    either the world's failure or ours, and keeps its traceback.
    """
