"""Tables: lakes whose rows a log tells, such as Delta's; their folders hold deleted rows, too."""
