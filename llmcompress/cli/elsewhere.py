"""Words of lm-eval, llm-compressor, GPTQModel and mergekit on the command line, and what does the same here."""

from __future__ import annotations

_MODEL = "the model's folder is the first word after the command; in `run` and `plan` it is model.path=FOLDER"
_RULE = "a setting of a recipe: llmcompress run gptq model.path=FOLDER stages.quantize.rules.linears."

# option, with dashes → what to do
_OPTIONS = {
    "--model": _MODEL,
    "--model-args": _MODEL,
    "--pretrained": _MODEL,
    "--tasks": "--task NAME, once for each task",
    "--batch-size": "leave it out: a batch has up to 8 rows, fewer where they are long",
    "--output-path": "--csv FILE, or --json for all figures on standard output",
    "--log-samples": "log_samples: true of an evaluate stage, in a recipe",
    "--include-path": "--task FILE.yaml; its rows lie in --tasks-dir FOLDER",
    "--bits": f"{_RULE}bits=3",
    "--wbits": f"{_RULE}bits=3",
    "--group-size": f"{_RULE}group_size=128",
    "--sym": f"{_RULE}symmetric=false",
    "--recipe": "the recipe is the first word after the command: llmcompress run RECIPE",
    "--output": "the folder of a run is run.dir=FOLDER",
    "--output-dir": "the folder of a run is run.dir=FOLDER",
}
_COMMANDS = {
    "quantize": "llmcompress run gptq model.path=FOLDER",
    "compress": "llmcompress run gptq model.path=FOLDER",
    "oneshot": "llmcompress run gptq model.path=FOLDER",
    "evaluate": "llmcompress eval FOLDER",
    "benchmark": "llmcompress bench --help",
    "convert": "llmcompress export RUN --format gguf",
    "merge": "llmcompress family merge --help",
    "list": "llmcompress recipes ls",
    "init": "llmcompress recipes cp gptq mine.yaml --full",
}


def option_here(word: str) -> str | None:
    """What to do instead of an option that no command has, None where nothing is known.

    Args:
        word: As typed, ``--batch_size``.
    """
    return _OPTIONS.get(word.replace("_", "-"))


def command_here(word: str) -> str | None:
    """The command line that does what ``word`` does in other tools, None where nothing is known."""
    return _COMMANDS.get(word)
