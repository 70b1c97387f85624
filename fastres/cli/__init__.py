"""The command line: one subcommand a file; `main` puts them together."""
