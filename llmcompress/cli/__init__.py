"""The command line: parsing arguments and printing, a file for a command or two.

``app.py`` lists the commands; each imports what it needs when it runs, so that ``--help`` never waits for torch. Only
``output.py`` prints.
"""
