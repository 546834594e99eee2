"""The command `mc-runtime`: one file a command, each imported only when it is the one that runs."""
