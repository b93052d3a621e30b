"""``python -m llmcompress`` is the same as ``llmcompress``."""

from llmcompress.cli.app import main

main()
