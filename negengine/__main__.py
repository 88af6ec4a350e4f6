"""``python -m negengine``: the command line."""

from negengine.cli import app

app(prog_name="negengine")
