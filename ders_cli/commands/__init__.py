"""One file per command: parse, call one function, print its report. Each offers its function, or its Typer app, as `COMMAND`.

Heavy imports stand inside the functions: `ders --help` must not wait for them.
"""
