from negengine.cli import app

app(prog_name="negengine")
