"""One file a subcommand of main.py; files that begin with _ are what several of them use."""
