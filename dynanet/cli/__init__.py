"""The command line: `main`, its commands, and how arguments are read."""
