"""The `minirec` command: a file a subcommand, each imported when it is asked for."""
