"""Where ``llmcompress`` and ``python -m llmcompress`` begin."""

import sys


def main() -> None:
    """Run the command line; Ctrl-C while it is still being imported is told as later ones are."""
    try:
        from llmcompress.cli.app import main as begin
    except KeyboardInterrupt:
        sys.stderr.write("error: stopped by Ctrl-C\nnext: run the command again\n")
        sys.exit(130)
    begin()


if __name__ == "__main__":
    main()
