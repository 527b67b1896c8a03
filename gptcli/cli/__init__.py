"""The command line: one file a command, the display, the signal handlers."""
